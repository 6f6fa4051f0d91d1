"""Sentence pairs from a small grammar, with their logical relation: no download, for trying."""

import random

import torch
from torch import Tensor

from experiments.data.pairs import PairData
from experiments.errors import UserError

COUNTS = ("two", "three", "five", "some", "many")
LOOKS = ("old", "young", "small", "tall", "brown", "quiet")
KINDS = {
    "animals": ("dogs", "cats", "horses", "birds"),
    "people": ("women", "men", "children", "farmers"),
}
ACTIONS = {"sleep": "run", "run": "sleep", "eat": "fast", "sing": "fall silent", "play": "work"}
PLACES = {"in the garden": "on the roof", "at the river": "in the house", "on the road": "at home"}
WAYS = ("slowly", "happily", "every day", "after dinner")
# A premise has 6 entailed and 6 contradicting hypotheses, 12 neutral; a third is of each kind.
MOST = 3 * 6 * len(COUNTS) * len(LOOKS) * sum(map(len, KINDS.values())) * len(ACTIONS) * len(PLACES)
PADDING, FIRST, SECOND = "<pad>", "<s>", "</s>"


def load_grammar(train: int = 4000, test: int = 800, length: int = 32) -> PairData:
    """Return ``train`` and ``test`` distinct pairs, a third of each relation; words are tokens.

    A premise says how many, who, what and where. A hypothesis that drops details is entailed, one
    with another action or place is a contradiction, and one that adds a detail is neutral.
    """
    if train + test > MOST:
        raise UserError(
            f"data.train={train} and data.test={test}; expected at most {MOST} pairs in all"
        )
    generator, seen, pairs = random.Random(0), set(), []
    while len(pairs) < train + test:
        label = len(pairs) % 3
        pair = _pair(generator, label)
        if pair not in seen:
            seen.add(pair)
            pairs.append((*pair, label))
    longest = 3 + max(len(f"{p} {h}".split()) for p, h, _ in pairs)
    if length < longest:
        raise UserError(f"data.length={length}; expected at least {longest}, the longest pair")
    words = sorted({word for p, h, _ in pairs for word in f"{p} {h}".split()})
    ids = {word: i for i, word in enumerate((PADDING, FIRST, SECOND, *words))}
    rows = torch.stack([_row(p, h, ids, length) for p, h, _ in pairs])
    labels = torch.tensor([label for _, _, label in pairs])
    parts = rows[:train], labels[:train], rows[train:], labels[train:]
    return PairData("grammar", *parts, len(ids), ids[PADDING])


def _pair(generator: random.Random, label: int) -> tuple[str, str]:
    """Draw premise and hypothesis; label: 0 entailment, 1 neutral, 2 contradiction."""
    count, look = generator.choice(COUNTS), generator.choice(LOOKS)
    kind = generator.choice(list(KINDS))
    who, action = generator.choice(KINDS[kind]), generator.choice(list(ACTIONS))
    place = generator.choice(list(PLACES))
    premise = f"{count} {look} {who} {action} {place}"
    claim = f"{count} {generator.choice((f'{look} {who}', who, kind))}"
    if label == 0:
        return premise, f"{claim} {action}{generator.choice((f' {place}', ''))}"
    if label == 1:
        return premise, f"{claim} {action} {place} {generator.choice(WAYS)}"
    if generator.random() < 0.5:
        return premise, f"{claim} {ACTIONS[action]} {place}"
    return premise, f"{claim} {action} {PLACES[place]}"


def _row(premise: str, hypothesis: str, ids: dict[str, int], length: int) -> Tensor:
    """Tokens and types int32 (2, L): <s> premise </s> hypothesis </s>."""
    first = [ids[w] for w in (FIRST, *premise.split(), SECOND)]
    second = [ids[w] for w in (*hypothesis.split(), SECOND)]
    row = torch.zeros(2, length, dtype=torch.int32)
    row[0, : len(first) + len(second)] = torch.tensor(first + second)
    row[1, len(first) : len(first) + len(second)] = 1
    return row
