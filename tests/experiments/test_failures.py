"""Which of several failing processes tells, and what: processes stood for by threads."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from experiments import failures
from experiments.errors import UserError
from experiments.failures import Failures, ToldElsewhere

LOST = RuntimeError("[third_party/gloo/pair.cc:1] Connection closed by peer")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, seconds in (("GRACE", 0.3), ("AHEAD", 0.2), ("AGAIN", 0.01)):
        monkeypatch.setattr(failures, name, seconds)


def lines(errors: dict[int, Exception], size: int) -> dict[int, str]:
    """What each failing rank tells, of those that tell at all."""
    store = dist.HashStore()
    found = {}

    def fail(rank: int) -> None:
        try:
            found[rank] = Failures(lambda: store, rank, size, 9.0).line(errors[rank])
        except ToldElsewhere as elsewhere:
            assert elsewhere.code == 1

    with ThreadPoolExecutor(size) as pool:
        list(pool.map(fail, errors))
    return found


def test_a_mistake_of_all_is_told_once():
    assert lines(dict.fromkeys(range(3), UserError("sizes=[9]")), 3) == {0: "sizes=[9]"}


def test_a_mistake_of_one_is_told_with_its_rank():
    assert lines({0: LOST, 1: UserError("no data"), 2: LOST}, 3) == {0: "rank 1: no data"}


@pytest.mark.parametrize(("missing", "teller"), [(0, 1), (1, 0), (2, 0)])
def test_a_process_that_is_lost_is_named(missing, teller):
    found = lines({rank: LOST for rank in range(3) if rank != missing}, 3)
    assert found == {teller: f"lost touch with rank {missing}: dead, or without an answer for 9 s; "
                             "expected all to be at work"}  # fmt: skip


def test_all_have_lost_touch():
    assert lines({0: LOST, 1: LOST}, 2) == {
        0: "the processes have lost touch with each other; is the network up?"}  # fmt: skip


def test_a_first_process_that_waits_in_vain_is_ended(monkeypatch, capfd):
    ended, codes = threading.Event(), []
    monkeypatch.setattr(failures.os, "_exit", lambda code: (codes.append(code), ended.set()))
    store = dist.HashStore()
    Failures(lambda: store, 0, 2, 9.0)  # at work, in a message perhaps
    with pytest.raises(ToldElsewhere):
        Failures(lambda: store, 1, 2, 9.0).line(UserError("no data"))
    assert ended.wait(5) and codes[0] == 1
    assert capfd.readouterr().err.count("error: rank 1: no data\n") == 1
