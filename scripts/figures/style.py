"""How every figure of the repository looks, with page.mplstyle.

Sizes are those of the printed page, where no text is smaller than 7 points. Colours are Okabe and
Ito's, safe for colour-blind readers: BP black, truncated BPTT green, fixed point vermilion and
dashed, Highway-BP blue. A line for one k is darker for larger k and has that k's marker, so that
hue, lightness, line style and marker distinguish lines.
"""

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from scripts.evidence.rows import Arm

WIDTH = 7.0  # inches: a printed page without its margins
GREY, PUBLISHED = "0.35", "0.5"

plt.style.use(Path(__file__).with_name("page.mplstyle"))
SMALL = plt.rcParams["legend.fontsize"]  # points

METHOD_LOOK = {
    "bp": {"color": "black", "marker": "X", "ls": "-"},
    "truncated_bptt": {"color": "#009E73", "marker": "^", "ls": "-."},
    "fixed_point": {"color": "#D55E00", "marker": "s", "ls": "--"},
    "highway": {"color": "#0072B2", "marker": "o", "ls": "-"},
    "mgrit": {"color": "0.45", "marker": "d", "ls": (0, (5, 1, 1, 1))},
}
OTHER = {"color": "0.6", "marker": ">", "ls": "-"}  # a user's own method
SCHEDULE = {"color": "#E69F00", "mec": "0.2", "mew": 0.5}
_RAMP = {"fixed_point": "Oranges", "highway": "Blues"}
_K_MARKERS = {0: "o", 1: "s", 2: "^", 3: "D", 4: "P", 5: "v", 10: "<", 20: "*"}


def look(arm: Arm) -> dict:
    """Colour, marker and line style of a series over k: one gradient method, one gamma."""
    style = dict(METHOD_LOOK.get(arm.grad, OTHER))
    if arm.gamma == "auto":
        style |= {"color": "#CC79A7", "marker": "v", "ls": "-."}
    elif arm.gamma:
        style |= {"color": "#56B4E9" if arm.gamma < 0.5 else "#E69F00", "marker": "P", "ls": ":"}
    if not arm.plain:
        style["marker"] = "*"
    return style


def look_of_k(arm: Arm) -> dict:
    """Colour, marker and line style of one method at one k; without a k, those of `look`."""
    style = look(arm)
    if arm.k is None:
        return style | {"lw": 1.5, "zorder": 3}
    place = np.interp(arm.k, list(_K_MARKERS), np.linspace(0.4, 1.0, len(_K_MARKERS)))
    ramp = matplotlib.colormaps[_RAMP.get(arm.grad, "Greys")]
    return style | {"color": ramp(place), "marker": _K_MARKERS.get(arm.k, ".")}
