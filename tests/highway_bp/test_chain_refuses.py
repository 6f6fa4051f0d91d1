"""What a ResidualChain and its methods refuse, and what they say."""

import math

import pytest
import torch

import highway_bp as hb
from tests.highway_bp.test_chain import chain, layers

# Of methods: what is expected, values that are not in range, and values of another type.
ITERATED = (hb.Highway, hb.FixedPoint)
SETTINGS = {
    "k": (ITERATED, "a whole number, at least 0", [-1], [1.5, True, "2", None]),
    "group_size": (ITERATED, "a whole number, at least 1", [0, -2], [1.5]),
    "gamma": (hb.Highway, "a number from 0 to 1, or 'auto'", [2.0, -0.1, math.nan], ["a", True]),
    "tolerance": (hb.Highway, "a number between 0 and 1", [0, 1], [True]),
    "cycles": (hb.MGRIT, "a whole number, at least 0", [-1], [1.5]),
    "coarsening": (hb.MGRIT, "a whole number, at least 2", [1], [None]),
    "levels": (hb.MGRIT, "a whole number, at least 1", [0], [True]),
    "relaxation": (hb.MGRIT, "one of F, FCF", ["FC", None], []),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_a_method_cannot_have(name):
    makers, expected, values, of_another_type = SETTINGS[name]
    for make in makers if isinstance(makers, tuple) else [makers]:
        needed = {} if make is hb.MGRIT else {"k": 1}
        for error, wrong in ((ValueError, values), (TypeError, of_another_type)):
            for value in wrong:
                with pytest.raises(error) as told:
                    make(**{**needed, name: value})
                assert str(told.value) == f"{name}={value!r}; expected {expected}"


@pytest.mark.parametrize("made", [torch.view_as_complex, torch.nested.as_nested_tensor])
def test_complex_and_nested_states_are_refused(made):
    x = made(torch.ones(3, 4, 2)).requires_grad_()
    with pytest.raises(TypeError, match="input state is complex or nested"):
        chain()(x)


def test_unknown_method():
    with pytest.raises(TypeError, match="method"):
        hb.ResidualChain(layers(), "highway")
    model = chain()
    with pytest.raises(TypeError, match="method"):
        model.method = 3
    with pytest.raises(TypeError, match="method"):
        hb.set_method(model, hb.Highway)
