"""Optimisers and learning rates, from the config group ``optim``."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

Settings = Mapping[str, Any]


def build_optimizer(model: nn.Module, optim: Settings) -> torch.optim.Optimizer:
    """The optimiser of ``optim.algorithm`` over the parameters that are trained.

    Adam on CUDA is torch's fused one: a few kernels per step, whatever the number of parameters.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    fused = all(p.is_cuda for p in params) or None  # None: torch's default
    common = {"lr": optim["lr"], "weight_decay": optim["weight_decay"]}
    adam = common | {"betas": tuple(optim.get("betas", ())), "fused": fused}
    match optim["algorithm"]:
        case "sgd":
            return torch.optim.SGD(params, momentum=optim["momentum"], **common)
        case "adam":
            return torch.optim.Adam(params, **adam)
        case "adamw":
            vectors = [p for p in params if p.dim() < 2]  # biases and norms: not decayed
            groups = [
                {"params": [p for p in params if p.dim() >= 2]},
                {"params": vectors, "weight_decay": 0.0},
            ]
            return torch.optim.AdamW(groups, **adam)


def learning_rate(step: int, total: int, optim: Settings) -> float:
    """Return the rate of step 0 .. total - 1, a pure function: a resumed run needs no state.

    drops: ``warmup_lr`` for ``warmup_steps``, at most 5 % of ``total``; then lr, divided by 10 at
    each fraction of ``total`` in ``drops``. cosine: a linear warm-up to lr for ``warmup_steps``, at
    most 10 % of ``total``; then half a cosine down to ``final_lr`` at the last step.
    """
    lr, warmup = optim["lr"], optim["warmup_steps"]
    match optim["schedule"]:
        case "drops":
            if step < min(warmup, total // 20):
                return optim["warmup_lr"]
            return lr * 0.1 ** sum(step >= fraction * total for fraction in optim["drops"])
        case "cosine":
            warmup, final_lr = min(warmup, total // 10), optim["final_lr"]
            if step < warmup:
                return lr * (step + 1) / warmup
            progress = (step - warmup) / max(total - 1 - warmup, 1)
            return final_lr + (lr - final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
