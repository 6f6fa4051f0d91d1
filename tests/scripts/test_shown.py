"""Which rows stand for an experiment of the paper, and what is said of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.evidence.every_source import read_results
from scripts.evidence.paper import paper_rows
from scripts.evidence.shown import (
    Shown,
    in_full,
    is_complete,
    seeds_of,
    shown_rows,
    what_ran,
)
from tests.scripts.synthetic_runs import of_paper, row, write_rows

RESNET32 = paper_rows()["resnet32"]
BIG = {"steps": 900, "setup": "big", "config_hash": "big"}


def shown_of(folder: Path, key: str, rows: list[dict]) -> Shown:
    write_rows(folder / f"{key}.jsonl", rows)
    return shown_rows(read_results(folder))[key]


def test_the_paper_s_own_experiment_stands_before_fuller_stand_ins(tmp_path: Path) -> None:
    own = of_paper("resnet32", "bp")
    stand_in = of_paper("resnet32", "bp", data="digits", **BIG)
    shown = shown_of(tmp_path, "resnet32", [stand_in, own])
    assert (shown.name, shown.complete) == ("resnet32.2", True)
    assert shown.rows[0]["data"] == RESNET32.data


def test_else_the_fullest_setup_stands(tmp_path: Path) -> None:
    shown = shown_of(tmp_path, "resnet32", [row("bp", None), row("bp", None, **BIG)])
    assert (shown.name, shown.complete) == ("resnet32", False)
    assert shown.rows[0]["steps"] == 900


@pytest.mark.parametrize(
    "change",
    [
        {"schedule": "linear", "k": None},
        {"tolerance": 0.1},
        {"group_size": 4},
        {"grad": "truncated_bptt", "window": 4, "k": None},
    ],
)
def test_only_methods_of_the_paper_with_one_k_are_shown(tmp_path: Path, change: dict) -> None:
    other = row("highway", 3, config_hash="other") | change
    shown = shown_of(tmp_path, "resnet32", [row("bp", None), other])
    assert [r["grad"] for r in shown.rows] == ["bp"]
    assert not shown_of(tmp_path, "resnet32", [other]).rows


@pytest.mark.parametrize(
    ("change", "complete"),
    [
        ({}, True),
        ({"parameters": None}, True),
        ({"parameters": 487_000}, True),
        ({"parameters": 270_000}, False),
        ({"reduced": True}, False),
        ({"batch_size": 64}, False),
        ({"data": "digits"}, False),
        ({"experiment": None}, False),
        ({"validation": 5000}, False),
        ({"experiment": "resnet110_cifar10"}, False),
    ],
)
def test_what_is_the_paper_s_experiment_in_full(change: dict, complete: bool) -> None:
    found = of_paper("resnet32", "bp") | change
    assert is_complete(RESNET32, found) == in_full(found, "resnet32") == complete


def test_beyond_the_paper_full_length_is_in_full() -> None:
    assert in_full(row("bp", None, reduced=False), "resnet20")
    assert not in_full(row("bp", None), "resnet20")


def test_of_several_gammas_that_of_most_k_is_the_main_line() -> None:
    rows = [
        row("bp", None),
        row("highway", 0),
        row("highway", 1, gamma=0.2),
        row("highway", 0, gamma=0.2),
        row("highway", 0, gamma="auto"),
    ]
    shown = Shown(RESNET32, "resnet32", rows)
    assert shown.main() == [rows[0], rows[2], rows[3]]
    assert shown.gamma() == 0.2
    assert shown.of("highway", 0) == [rows[3]] and shown.of("highway", 5) == []


def test_what_ran_says_what_stands_in_how_long_and_what_is_missing() -> None:
    gru = paper_rows()["gru_chars"]
    rows = [row("highway", 0, seed, data="wikipedia-2015, Salesforce/wikitext") for seed in (0, 1)]
    assert what_ran(Shown(gru, "gru_chars", rows)) == [
        "stand-in: resnet20, 0.27M parameters, trained on wikipedia-2015",
        "reduced: 300 steps of 64, 2 seeds",
        "not yet run: BP, FP",
    ]
    whole = [of_paper("resnet32", "bp"), of_paper("resnet32", "highway", 3)]
    assert what_ran(Shown(RESNET32, "resnet32", whole)) == ["complete: 300 steps of 128, 1 seed"]
    assert what_ran(Shown(RESNET32, "resnet32", [])) == []


def test_a_smaller_batch_than_the_paper_s_is_reduced_too() -> None:
    rows = [of_paper("resnet32", "bp", batch_size=16)]
    assert what_ran(Shown(RESNET32, "resnet32", rows))[0] == "reduced: 300 steps of 16, 1 seed"


def test_seeds_are_counted_per_method_and_k() -> None:
    rows = [row("bp", None, seed) for seed in (0, 1, 2)]
    assert seeds_of(rows) == "3 seeds"
    assert seeds_of([*rows, row("highway", 1)]) == "1-3 seeds"
    assert seeds_of(rows[:1]) == "1 seed"
