"""Build one static page of everything: claims and verdicts, figures, tables, the rows behind them.

    python scripts/make_report.py results --out results/report.html

Run `make figures tables` first: their files are embedded, so the page stands alone. With Chromium
on the machine, a PDF of it is written beside.
"""

from __future__ import annotations

import argparse
import base64
import shutil
import subprocess
import sys
import tempfile
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
from scripts.evidence.claims import CLAIMS, VERDICTS
from scripts.evidence.every_source import key_of, run
from scripts.evidence.evidence import SLACK_TEXT, Evidence, read_evidence
from scripts.evidence.paper import paper_rows
from scripts.evidence.rows import Row, devices_of, length, method_name, run_of

TEMPLATE = "report.html.j2"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CAPTIONS = {
    "figure2": "Figure 2: final score of the deep networks against k.",
    "figure3": "Figure 3: GPT-2's validation loss, against steps and against time.",
    "figure4": "Figure 4: final score of the recurrent networks against k.",
    "figure5": "Figure 5: loss of the three-layer GRU against time.",
    "figure6": "Figure 6: how near the gradient is to the exact one, at moments of training.",
    "time": "Beyond the paper: loss against wall-clock time for every network.",
}


def embedded(picture: Path) -> Markup:
    """A picture as an <img> that holds its own data: the vector form where there is one."""
    vector = picture.with_suffix(".svg")
    kind, file = ("svg+xml", vector) if vector.exists() else ("png", picture)
    data = base64.b64encode(file.read_bytes()).decode()
    return Markup('<img alt="{}" src="data:image/{};base64,{}">').format(picture.stem, kind, data)


def table(page: Path) -> Markup:
    """A Markdown page as HTML, its headings two levels lower."""
    html = MarkdownIt("commonmark").enable("table").render(page.read_text())
    return Markup(
        html.replace("<h2>", "<h4>")
        .replace("</h2>", "</h4>")
        .replace("<h1>", "<h4>")
        .replace("</h1>", "</h4>")
    )


def rows_behind(rows: dict[str, list[Row]]) -> list[str]:
    """A line per experiment: how many rows, of which commits, on which devices."""
    lines = []
    for key, used in rows.items():
        commits = sorted({row["commit"][:7] + ("*" if row["dirty"] else "") for row in used})
        runs = {run_of(row) for row in used}
        lines.append(
            f"{key}.jsonl, {len(runs)} rows, commit {', '.join(commits)}, {devices_of(used)}"
        )
    return lines


def judged(evidence: Evidence) -> list[dict]:
    """Every claim with its finding."""
    found = []
    for claim in CLAIMS:
        finding = claim.judge(evidence)
        found.append({"claim": claim, "finding": finding, "rows": rows_behind(finding.rows)})
    return found


def experiments(evidence: Evidence, results: Path) -> list[dict]:
    """Every experiment of the paper and beyond: what was run, its pictures and tables."""
    titles = {key: row.title for key, row in paper_rows().items()}
    keys = list(dict.fromkeys([*titles, *map(key_of, evidence.results.setups)]))
    return [
        {
            "key": key,
            "title": titles.get(key, f"{key}, beyond the paper"),
            "runs": runs_of(list(evidence.results.of(key).values())),
            "pictures": [embedded(p) for p in sorted((results / "figures").glob(f"{key}.*png"))],
            "tables": [table(t) for t in sorted((results / "tables").glob(f"{key}.*md"))],
        }
        for key in keys
    ]


def runs_of(setups: list[list[Row]]) -> list[str]:
    """What was run, a line per setup."""
    lines = []
    for rows in setups:
        methods = ", ".join(dict.fromkeys(method_name(row) for row in rows))
        lines.append(f"{rows[0]['model']} on {rows[0]['data']}, {length(rows[0])}: {methods}")
    return lines


def page(claims: list[dict], evidence: Evidence, results: Path) -> str:
    figures, tables = results / "figures", results / "tables"
    papers = {f"table{n}" for n in (2, 3, 6)}
    keys = set(map(key_of, evidence.results.setups)) | set(paper_rows())
    template = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template(TEMPLATE)
    return template.render(
        claims=claims,
        counts={v: sum(c["finding"].verdict == v for c in claims) for v in VERDICTS},
        left_out=evidence.results.left_out,
        slack=SLACK_TEXT,
        made=environment(torch.device("cpu")),
        figures=[
            {"picture": embedded(figures / f"{name}.png"), "caption": caption}
            for name, caption in CAPTIONS.items()
            if (figures / f"{name}.png").exists()
        ],
        tables=[
            table(tables / f"{name}.md")
            for name in sorted(papers)
            if (tables / f"{name}.md").exists()
        ],
        experiments=experiments(evidence, results),
        others=[
            table(t)
            for t in sorted(tables.glob("*.md"))
            if t.stem.split(".")[0] not in keys | papers
        ],
    )


def print_pdf(html: Path) -> Path | None:
    """The page as PDF beside it, by the first browser of BROWSERS there is; None without one.

    Raises:
        UserError: the browser wrote nothing; its last words are told.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        return None
    pdf = html.with_suffix(".pdf")
    pdf.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [
                browser,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                f"--user-data-dir={profile}",
                "--no-pdf-header-footer",
                f"--print-to-pdf={pdf}",
                html.resolve().as_uri(),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
    if not pdf.exists():
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"{html} is written, but {browser} made no PDF of it: {last}")
    return pdf


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="folder with NAME.jsonl, figures and tables")
    parser.add_argument("--out", type=Path, help="the page (default: RESULTS/report.html)")
    args = parser.parse_args(argv)
    out = args.out or args.results / "report.html"
    evidence = read_evidence(args.results)
    claims = judged(evidence)
    write_text(out, page(claims, evidence, args.results))
    print(out)
    for found in claims:
        print(f"{found['finding'].verdict:18} {found['claim'].text}")
    print(print_pdf(out) or f"no PDF: none of {', '.join(BROWSERS)} on this machine")
    if evidence.results.left_out:
        raise UserError(f"left out {', '.join(evidence.results.left_out)}; the page says so")


if __name__ == "__main__":
    run(main)
