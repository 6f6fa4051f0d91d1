"""Writing into what layers return: refused where a gradient or a second run would be wrong."""

import pytest
import torch

from tests.highway_bp.converted import (
    Shows,
    assert_refused,
    assert_same,
    backward,
    both_methods,
    looping,
)

# -- memory that outputs share --------------------------------------------------------------------


class WithView(Shows):
    def forward(self, h):
        out = super().forward(h)
        return out, out[:, 0]


class MaySkip(Shows):
    skips = False

    def forward(self, h):
        return h if self.skips else super().forward(h)


def doubles_views(blocks, h):
    for block in blocks:
        h, first = block(h)
        first.mul_(2)
    return h


def reads_views_after(blocks, h):
    total = 0.0
    for block in blocks:
        h, first = block(h)
        h += 1
        total = total + first.sum()
    return h + total


def writes_into_a_skipped_state(blocks, h):
    states = []
    for i, block in enumerate(blocks):
        block.skips = i == 2
        h = block(h)
        h = h.add_(1) if block.skips else h
        states.append(h)
    return sum(states)


@pytest.mark.parametrize(
    ("layer", "loop"),
    [(WithView, doubles_views), (WithView, reads_views_after)],
)
def test_writing_into_shared_memory_is_refused(layer, loop):
    assert_refused(looping(layer, loop), "returned tensors that share memory")


@both_methods
def test_a_skipped_layer_returns_its_input_itself(method):
    with pytest.warns(UserWarning, match="a new chain begins there"):
        assert_same(backward, looping(MaySkip, writes_into_a_skipped_state), method)


# -- a second run ---------------------------------------------------------------------------------


def with_seen(model):
    loss = model()
    (loss + sum(block.seen.square().sum() for block in model.blocks)).backward()


def test_a_second_run_where_the_state_was_changed_is_refused():
    def loop(blocks, h):
        for block in blocks:
            h = block(h)
            with torch.no_grad():
                h.clamp_(-2, 2)
        return h

    assert_refused(looping(Shows, loop), "what it returned was changed in place since", with_seen)
