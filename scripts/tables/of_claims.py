"""The table of claims: what the paper says, the verdict, and what it rests on."""

from collections import Counter

from scripts.evidence.claims import CLAIMS
from scripts.evidence.judge import Verdict
from scripts.evidence.results import Results
from scripts.tables.table import Page, Table

RULES = (
    "Computed from rows and benchmarks. The rules of comparison (scripts/evidence/judge.py) stood "
    'before the runs; what counts for "most cases", memory and parameters became stricter after '
    "them, and the choice among devices, the one with the most runs, was made then. To match "
    "backpropagation, the one-sided 95 % bound of the difference has to lie below a margin; to be "
    "worse, the whole 95 % interval beyond it. An interval that straddles the margin is undecided; "
    "fewer than three seeds are not enough. Reproduced and contradicted speak of the paper's own "
    "setting alone. Differences: mean [two-sided 95 % interval], at most: the one-sided 95 % bound."
)


def claims(results: Results) -> Page:
    found = {text: claim.judge(results) for text, claim in CLAIMS.items()}
    counts = Counter(finding.verdict for finding in found.values())
    tally = ", ".join(f"{verdict} {counts[verdict]}" for verdict in Verdict if counts[verdict])
    lines = [
        {
            "claim": text,
            "in the paper": CLAIMS[text].where,
            "verdict": finding.verdict,
            "found": "<br>".join(finding.lines),
        }
        for text, finding in found.items()
    ]
    return Page("What is reproduced", [RULES, f"Of {len(found)} claims: {tally}."], [Table(lines)])
