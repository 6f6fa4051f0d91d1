"""`hb.convert` on every model class of transformers that a tiny configuration can build, and on the
smallest model of each architecture of timm.

With k = L, outputs and gradients have to be those of the untouched model. every_*.json have the
outcomes for the pinned versions: the lengths of a model's chains, or what is the matter. They are
written anew, in half an hour, by

    python -m tests.peers.test_every_model transformers      # or for some: ... GPT2Model T5Model
"""

import json
import multiprocessing
import sys
import warnings
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import highway_bp as hb
from tests.highway_bp.converted import relative_error
from tests.peers import timm_models, tiny_models

LIBRARIES = {"transformers": tiny_models, "timm": timm_models}
ROOT = Path(__file__).parents[2]
SECONDS = 120
UNTRIED = ("no tiny model", "no batch", "slow")
ASKED = {  # by what a loss is on
    "outputs": {},
    "hidden states": {"output_hidden_states": True},
    "attention": {"output_attentions": True},
    "router": {"output_router_logits": True},
}
ROUNDING = 1e-5  # some classes compute a part in float32, many their attention weights


def value_and_gradients(model: nn.Module, batch: dict, asked: dict) -> list[Tensor | None]:
    """A loss on all that the model returns, then its gradients."""
    model.zero_grad()
    torch.manual_seed(1)
    generator, found = torch.Generator().manual_seed(2), list(_floating(model(**batch, **asked)))
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in found]
    loss = sum((t * w).sum() / len(w.flatten()) ** 0.5 for t, w in zip(found, weights, strict=True))
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def _floating(out: Any):
    if isinstance(out, Tensor) and out.is_floating_point() and out.requires_grad:
        yield out
    elif isinstance(out, dict | list | tuple):
        for inner in out.values() if isinstance(out, dict) else out:
            yield from _floating(inner)


def error(found: list[Tensor | None], exact: list[Tensor | None]) -> float:
    """Of the gradients; inf for another loss."""
    return relative_error(found[1:], exact[1:]) if found[0].equal(exact[0]) else float("inf")


def outcome(library: str, name: str) -> tuple[str, Any]:
    """One of "exact", "no chain", "refused", "wrong" or `UNTRIED`, and more about it."""
    of = LIBRARIES[library]
    try:
        untouched, model = of.build(name), of.build(name)
    except Exception as raised:
        return "no tiny model", _line(raised)
    batch, why = _batch_for(untouched, of.batches(untouched))
    if batch is None:
        return "no batch", why
    try:
        hb.convert(model, hb.Highway(99))
    except ValueError as raised:
        return "no chain", _line(raised)
    wrong = []
    for mode in ("eval", "train", "checkpointed"):
        for what, asked in ASKED.items() if mode == "eval" else [("outputs", {})]:
            try:
                exact = value_and_gradients(_set(untouched, mode), batch, asked)
            except Exception:  # the class cannot do that
                continue
            try:
                found = value_and_gradients(_set(model, mode), batch, asked)
            except Exception as raised:
                return "refused", f"{mode}, {what}: {_line(raised)}"
            if not error(found, exact) < ROUNDING:
                wrong.append(f"{mode}, {what}")
    lengths = [chain.length for chain in hb.chains(model)]
    exact = value_and_gradients(_set(model, "eval"), batch, {})
    hb.set_method(_set(model, "eval"), hb.Highway(0))
    changes = error(value_and_gradients(model, batch, {}), exact) > 1e-6
    return ("wrong", wrong) if wrong else ("exact" if changes else "no chain", lengths)


def _batch_for(model: nn.Module, batches: Iterable[dict]) -> tuple[dict | None, str]:
    """A batch with a finite gradient, the same when computed twice; else what is the matter."""
    why = ""
    for batch in batches:
        try:
            first, again = (value_and_gradients(_set(model, "eval"), batch, {}) for _ in range(2))
        except Exception as raised:
            why = why or _line(raised)
            continue
        if error(again, first) < 1e-12:
            return batch, ""
        why = "its gradient is not finite, or not the same twice"
    return None, why


def _set(model: nn.Module, mode: str) -> nn.Module:
    model.train().train(mode != "eval")  # training empties caches that hold a graph
    if hasattr(model, "set_grad_checkpointing"):  # timm's
        model.set_grad_checkpointing(mode == "checkpointed")
    elif mode == "checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    elif getattr(model, "is_gradient_checkpointing", False):
        model.gradient_checkpointing_disable()
    return model


def _line(raised: Exception) -> str:
    return " ".join(f"{type(raised).__name__}: {raised}".split())[:120]


def outcomes(library: str, names: Iterable[str]) -> dict[str, tuple[str, Any]]:
    """The outcomes of these models; a process that hangs is replaced."""
    found: dict[str, tuple[str, Any]] = {}
    context, worker = multiprocessing.get_context("fork"), None
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in names:
        worker = worker or context.Pool(1)
        try:
            found[name] = worker.apply_async(outcome, (library, name)).get(SECONDS)
        except multiprocessing.TimeoutError:
            found[name] = ("slow", SECONDS)
            worker.terminate()
            worker = None
    return found


def record(library: str) -> Path:
    return Path(__file__).parent / f"every_{library}.json"


RECORDS = {library: json.loads(record(library).read_text())["outcomes"] for library in LIBRARIES}
EXACT = {
    library: [name for name, (how, _) in found.items() if how == "exact"]
    for library, found in RECORDS.items()
}
TODAY = [*(("transformers", name) for name in EXACT["transformers"][1::40])]
TODAY += [("timm", name) for name in ("swin_tiny_patch4_window7_224", "pit_ti_224", "convit_tiny")]


def test_every_model_that_was_tried_is_exact_or_has_no_chain():
    readme, page = ((ROOT / file).read_text() for file in ("README.md", "docs/your_model.md"))
    tried = {
        library: [how for how, _ in found.values() if how not in UNTRIED]
        for library, found in RECORDS.items()
    }
    assert all(set(found) == {"exact", "no chain"} for found in tried.values())
    outcomes = (found.values() for found in RECORDS.values())
    chains = [[lengths for how, lengths in found if how == "exact"] for found in outcomes]
    several = [sum(max(lengths) > 1 for lengths in found) for found in chains]
    line = f"{several[0]} classes of transformers and {several[1]} architectures of timm"
    assert line in readme and line in page
    one = [len(found) - n for found, n in zip(chains, several, strict=True)]
    assert f"(and {one[0]} and {one[1]} with one)" in page
    without = [found.count("no chain") for found in tried.values()]
    untried = [len(RECORDS[library]) - len(found) for library, found in tried.items()]
    assert f"In {without[0]} and {without[1]} no list of layers is a chain" in page
    assert f"Not tried are {untried[0]} and {untried[1]}" in page


@pytest.mark.parametrize(("library", "name"), TODAY)
@pytest.mark.filterwarnings("ignore")
def test_the_recorded_outcome_is_that_of_today(library, name):
    """If not, and the library is another version, the outcomes have to be recorded anew."""
    assert outcome(library, name) == tuple(RECORDS[library][name])


def main(library: str, *names: str) -> None:
    known = RECORDS[library] if names else {}
    found = known | outcomes(library, names or LIBRARIES[library].names())
    lines = [f"{json.dumps(name)}: {json.dumps(found[name])}" for name in sorted(found)]
    head = f'{{"{library}": "{version(library)}", "outcomes": {{\n'
    record(library).write_text(head + ",\n".join(lines) + "\n}}\n")
    print(Counter(how for how, _ in found.values()))


if __name__ == "__main__":
    main(*sys.argv[1:])
