"""Everything public has a docstring, and the examples in docstrings run."""

import doctest

import pytest
import torch
from torch import nn

import highway_bp as hb

PUBLIC = {"highway_bp": hb, "highway_bp.schedules": hb.schedules} | {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in (hb, hb.schedules)
    for name in module.__all__
}
EXAMPLES = [
    test
    for name, thing in PUBLIC.items()
    for test in doctest.DocTestFinder(recurse=False).find(thing, name)
    if test.examples
]


@pytest.mark.parametrize("test", EXAMPLES, ids=lambda test: test.name)
def test_an_example_runs(test):
    test.globs = {"hb": hb, "torch": torch, "nn": nn}
    report: list[str] = []
    doctest.DocTestRunner().run(test, out=report.append)
    assert not report, "".join(report)


def test_there_are_examples():
    assert {"highway_bp.ResidualChain", "highway_bp.GRU", "highway_bp.convert"} <= {
        test.name for test in EXAMPLES
    }


@pytest.mark.parametrize("name", PUBLIC)
def test_has_a_docstring(name):
    assert PUBLIC[name].__doc__
