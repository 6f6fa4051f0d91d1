"""Build one static page of everything: claims and verdicts, figures, tables, the rows behind them.

    python scripts/make_report.py results --out results/report.html

Run `make figures tables` first: their files are embedded, so the page stands alone.
"""

from __future__ import annotations

import argparse
import base64
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from jinja2 import Environment, FileSystemLoader
from markdown_it import MarkdownIt
from markupsafe import Markup

from experiments.atomic import write_text
from experiments.errors import UserError
from experiments.provenance import environment
from experiments.row import command
from scripts.evidence.claims import CLAIMS, Claim
from scripts.evidence.hours import estimated, measured
from scripts.evidence.judge import Finding, Verdict
from scripts.evidence.paper import paper_rows
from scripts.evidence.results_io import Results, read_results, run
from scripts.evidence.rows import arm_of, name_of_run

TEMPLATE = "report.html.j2"
CAPTIONS = {
    "figure2": "Figure 2: final score of the deep networks against k.",
    "figure3": "Figure 3: GPT-2's evaluation loss during training.",
    "figure4": "Figure 4: final score of the recurrent networks against k.",
    "figure5": "Figure 5: loss of the three-layer GRU against time.",
    "figure6": "Figure 6: how near the gradient is to the exact one, at moments of training.",
    "time": "Beyond the paper: loss against time for every network.",
    "scaling": "Beyond the paper: layers on several devices.",
    "schedules": "Beyond the paper: what changing k during training reaches.",
}


def judged(results: Results) -> list[dict]:
    """Every claim with its finding, the rows behind it and what makes them."""
    return [_shown(results, claim, claim.judge(results)) for claim in CLAIMS]


def _shown(results: Results, claim: Claim, finding: Finding) -> dict:
    commands = [claim.command] if claim.command else []
    commands += [paper_rows()[key].command for key in claim.keys]
    hours = [measured(finding.rows)] if finding.rows else []
    if len(claim.keys) == 1 and not finding.full:
        hours.append(estimated(results, paper_rows()[claim.keys[0]]))
    return {
        "text": claim.text,
        "where": claim.where,
        "verdict": finding.verdict.value,
        "lines": finding.lines,
        "commands": list(dict.fromkeys(commands)),
        "hours": "; ".join(filter(None, hours)),
        "rows": [
            f"{arm_of(row)}, {name_of_run(row)}, commit {row['commit'][:10]}: {command(row)}"
            for row in finding.rows
        ],
    }


def embedded(picture: Path) -> Markup:
    """A picture as an <img> that holds its own data: the vector form where there is one."""
    vector = picture.with_suffix(".svg")
    kind, file = ("svg+xml", vector) if vector.exists() else ("png", picture)
    data = base64.b64encode(file.read_bytes()).decode()
    return Markup('<img alt="{}" src="data:image/{};base64,{}">').format(picture.stem, kind, data)


def in_html(page: Path) -> Markup:
    """A Markdown page, its headings two levels lower."""
    html = MarkdownIt("commonmark").enable("table").render(page.read_text())
    for level in ("h2", "h1"):
        html = html.replace(f"<{level}>", "<h4>").replace(f"</{level}>", "</h4>")
    return Markup(html)


def page(claims: list[dict], results: Results) -> str:
    figures, tables = results.folder / "figures", results.folder / "tables"
    papers = [f"table{n}" for n in (2, 3, 6)]
    own = sorted(p.stem for p in tables.glob("*.md") if p.stem not in papers)
    template = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template(TEMPLATE)
    return template.render(
        claims=claims,
        counts={v.value: sum(c["verdict"] == v for c in claims) for v in Verdict},
        left_out=results.left_out,
        made=environment(torch.device("cpu")),
        figures=[
            {"picture": embedded(figures / f"{name}.png"), "caption": text}
            for name, text in CAPTIONS.items()
            if (figures / f"{name}.png").exists()
        ],
        tables=[in_html(tables / f"{n}.md") for n in papers if (tables / f"{n}.md").exists()],
        others={name: in_html(tables / f"{name}.md") for name in own},
    )


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="folder with KEY.jsonl, figures and tables")
    parser.add_argument("--out", type=Path, help="the page (default: RESULTS/report.html)")
    args = parser.parse_args(argv)
    out = args.out or args.results / "report.html"
    results = read_results(args.results)
    claims = judged(results)
    write_text(out, page(claims, results))
    print(out)
    for claim in claims:
        print(f"{claim['verdict']:30} {claim['text']}")
    if results.left_out:
        raise UserError("some rows were left out; the page says which")


if __name__ == "__main__":
    run(main)
