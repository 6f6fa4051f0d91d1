"""Tiny networks as arguments of train.py."""

TINY_GPT = (
    *("experiment=topics_tiny", "model=gpt2_small", "data=topics_words", "data.length=16"),
    *("data.vocabulary=300", "model.layers=3", "model.hidden=8", "optim.batch_size=4"),
)
