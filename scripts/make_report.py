"""Build one static page of everything: claims and verdicts, figures, tables, the rows behind them.

    python scripts/make_report.py results    # results/report.html

Run `make figures tables` first: the page embeds their files, so it needs no other file.
"""

import argparse
import base64
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from jinja2 import Environment, FileSystemLoader
from markdown_it import MarkdownIt
from markupsafe import Markup

from experiments.errors import UserError
from experiments.files import write_text
from experiments.provenance import environment
from experiments.row import command
from scripts.evidence.claim import Claim
from scripts.evidence.claims import CLAIMS
from scripts.evidence.judge import Finding, Verdict
from scripts.evidence.paper import PaperRow, paper_rows, preset_model
from scripts.evidence.results import Results, read_results
from scripts.evidence.rows import Row, arm_of, name_of_run
from scripts.program import run
from scripts.tables.of_claims import RULES

PAPERS = ("table2", "table3", "table6")
FIGURES = (*(f"figure{n}" for n in range(2, 7)), "time", "scaling", "schedules")


def hours_of(claim: Claim, found: Finding, results: Results) -> str:
    """Hours of the rows; where one experiment lacks runs in full, also the hours of such runs."""
    hours: dict[str, float] = {}  # of training alone, by device
    for row in found.rows:
        hours[row["device"]] = hours.get(row["device"], 0.0) + row["seconds"] / 3600
    parts = [", ".join(f"{value:.2g} h on {device}" for device, value in hours.items())]
    if len(claim.keys) == 1 and not found.full:
        parts.append(hours_in_full(paper_rows()[claim.keys[0]], results))
    return "; ".join(filter(None, parts))


def hours_in_full(paper: PaperRow, results: Results) -> str:
    """Hours of one run in the paper's own setting on one GPU: steps times seconds of a step."""
    for preset in paper.presets:
        record = results.record(f"steps_{preset}.cuda")
        if record and preset_model(preset) == preset_model(paper.preset):
            seconds = record["seconds"]
            bp = paper.steps * seconds["bp"] / 3600
            ours = fmean(s for arm, s in seconds.items() if arm.startswith("k")) / seconds["bp"]
            return (
                f"in full a run of backpropagation takes about {bp:.1g} h, one of Highway-BP "
                f"{ours:.1f} times as long, estimated from steps "
                f"on {record['environment']['device']}"
            )
    return "in full: hours not estimated"


def embedded(picture: Path) -> Markup:
    """A picture as an <img> with embedded data."""
    data = base64.b64encode(picture.read_bytes()).decode()
    return Markup('<img alt="{}" src="data:image/svg+xml;base64,{}">').format(picture.stem, data)


def in_html(page: Path) -> Markup:
    """A Markdown page as HTML, with all headings at one level."""
    html = MarkdownIt("commonmark").enable("table").render(page.read_text())
    return Markup(re.sub(r"(</?h)\d", r"\g<1>4", html))


def page(findings: dict[str, Finding], results: Results) -> str:
    figures, tables = results.folder / "figures", results.folder / "tables"
    files = (file for file in sorted(tables.glob("*.md")) if file.stem != "claims")  # in full here
    pages = {file.stem: in_html(file) for file in files}
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pictures = [figures / f"{name}.svg" for name in FIGURES]
    return templates.get_template("report.html.j2").render(
        claims=[(text, CLAIMS[text], found) for text, found in findings.items()],
        counts=Counter(found.verdict for found in findings.values()),
        verdicts=Verdict,
        rules=RULES,
        results=results,
        made=environment(torch.device("cpu")),
        figures=[embedded(picture) for picture in pictures if picture.exists()],
        tables=[pages.pop(name) for name in PAPERS if name in pages],
        others=pages,
        row_text=row_text,
        hours_of=hours_of,
    )


def row_text(row: Row) -> str:
    return f"{arm_of(row)}, {name_of_run(row)}, commit {row['commit'][:10]}: {command(row)}"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="folder with KEY.jsonl, figures and tables")
    args = parser.parse_args(argv)
    out = args.results / "report.html"
    results = read_results(args.results)
    findings = {text: claim.judge(results) for text, claim in CLAIMS.items()}
    write_text(out, page(findings, results))
    print(out)
    for text, found in findings.items():
        print(f"{found.verdict:30} {text}")
    if results.left_out:
        raise UserError("some rows were left out; the page lists them")


if __name__ == "__main__":
    run(main)
