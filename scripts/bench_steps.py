"""Time a whole training step of a preset for many methods, alternating in one process.

    python scripts/bench_steps.py gru_cifar10_pixels --arms bp k0 k1 k3 k10 fp3

A step is forward, backward, clipping and optimiser, always on the same batch. The batch is made-up
data of the preset's shape; of sentence pairs, which differ in length, a real one of median length.
The precision is the preset's on this device. Figures and tables read step times from the record,
results/steps_PRESET.DEVICE.json. With trainer.cuda_graph=true, the record is
results/steps_PRESET.cuda_graph.json.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

import highway_bp as hb
from experiments.config import composed
from experiments.cuda_graphs import EAGER, GraphedPasses, Passed
from experiments.data.batches import Batch, Data
from experiments.devices import prepare_torch
from experiments.errors import UserError
from experiments.identity import KINDS, precision_of
from experiments.objective import Objective
from experiments.optimizer import build_optimizer
from experiments.plan import build
from experiments.processes import OneProcess
from scripts import benchmark
from scripts.benchmark import DEVICE
from scripts.program import run
from scripts.surrogate import one_pass, surrogate, training_step

ARMS = ["bp", "k0", "k1", "k2", "k3", "k5", "k10"]
BATCHES = 15  # among which one of median length is found


def data_of(cfg: DictConfig) -> Data:
    is_real = KINDS.get(cfg.data._target_) in ("pairs", "grammar")
    return build(cfg, "data") if is_real else surrogate(cfg.data)


def typical_batch(objective: Objective) -> Batch:
    """Of the first batches one of median length."""
    batches = (objective.batch(i) for i in range(BATCHES))
    return sorted(batches, key=lambda batch: batch[0].shape[-1])[BATCHES // 2]


def step_of(cfg: DictConfig, data: Data, arm: str) -> Callable[[], object]:
    """A training step that uses the same batch at every call."""
    torch.manual_seed(0)
    model = build(cfg, "model", **data.model_arguments()).train()
    hb.set_method(model, benchmark.method_of(arm, cfg.gamma))
    objective = Objective(cfg, data, DEVICE, OneProcess())
    objective.place(model)
    optimizer, batch = build_optimizer(model, cfg.optim), typical_batch(objective)
    passes = partial(one_pass, model, objective.loss)
    if cfg.trainer.cuda_graph:
        passes = graphed(model, passes)
    step = partial(training_step, model, passes, optimizer, batch, cfg.optim.clip)
    for _ in range(EAGER):
        step()
    return step


def graphed(model: nn.Module, passes: Callable[[Tensor, Tensor], Tensor]) -> Callable:
    """The same passes, replayed as a CUDA graph as in the trainer with `trainer.cuda_graph`."""
    graphs = GraphedPasses(model, lambda x, y: Passed({"loss": passes(x, y)}, 0))
    return lambda x, y: graphs(hb.current_method(model), x, y).measured["loss"]


def measure(preset: str, arms: Sequence[str], repeats: int, overrides: Sequence[str]) -> dict:
    cfg = composed(f"experiment={preset}", *overrides)
    prepare_torch(cfg.trainer)
    data = data_of(cfg)
    steps = {arm: step_of(cfg, data, arm) for arm in arms}
    runs = {arm: partial(benchmark.timed, step) for arm, step in steps.items()}
    seconds = benchmark.interleaved(runs, repeats)
    return benchmark.new_record(
        preset=preset,
        overrides=list(overrides),
        precision=precision_of(cfg.trainer, DEVICE.type),
        repeats=repeats,
        **benchmark.medians(seconds),
    )


def main(argv: Sequence[str]) -> None:
    parser = benchmark.arguments(__doc__)
    parser.add_argument("preset", help="of configs/experiment")
    parser.add_argument("overrides", nargs="*", help="arguments of train.py")
    parser.add_argument("--arms", nargs="+", default=ARMS, help=", ".join(ARMS))
    args = parser.parse_intermixed_args(argv)
    others = [o for o in args.overrides if not o.startswith("trainer.cuda_graph=")]
    if others and not args.out:
        raise UserError(
            f"{' '.join(others)}: changes the preset's step; expected --out FILE as well"
        )
    record = measure(args.preset, args.arms, args.repeats, args.overrides)
    kind = DEVICE.type + ("_graph" if "trainer.cuda_graph=true" in args.overrides else "")
    out = args.out or Path("results", f"steps_{args.preset}.{kind}.json")
    benchmark.save(record, out)
    print(out, {arm: round(1000 * s, 2) for arm, s in record["seconds"].items()}, "ms")


if __name__ == "__main__":
    run(main)
