"""The command line: its help, made from configs/, and mistakes that Hydra does not explain."""

import re
from collections.abc import Sequence
from pathlib import Path
from textwrap import dedent, indent
from typing import NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, QuotedString

from experiments.errors import UserError

CONFIGS = Path(__file__).parent.parent / "configs"
KEY = re.compile(r"^([a-z]\w*):(?! *$)(?:[^#\n]*# (.*))?", re.MULTILINE)  # key, comment
GROUPS = {
    "model": "the network, with its recipe: data and optimiser",
    "experiment": "a whole row of the paper, or a small one to try",
    "data": "training and test data",
    "optim": "optimiser, learning rate and length",
    "grad": "the gradient method",
    "schedule": "k over training",
    "trainer": "precision, evaluation, checkpoints",
    "diagnostics": "the gradient's error during training",
    "parallel": "layers on several processes, by torchrun",
    "logger": "wandb beside the metrics file",
    "hydra/launcher": "where the runs of a sweep go",
}
EXAMPLES = """\
python train.py experiment=digits grad=highway k=1                  try it, without a download
python train.py model=resnet110 grad=bp                             backpropagation
python train.py experiment=gpt2_wikitext103 k=2 advise=true         first, which k suits it here
python train.py model=gru_char schedule=milestones                  k grows during training
python train.py -m experiment=digits grad=bp,highway k=0,1 seed=0,1 a sweep; again to resume it
torchrun --nproc-per-node=2 train.py model=gpt2 parallel=layers     layers on two processes"""


def usage() -> str:
    """Return the help text, made from the files of configs/."""
    return "\n".join(
        [
            "Train a model with a gradient method: python train.py KEY=VALUE ...",
            "\nExamples\n" + indent(EXAMPLES, "  "),
            "\nKeys\n" + _keys([CONFIGS / "config.yaml"]),
            "\nGroups, as GROUP=CHOICE; their keys, as GROUP.KEY=VALUE",
            *(indent(f"{name}: {what}\n{_group(name)}", "  ") for name, what in GROUPS.items()),
            "\npython train.py --cfg job ... prints a configuration without running it.",
        ]
    )


def _group(name: str) -> str:
    """The choices of a group, and the keys of all of them."""
    files = sorted((CONFIGS / name).glob("*.yaml"))
    keys = "" if name in ("experiment", "hydra/launcher") else "\n" + _keys(files)
    return "  " + " ".join(file.stem for file in files) + keys


def _keys(files: Sequence[Path]) -> str:
    """Each key once, with the first comment beside it."""
    found: dict[str, str] = {}
    for file in files:
        text = file.read_text().partition("\nhydra:")[0]
        if "_global_" in text:  # a model's file also sets keys of other groups
            text = dedent(text.partition("\nmodel:\n")[2])
        for key, comment in KEY.findall(text):
            found[key] = found.get(key) or comment
    lines = (f"    {key:<20} {what}".rstrip() for key, what in found.items())
    return "\n".join(lines)


def options_first(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with options such as ``-m`` before the overrides, as Hydra wants them.

    Raises UserError for an unknown option or a choice that is no name, OverrideParseException for
    an argument that is neither an option nor KEY=VALUE.
    """
    parser = get_args_parser()
    parser.error = _refuse
    overrides = parser.parse_intermixed_args(arguments).overrides
    check_choices(overrides)
    options = [argument for argument in arguments if argument != "--"]
    for override in overrides:
        options.remove(override)
    return options + overrides


def check_choices(overrides: Sequence[str]) -> None:
    """Raise UserError unless each choice of a group is a name, list of names, dict or glob."""
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        name, value = override.key_or_group, override.value()
        if name not in GROUPS or override.is_delete():
            continue
        for choice in value.list if isinstance(value, ChoiceSweep) else [value]:
            names = choice if isinstance(choice, list) else [choice]
            if not all(isinstance(one, str | QuotedString | dict | Glob) for one in names):
                expected = f"{name}=NAME, a file of configs/{name}"
                raise UserError(f"{override.input_line}; expected {expected}")


def _refuse(message: str) -> NoReturn:
    raise UserError(f"{message}; python train.py --help shows what may be given")
