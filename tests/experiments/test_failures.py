"""Which of several failing processes tells, and what: processes stood for by threads."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from experiments import failures
from experiments.errors import UserError
from experiments.failures import Failures, ToldElsewhere

LOST = RuntimeError("[third_party/gloo/pair.cc:1] Connection closed by peer")
LATE = RuntimeError("[third_party/gloo/buffer.cc:1] Timed out waiting 9000ms for recv operation")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, seconds in (("GRACE", 0.3), ("AHEAD", 0.2), ("AGAIN", 0.01)):
        monkeypatch.setattr(failures, name, seconds)


def lines(errors: dict[int, Exception], size: int, waiting: Sequence[int] = ()) -> dict[int, str]:
    """What each failing rank tells, of those that tell at all."""
    store = dist.HashStore()
    found = {}
    for rank in waiting:
        Failures(lambda: store, rank, size, 9.0)

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
    assert found == {
        teller: f"lost touch with rank {missing}, which has died; expected all to be at work"
    }
    found = lines({rank: LATE for rank in range(3) if rank != missing}, 3)
    assert found == {
        teller: f"lost touch with rank {missing}, which has not answered for 9 s; "
        "expected all to be at work"
    }


def test_one_that_waits_for_another_is_not_taken_for_dead():
    assert lines({0: LOST, 1: LOST}, 4, waiting=[2]) == {
        0: "lost touch with rank 3, which has died; expected all to be at work"
    }


def test_one_whose_program_hangs_is_named():
    assert lines({0: LATE, 1: LATE}, 3, waiting=[2]) == {
        0: "lost touch with rank 2, which has not answered for 9 s; expected all to be at work"
    }


def test_all_have_lost_touch():
    assert lines({0: LOST, 1: LOST}, 2) == {
        0: "the processes have lost touch with each other; is the network up?"
    }


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("no data"), "rank 1: no data"),
        (LOST, "lost touch with rank 2, which has died; expected all to be at work"),
    ],
)
def test_a_first_process_that_waits_in_vain_is_ended(monkeypatch, capfd, error, line):
    ended, codes = threading.Event(), []
    monkeypatch.setattr(failures.os, "_exit", lambda code: (codes.append(code), ended.set()))
    store = dist.HashStore()
    Failures(lambda: store, 0, 3, 9.0)  # at work, in a message perhaps
    with pytest.raises(ToldElsewhere):
        Failures(lambda: store, 1, 3, 9.0).line(error)
    assert ended.wait(5) and codes == [1]
    assert capfd.readouterr().err.count(f"error: {line}\n") == 1


def test_where_the_store_is_gone_a_process_tells_itself():
    class Gone:
        def check(self, keys):
            return False

        def set(self, key, value):
            raise dist.DistNetworkError("Broken pipe\nand a trace")

    line = Failures(Gone, 1, 2, 9.0).line(UserError("no data"))
    assert line == "rank 1: no data; and rank 0 or its machine is gone (Broken pipe)"
