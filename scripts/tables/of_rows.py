"""Tables of finished runs: the paper's Table 2, and a page per experiment, a table per setting."""

from collections.abc import Sequence
from statistics import fmean

from scripts.evidence.paper import PaperRow, paper_rows
from scripts.evidence.results import Results
from scripts.evidence.rows import METRICS, Arm, Row, devices_of, score
from scripts.evidence.settings import Setting
from scripts.tables.table import Page, Table, mean_and_interval, number

NOTE = (
    "Means over seeds, with the 95 % interval of the mean from three seeds on. Step: of all "
    "methods side by side on a quiet machine, without CUDA graphs. Passes: through all blocks of "
    "the chain, per step; in a row: those that wait for each other when every layer has its own "
    "device, in one recurrent layer."
)
SCORES_NOTE = "Ratios compare runs in full alone; a network that has not learned has no score."


def table2(results: Results) -> Page:
    devices = sorted({row["device"] for _, s in results.chosen if s for row in s.rows})
    sources = (f"{p.title}: {p.published['source']}" for p in paper_rows().values() if p.published)
    notes = [
        f"Paper: one A100-class GPU. Here: {', '.join(devices) or 'not run'}. Means over seeds, "
        "with the 95 % interval of the mean from three seeds on. A dash: the paper prints no "
        "value, or there is none to compare.",
        f"Where the paper's scores come from: {'. '.join(sources)}.",
    ]
    networks = Table([network(*chosen) for chosen in results.chosen], "Networks")
    scores = Table(
        [final_scores(*chosen) for chosen in results.chosen], "Final scores", SCORES_NOTE
    )
    return Page("Table 2: networks and final scores", notes, [networks, scores], latex=True)


def network(paper: PaperRow, setting: Setting | None) -> dict[str, str]:
    ours = setting.rows[0] if setting else None
    model, _, dataset = paper.title.rpartition(", ")
    return {
        "dataset": dataset,
        "model": model,
        "L, paper": str(paper.L),
        "L, here": str(ours["L"]) if ours else "not run",
        "parameters, paper": in_thousands(paper.parameters),
        "parameters, here": in_thousands(ours["parameters"]) if ours else "not run",
        "ratio": number(ours and ours["parameters"] / paper.parameters, 2),
        "losses in between": "yes" if paper.intermediate_losses else "no",
        "runs here": state(setting) if setting else paper.command,
    }


def in_thousands(n: int) -> str:
    """For instance 29.8k or 1.73M."""
    return f"{n / 1e6:.3g}M" if n >= 1e6 else f"{n / 1e3:.3g}k"


def state(setting: Setting) -> str:
    where = "in full" if setting.full else f"reduced: {setting.preset}"
    if not setting.arm("bp"):
        return f"{where}; no run of BP"
    return where if setting.learned else f"{where}; not learned"


def final_scores(paper: PaperRow, setting: Setting | None) -> dict[str, str]:
    """BP, and Highway-BP at the largest k that paper and rows share, else of one of them."""
    bp, papers = paper.published.get("bp"), paper.published.get("highway", {})
    ours = setting.ks("highway") if setting else []
    k = max(set(ours) & set(papers) or ours or papers, default=None)
    exact, highway = (setting.arm("bp"), setting.arm("highway", k)) if setting else ([], [])
    mean = fmean(map(score, highway)) if exact and highway and setting.full else None
    guess = exact and not setting.learned
    return {
        "experiment": paper.title,
        "score": METRICS[paper.metric].label,
        "BP, paper": "-" if bp is None else f"{bp:g}",
        "BP, here": "not learned" if guess else mean_and_interval(exact),
        "k": "-" if k is None else str(k),
        "Highway, paper": f"{papers[k]:g}" if k in papers else "-",
        "Highway, here": "not learned" if guess else mean_and_interval(highway),
        "ratio": number(mean / papers[k] if mean and k in papers else None, 2),
        "runs here": state(setting) if setting else "not run",
    }


def experiment(key: str, results: Results) -> Page | None:
    """The page of one experiment; None without runs."""
    settings = results.settings[key]
    tables = [of_setting(results, setting) for setting in settings]
    return Page(settings[0].paper.title, [NOTE], tables) if tables else None


def of_setting(results: Results, setting: Setting) -> Table:
    """A line per method; times relative to backpropagation's if both were measured."""
    seconds = results.step_seconds(setting)
    exact = next((s for arm, s in seconds.items() if arm.grad == "bp"), None)

    def line(arm: Arm, rows: list[Row]) -> dict[str, str]:
        step = seconds.get(arm)
        return {
            "method": setting.label(arm),
            "seeds": str(len(rows)),
            METRICS[setting.paper.metric].label: mean_and_interval(rows),
            "step, ms": number(step and 1000 * step, 1),
            "x BP": number(step and exact and step / exact, 2),
            "passes": number(per_step(rows, "block_passes"), 2),
            "in a row": number(per_step(rows, "sequential_passes"), 1),
        }

    row, where = setting.rows[0], "the paper's own setting" if setting.full else "reduced"
    about = f"{row['steps']} steps of {row['batch_size']}, {row['precision']}, on "
    lines = [line(arm, rows) for arm, rows in setting.arms.items()]
    return Table(lines, f"{setting}: {where}", about + devices_of(setting.rows))


def per_step(rows: Sequence[Row], name: str) -> float | None:
    known = [row[name] / row["steps"] for row in rows if row[name] is not None]
    return fmean(known) if known else None
