"""A layer that has to run once more does so as it was in its first run, or is refused."""

import random

import torch

from tests.highway_bp.converted import (
    Net,
    Shows,
    assert_refused,
    assert_same,
    asserts_same,
    made,
    rows,
    seen_in_loss,
)


def test_a_counter_changed_in_place_by_a_layer_that_has_to_run_again_is_refused():
    class Counts(Shows):
        def forward(self, h, count):
            count += 1
            return super().forward(h)

    class Counted(Net):
        def given(self):
            return (torch.zeros(()),)

        def more(self, count):
            assert count == 4
            return sum(block.seen.sum() for block in self.blocks)

    def make():
        return made(Counts, Counted)

    assert_refused(make, "changes an argument in place; expected backward")
    assert_same(lambda model: model().backward(retain_graph=True), make)


def test_a_second_run_that_returns_something_else_beside_the_state_is_refused():
    class Noisy(Shows):
        def forward(self, h):
            return super().forward(h), random.random() * self.seen.sum()

    class Beside(Net):
        def forward(self, x=None):
            h, more = self.emb(rows()), 0.0
            for block in self.blocks:
                h, extra = block(h)
                more = more + extra + block.seen.sum()
            return self.head(h).sum() + more

    assert_refused(
        lambda: made(Noisy, Beside), "has to be run once more for its gradient, but gave other"
    )


def test_a_buffer_that_is_assigned_anew_counts_one_run():
    class Assigns(Shows):
        def __init__(self):
            super().__init__()
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, h):
            self.steps = self.steps + 1
            return super().forward(h)

    def run(model):
        seen_in_loss(model)
        return [block.steps for block in model.blocks]

    assert_same(run, lambda: made(Assigns))


class Scales(Shows):
    """Its settings: a class attribute that the model may set, a mode, a number of calls, a value
    that the first call sets, a number that becomes a tensor."""

    factor, calls = 1.0, 0

    def __init__(self):
        super().__init__()
        self.rows, self.score = None, 0.0

    def forward(self, h):
        self.calls += 1
        self.rows = len(h) if self.rows is None else self.rows
        z = self.seen = self.calls * self.inside(h) / self.rows
        return h + self.factor * self.g(z if self.training else z.detach())


@asserts_same(lambda: made(Scales), both=True)
def test_a_second_run_has_the_settings_of_the_first(model):
    losses = []
    for factor in (None, 0.5, 2.0):
        for block in model.blocks if factor else ():
            block.factor = factor
        losses.append(model() + sum(block.seen.square().sum() for block in model.blocks))
        model.train(factor is None)
    scores = [block.seen.detach().norm() for block in model.blocks]
    for block, score in zip(model.blocks, scores, strict=True):
        block.score = score
    sum(losses).backward()
    for block, score in zip(model.blocks, scores, strict=True):
        assert (block.calls, block.factor, block.rows, block.training) == (3, 2.0, 5, False)
        assert block.score is score


@asserts_same(made, both=True)
def test_a_second_run_in_inference_mode(model):
    loss = model() + sum(block.seen.sum() for block in model.blocks)
    with torch.inference_mode():
        loss.backward()
