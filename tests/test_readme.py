"""README: its blocks run as they stand, its links lead somewhere, its numbers are the rows'."""

import multiprocessing
import os
import re
from collections import Counter
from functools import cache
from pathlib import Path
from statistics import mean

import pytest
import torch

import highway_bp as hb
from scripts.evidence.claims import CLAIMS
from scripts.evidence.judge import Outcome, Verdict, difference, matches
from scripts.evidence.results import Results, read_results
from scripts.evidence.rows import Arm, score
from scripts.evidence.settings import Setting, error_score
from tests.train_cli import ROOT, into_file

pytestmark = pytest.mark.slow

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "results/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]


def printed_by(code: str, folder: Path) -> str:
    """What the code prints in a process of its own, which has its imports done: see conftest.py."""
    output = folder / "printed"
    processes = multiprocessing.get_context("forkserver")
    process = processes.Process(target=_run, args=(code, folder, output))
    process.start()
    process.join(300)
    assert process.exitcode == 0, output.read_text()
    return output.read_text()


def _run(code: str, folder: Path, output: Path) -> None:
    into_file(output)
    os.chdir(folder)
    torch.set_num_threads(1)
    exec(code, {"__name__": "__main__"})


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_a_block_runs(code, tmp_path):
    printed = printed_by(code, tmp_path)
    assert ("On this device: " in printed) == ("hb.advise" in code)


def test_it_is_short():
    assert len(README.splitlines()) <= 130 and len(BLOCKS) == 2


PRELUDE = """
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import highway_bp as hb

config = GPT2Config(vocab_size=50, n_embd=32, n_layer=3, n_head=2, n_positions=12)
model = GPT2LMHeadModel(config)
batch = {"input_ids": (x := torch.arange(48).view(4, 12)), "labels": x}
"""
SETTINGS = {  # what the blocks of a page suppose
    "method": "import torch\nimport highway_bp as hb\n",
    "choosing_k": PRELUDE
    + "hb.convert(model, hb.Highway(1))\nsteps, batches = 2, [batch] * 2\n"
    + "from functools import partial\nhb.advise = partial(hb.advise, seconds=1)\n"  # not 40
    + "loss_fn = lambda model: model(**batch).loss\n",
    "your_model": PRELUDE
    + "arguments = TrainingArguments('.', max_steps=2, report_to='none', use_cpu=True)\n"
    + "data = [{'input_ids': x[0], 'labels': x[0]}] * 8\n",
}


@pytest.mark.parametrize("page", SETTINGS)
def test_the_blocks_of_a_page_run(page, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / f"{page}.md").read_text(), re.S)
    assert blocks
    printed_by("\n".join([SETTINGS[page], *blocks]), tmp_path)


def test_the_version_is_in_the_changelog():
    assert f"## [{hb.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {hb.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_docs_are_five_pages_of_800_lines():
    pages = [page.read_text().splitlines() for page in (ROOT / "docs").glob("*.md")]
    assert len(pages) == 5 and sum(map(len, pages)) <= 800


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target, heading in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", page.read_text()):
        assert (page.parent / target).exists(), target
        if heading:
            assert heading in anchors(page.parent / target if target else page), heading


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives the page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}


@cache
def results() -> Results:
    return read_results(ROOT / "results")


def setting_on(device: str, key: str) -> Setting:
    return next(s for s in results().settings[key] if s.device == device)


def test_the_table_of_the_pixels_is_that_of_the_rows():
    text = README.replace("\n", " ")
    setting, on_cpus = (setting_on(device, "gru_pixels") for device in ("one GPU", "CPU"))
    arms = [setting.arm("bp"), *(setting.arm("highway", k) for k in (0, 1, 3, 5, 10))]
    arms += [setting.arm("fixed_point", k) for k in (5, 10)]
    assert setting.full and all(len(rows) == 3 for rows in arms)
    assert "three seeds on one H200" in text
    cells = " | ".join(f"{mean(map(score, rows)):.1f}" for rows in arms)
    assert f"| test accuracy, % | {cells} |" in README
    points, losses = zip(*map(at_most, (on_cpus, setting)), strict=True)
    assert f"on CPUs (five seeds) it is at most {points[0]:.1f} points and {losses[0]:.4f}" in text
    assert f"margins {setting.margin} and {setting.paper.margin_loss})" in text
    assert f"on the H200 {points[1]:.1f} points, its loss undecided." in text
    assert losses[1] > setting.paper.margin_loss
    ours = on_cpus.arm("highway", 10)
    assert len(ours) == len(on_cpus.arm("bp")) == 5
    assert matches(on_cpus, ours).outcome is Outcome.HOLDS
    seconds = results().record("steps_gru_cifar10_pixels.cuda")
    assert seconds["environment"]["commit"].startswith("cb18e62")
    names = ("bp", "k0", "k1", "k3", "k5", "k10", "fp5", "fp10")
    cells = " | ".join(f"{1000 * seconds['seconds'][name]:.1f}" for name in names)
    apart = max((b - a) / seconds["seconds"][n] for n, (a, b) in seconds["spread"].items())
    head = (
        f"step, ms, at cb18e62, no CUDA graphs (BP: cuDNN); medians of 9 within {100 * apart:.0f} %"
    )
    assert f"| {head} | {cells} |" in README


def at_most(setting: Setting) -> list[float]:
    """How much worse k = 10 is than BP at most, in points and in loss: one-sided bounds."""
    arms = setting.arm("highway", 10), setting.arm("bp"), setting.paper.paired
    values = error_score, lambda row: row["eval_loss"]
    return [difference(*arms, value).at_most for value in values]


REDUCED = [  # experiment, device, gamma, digits, name
    ("resnet32", "CPU", None, 1, "ResNet-32, 20 epochs, accuracy in %, CPU"),
    ("resnet32", "one GPU", None, 1, "the same, H200"),
    ("resnet110", "CPU", None, 1, "ResNet-110, 5 epochs, accuracy in %, CPU"),
    ("roberta", "CPU", 0.8, 1, "MiniLM, gamma = 0.8, accuracy in %, CPU"),
    ("gpt2", "one GPU", 0.2, 1, "narrow GPT-2, gamma = 0.2, perplexity, H200"),
    ("gru_words", "one GPU", None, 1, "three-layer GRU, byte pairs, perplexity, H200"),
    ("gru_chars", "CPU", None, 3, "GRU, bits per character, CPU"),
    ("lstm_chars", "CPU", None, 3, "LSTM, bits per character, CPU"),
]


@pytest.mark.parametrize(("key", "device", "gamma", "digits", "name"), REDUCED)
def test_a_row_of_the_reduced_settings_is_that_of_the_runs(key, device, gamma, digits, name):
    setting = setting_on(device, key)
    arms = [setting.arm("bp"), *(setting.arm("highway", k, gamma) for k in range(4))]
    cells = [f"{mean(map(score, rows)):.{digits}f}" if rows else "-" for rows in arms]
    seeds = [
        f"k = {k}: {n}" for k, n in enumerate(map(len, arms[1:])) if n not in (0, len(arms[0]))
    ]
    row = " | ".join([name, *cells, "; ".join([str(len(arms[0])), *seeds])])
    assert f"| {row} |" in README


def test_k_3_matches_backpropagation_where_it_is_said():
    matching = []
    for key, device, gamma, *_ in REDUCED:
        setting = setting_on(device, key)
        ours = setting.arm("highway", 3, gamma)
        if ours and matches(setting, ours).outcome is Outcome.HOLDS:
            matching.append(key)
    assert matching == ["resnet32", "gru_words", "lstm_chars"]
    text = README.replace("\n", " ")
    assert (
        "k = 3 matches BP with ResNet-32, the LSTM and the three-layer GRU; with the GRU on" in text
    )
    fixed_point = mean(map(score, setting_on("CPU", "lstm_chars").arm("fixed_point", 1)))
    assert f"The LSTM's fixed point has {fixed_point:.3f} at k = 1." in text


def test_the_scores_of_transformers_are_those_of_the_rows():
    page = (ROOT / "docs" / "choosing_k.md").read_text().replace("\n", " ")
    setting = setting_on("one GPU", "gpt2")

    def shown(grad, *which):
        return f"{mean(map(score, setting.arm(grad, *which))):.1f}"

    plain = [shown("highway", k, 0.0) for k in (1, 3)]
    mended = [shown("highway", k, 0.2) for k in (1, 3)]
    bp = shown("bp")
    assert f"perplexity {bp} by backpropagation" in page
    assert f"with `gamma=0` {plain[0]} at k = 1 and {plain[1]} at k = 3" in page
    assert f"remedy, {' and '.join(mended)}" in page
    arms = ("highway", 1, 0.0), ("highway", 1, 0.8)
    ends = [
        f"{mean(map(score, setting_on(device, 'roberta').arm(*arm))):.1f}"
        for arm in arms
        for device in ("CPU", "one GPU")
    ]
    assert "ends at {} and {} %, with gamma = 0.8 at {} and {} (one".format(*ends) in page
    expected = f"With gamma = 0, GPT-2 has {plain[0]} (k = 1) and {plain[1]} (k = 3)."
    assert f"{expected} MiniLM has {ends[3]} on the H200." in README.replace("\n", " ")


def test_the_differences_of_the_characters_are_those_of_the_rows():
    page = (ROOT / "docs" / "choosing_k.md").read_text().replace("\n", " ")
    setting = results().settings["gru_chars"][0]
    assert f"{setting.device}; paired" in page and setting.paper.paired
    for text, k, of in (
        ("at k = 0 less backpropagation", 0, ("bp",)),
        ("at k = 1 less backpropagation", 1, ("bp",)),
        ("at k = 1 less the fixed point at k = 1", 1, ("fixed_point", 1)),
    ):
        found = difference(setting.arm("highway", k), setting.arm(*of), paired=True)
        assert f"{text} {found}" in page
    by_name = {}
    for arm, rows in setting.arms.items():
        if arm.schedule:
            assert len(rows) == 3
            by_name[arm.schedule.split()[0]] = difference(rows, setting.arm("bp"), paired=True)
    assert f"{by_name['milestones']}, adaptive {by_name['adaptive']}" in page


def test_the_carries_of_the_lstm_are_compared_as_in_the_rows():
    setting = setting_on("CPU", "lstm_chars")
    literal = [Arm("highway", k, 0.0, 1, carry="literal") for k in (0, 1)]
    arms = [*(setting.arm("highway", k) for k in (0, 1)), *(setting.arms[arm] for arm in literal)]
    gate_0, gate_1, literal_0, literal_1 = (f"{mean(map(score, rows)):.3f}" for rows in arms)
    text = (
        f"`gate` ends at {gate_0} and {gate_1} bits (k = 0, 1; five seeds), `literal` at "
        f"{literal_0}, as the fixed point, and {literal_1} (three)"
    )
    assert [len(rows) for rows in arms] == [5, 5, 3, 3]
    assert text in (ROOT / "docs" / "method.md").read_text().replace("\n", " ")


def test_the_times_of_the_method_page_are_those_of_the_benchmarks():
    page = (ROOT / "docs" / "method.md").read_text().replace("\n", " ")
    grid = results().record("bench_rnn")["grid"]
    narrow = [run for run in grid if run["shape"].endswith(("hidden 32", "hidden 64"))]
    at_k0 = [run["speedup"]["k0"] for run in narrow if "L 1024" in run["shape"]]
    assert len(at_k0) == 6
    cuda = results().record("bench_rnn_cuda")["paper"]
    faster = {run["row"]: [f"{run['speedup'][name]:.2f}" for name in ("k0", "k5")] for run in cuda}
    k0, k5 = faster["gru_pixels"]
    assert f"{k0} at k = 0 and {k5} at k = 5 with L = 1024" in page
    assert f"{' and '.join(faster['gru_chars'])} with L = 256" in page
    assert f"on the H200 {' and '.join(faster['lstm_chars'])}" in page
    expected = f"{min(at_k0):.2f} to {max(at_k0):.2f} times as fast as `nn.GRU`"
    assert expected in page
    trunk = results().record("bench_trunk")["ratios"]
    names = ("converted_bp", "k0", "k1", "k3")
    bp, k0, k1, k3 = (f"{trunk[f'{name}_over_plain']:.2f}" for name in names)
    assert f"a converted model takes {bp} of the untouched model's step" in page
    assert f"{k0} at `k = 0`, {k1} at `k = 1`, {k3} at `k = 3`" in page


@pytest.mark.parametrize(
    ("experiment", "device", "label"),
    [
        ("gru_chars", "CPU", "GRU, characters, L = 256, five seeds"),
        ("gru_words", "one GPU", "three-layer GRU, byte pairs, L = 256, three seeds"),
        ("lstm_chars", "CPU", "LSTM, characters, L = 256, five seeds"),
        ("gru_pixels", "one GPU", "GRU, pixels, L = 1024, one loss at the end, three seeds, H200"),
    ],
)
def test_the_errors_at_the_end_of_training_are_those_of_the_rows(experiment, device, label):
    runs = setting_on(device, experiment).with_moments
    last = [row["curve"]["gradient_error"][-1] for row in runs]
    assert all(moment["k"] == [0, 1, 2, 3, 5] for moment in last)
    means = map(mean, zip(*(moment["relative_error"] for moment in last), strict=True))
    cells = " | ".join(f"{e:.2f}" if e >= 0.1 else f"{e:.3f}" for e in means)
    assert f"| {label} | {cells} |" in (ROOT / "docs" / "method.md").read_text()


def test_the_times_are_those_of_the_benchmarks():
    record = results().record
    plain, graph = (record(f"steps_resnet32_cifar10.{kind}") for kind in ("cuda", "cuda_graph"))
    page = (ROOT / "docs" / "reproduce.md").read_text().replace("\n", " ")
    for name, method in (("bp", "backpropagation"), ("k3", "k = 3")):
        with_graph, without = (1000 * steps["seconds"][name] for steps in (graph, plain))
        assert f" {with_graph:.1f} " in page and f"instead of {without:.1f} ({method})" in page
    ratio = record("bench_trunk")["ratios"]["k1_over_plain"]
    assert f"{ratio:.2f} times the time of a plain" in README
    of_rows = {run["row"]: run["speedup"] for run in record("bench_rnn_cuda")["paper"]}
    pixels, small = of_rows["gru_pixels"], record("bench_rnn")["small"][0]["speedup"]
    assert f"{pixels['k0']:.2f} (k = 0) and {pixels['k5']:.2f} times" in README
    expected = f"{small['k0']:.1f} and {small['k5']:.1f} times as fast as `nn.GRU`"
    assert expected in README.replace("\n", " ")


def test_the_tally_of_claims_is_the_reports():
    found = Counter(claim.judge(results()).verdict for claim in CLAIMS.values())
    tally = ", ".join(f"{verdict} {n}" for verdict in Verdict if (n := found[verdict]))
    assert f"Of {len(CLAIMS)} claims of the paper: {tally}." in README.replace("\n", " ")
