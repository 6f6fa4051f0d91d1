"""The types of a configuration, which Hydra checks while it composes.

A file of `configs/` names its class in its defaults list: ``/types/Sgd@_here_``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Root:
    """The root keys and the groups."""

    k: int
    gamma: Any
    seed: int
    steps: int | None
    advise: bool
    continue_from: str | None
    device: str
    run_root: str
    model: Any
    data: Any
    optim: Any
    grad: Any
    schedule: Any
    trainer: Any
    parallel: Any
    diagnostics: Any
    logger: Any


@dataclass
class Optim:
    algorithm: str
    schedule: str
    epochs: float | None
    steps: int | None
    batch_size: int
    lr: float
    weight_decay: float
    warmup_steps: int
    clip: float | None


@dataclass
class Sgd(Optim):
    momentum: float
    drops: list[float]
    warmup_lr: float


@dataclass
class Adam(Optim):
    betas: list[float]
    final_lr: float


@dataclass
class Trainer:
    amp: Any
    tf32: bool
    channels_last: Any
    deterministic: bool
    cuda_graph: bool
    threads: int | None
    eval_batch_size: int
    eval_interval: int | None
    checkpoint_interval: int | None
    log_interval: int
    snapshots: list[int]
    progress: Any


@dataclass
class OneProcess:
    layers: bool


@dataclass
class Layers(OneProcess):
    sizes: list[int] | None
    data: int
    scan: str
    micro_batches: int
    timeout: int


@dataclass
class Diagnostics:
    at: list[float]
    ks: list[int]
    gamma: Any


@dataclass
class Target:
    """An object built by the class or function ``_target_``; the other keys are its arguments."""

    _target_: str


@dataclass
class FixedPoint(Target):
    k: int
    group_size: int


@dataclass
class Highway(FixedPoint):
    gamma: Any
    tolerance: float | None


@dataclass
class TruncatedBPTT(Target):
    window: int


@dataclass
class MGRIT(Target):
    cycles: int
    coarsening: int
    levels: int
    relaxation: str


@dataclass
class BpEvery(Target):
    n: int


@dataclass
class Ramp(Target):
    start: int
    end: int
    exact_from: float | None


@dataclass
class Milestones(Target):
    ks: list[Any]
    at: list[Any]


@dataclass
class Adaptive(Target):
    tolerance: float
    ks: list[int]
    signal: str
    budget: float
    exact_from: float


@dataclass
class NoLogger(Target):
    _partial_: bool
    group: str | None


@dataclass
class Wandb(NoLogger):
    mode: str
    project: str
    entity: str | None


@dataclass
class ResNet(Target):
    depth: int
    preact: bool
    downsampling: str


@dataclass
class TorchvisionResNet(Target):
    name: str


@dataclass
class PixelGRU(Target):
    hidden: int
    carry: str


@dataclass
class RNN(PixelGRU):
    cell: str
    layers: int


@dataclass
class Transformer(Target):
    layers: int
    hidden: int
    heads: int


@dataclass
class Decoder(Transformer):
    family: str
    length: int
    dropout: float


@dataclass
class PairClassifier(Transformer):
    pretrained: str | None
    length: int


@dataclass
class VisionTransformer(Transformer):
    image_size: int
    patch_size: int
    pretrained: str | None
    dropout: float


@dataclass
class Digits(Target):
    augment: bool
    validation: int


@dataclass
class Images(Digits):
    name: str
    config: str | None
    splits: list[str]
    image_column: str
    label_column: str
    classes: int
    rows: dict[str, int] | None
    root: str | None
    flip: bool
    cache_dir: str | None


@dataclass
class ImageFolder(Target):
    root: str | None
    train: str
    test: str
    size: int
    workers: int


@dataclass
class Split:
    name: str
    config: str | None
    split: str
    rows: int | None = None


@dataclass
class Topics(Target):
    tokenizer: str
    vocabulary: int
    length: int


@dataclass
class Pairs(Target):
    train: Split
    test: Split
    tokenizer: str
    length: int
    root: str | None
    train_limit: int | None
    eval_limit: int | None
    cache_dir: str | None


@dataclass
class Text(Pairs):
    vocabulary: int


@dataclass
class Grammar(Target):
    train: int
    test: int
    length: int
