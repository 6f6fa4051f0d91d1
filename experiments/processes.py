"""The processes that train one model: one alone, or several that share its layers and batches."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import highway_bp as hb
from experiments.errors import GRACE, UserError, as_user_error
from experiments.interrupt import Interrupted


class OneProcess:
    """A single process, which has all layers.

    Attributes:
        writes: whether this process writes the run's files.
        fields: the fields of a row that describe the processes.
    """

    size = 1
    writes = True
    fields: Mapping[str, int] = {}

    def report_lost_process(self) -> AbstractContextManager:
        """If one process fails inside the block, let no other process wait for it forever."""
        return contextlib.nullcontext()

    def connect(self, device: torch.device, settings: Mapping[str, Any]) -> None:
        """Connect to the other processes; raise UserError if their settings differ."""

    def shard(self, model: nn.Module) -> nn.Module:
        """Give every process its layers; return the module to call where gradients are needed."""
        return model

    def part(self, batch: Tensor) -> Tensor:
        """This process's examples of a batch (B, ...)."""
        return batch

    def mean(self, values: Tensor) -> Tensor:
        """Average over all parts of a batch, which have the same number of examples."""
        return values

    def any_signal(self, signum: int | None) -> int | None:
        """Return the signal that any process has received, or None."""
        return signum

    def broadcast(self, value: Any) -> Any:
        """Return the first process's ``value``, on every process."""
        return value

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return optimizer.state_dict()


class LayersShared(OneProcess):
    """Processes started by torchrun: ``data`` replicas of a model, whose layers are shared out.

    Together they save what one process would save. So any number of processes can read a
    checkpoint.

    settings: the config group ``parallel``. Raises UserError if torchrun has not started them, or
    their number is no multiple of ``data``.
    """

    def __init__(self, settings: Mapping[str, Any]):
        if "RANK" not in os.environ:
            raise UserError(
                "parallel=layers: not started by torchrun; expected "
                "torchrun --nproc-per-node=2 train.py ..."
            )
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.replicas = settings["data"]
        if self.size % self.replicas:
            raise UserError(
                f"parallel.data={self.replicas} with {self.size} processes; expected "
                "torchrun's number to be a multiple"
            )
        self.fields = {
            "processes": self.size,
            "replicas": self.replicas,
            "micro_batches": settings["micro_batches"],
        }
        self._settings, self._timeout = settings, timedelta(seconds=settings["timeout"])
        self.writes = self.rank == 0
        if not self.writes:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  all say the same
        self._roll_call: dist.ProcessGroup | None = None

    @contextlib.contextmanager
    def report_lost_process(self) -> Iterator[None]:
        try:
            yield
        except Interrupted as stopped:  # all processes have agreed on it
            if self.writes:
                raise
            raise SystemExit(stopped.exit_code) from stopped
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            raise UserError(self._who_is_missing(error)) from error

    def _who_is_missing(self, error: RuntimeError) -> str:
        """Describe why messages fail: name a process that does not answer, if there is one."""
        time.sleep(GRACE)  # a process that has failed reports it, and torchrun ends this one
        lost = str(error).splitlines()[0]
        try:
            if self._roll_call is not None:
                dist.monitored_barrier(self._roll_call, self._answer_timeout, wait_all_ranks=True)
        except RuntimeError as silence:
            return f"a process does not answer: {str(silence).splitlines()[0]}"
        return f"messages between the processes do not come through; is the network up? ({lost})"

    def connect(self, device: torch.device, settings: Mapping[str, Any]) -> None:
        store = self._store()
        check_alike(store, self.rank, self.size, settings)  # process groups depend on them
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", self.rank)))
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=self.rank,
            world_size=self.size,
            timeout=self._timeout,
        )
        self._signal = torch.zeros((), dtype=torch.long, device=device)
        ranks = torch.arange(self.size).view(self.replicas, -1)  # ranks[i] share replica i's layers
        group = partial(dist.new_subgroups_by_enumeration, timeout=self._timeout)
        (self._layers, _), (self._data, _) = group(ranks.tolist()), group(ranks.T.tolist())
        # In the roll call, rank 0 waits for the others. They wait longer, so that rank 0 reports.
        self._answer_timeout = min(self._timeout, timedelta(seconds=30))
        self._roll_call = dist.new_group(backend="gloo", timeout=2 * self._answer_timeout)

    def _store(self) -> dist.Store:
        """Return the store where processes find each other; each restart has keys of its own.

        torch's own method (env://) was seen to connect restarted processes to the dead ones.
        """
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        serves = self.writes and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        store = dist.TCPStore(host, port, self.size, serves, self._timeout, wait_for_workers=False)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return dist.PrefixStore(f"highway_bp/{attempt}", store)

    def shard(self, model: nn.Module) -> nn.Module:
        sizes, scan, parts = (self._settings[key] for key in ("sizes", "scan", "micro_batches"))
        with as_user_error("parallel=layers"):
            hb.shard(model, self._layers, sizes, scan, parts)
        return model if self.replicas == 1 else hb.replicate(model, self._data)

    def part(self, batch: Tensor) -> Tensor:
        return batch.chunk(self.replicas)[dist.get_rank(self._data)]

    def mean(self, values: Tensor) -> Tensor:
        dist.all_reduce(values, group=self._data)
        return values / self.replicas

    def any_signal(self, signum: int | None) -> int | None:
        self._signal.fill_(signum or 0)
        dist.all_reduce(self._signal, dist.ReduceOp.MAX)
        return int(self._signal) or None

    def broadcast(self, value: Any) -> Any:
        said = [value]
        dist.broadcast_object_list(said, src=0)
        return said[0]

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Gather every parameter's state from a process that trains it; complete on rank 0 only.

        All processes number the parameters alike, because all have the whole model.
        """
        whole = optimizer.state_dict()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        mine = {
            i: tree_map_only(Tensor, Tensor.cpu, state)
            for i, state in whole["state"].items()
            if not parameters[i].is_meta
        }
        everyone = [None] * dist.get_world_size(self._layers) if self.writes else None
        if dist.get_rank(self._data) == 0:  # the other replicas have the same
            dist.gather_object(mine, everyone, group=self._layers, group_dst=0)
        whole["state"] = {i: state for found in everyone or [] for i, state in found.items()}
        return whole


def check_alike(store: dist.Store, rank: int, size: int, settings: Mapping[str, Any]) -> None:
    """Compare the settings of all processes, keys with dots, through a store that they share.

    If two differ, the UserError is the same on every process.
    """
    store.set(f"settings/{rank}", json.dumps(settings))
    first, *others = (json.loads(store.get(f"settings/{other}")) for other in range(size))
    for other, found in enumerate(others, 1):
        for key in sorted({*first, *found}):
            if key not in first or key not in found or first[key] != found[key]:
                raise UserError(
                    f"{key} is {first.get(key)} on rank 0 and {found.get(key)} on rank {other}; "
                    "expected the same arguments on all processes"
                )


def processes_of(cfg: DictConfig) -> OneProcess:
    """Return the processes that ``cfg`` asks for; UserError if they cannot train it."""
    if not cfg.parallel.layers:
        if (size := os.environ.get("WORLD_SIZE", "1")) != "1":
            raise UserError(
                f"parallel=none with WORLD_SIZE={size}; expected parallel=layers under torchrun"
            )
        return OneProcess()
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        raise UserError("parallel=layers in a sweep; expected one run per torchrun, without -m")
    if cfg.advise:
        raise UserError("parallel=layers: advise measures one process; expected advise=false")
    replicas, batch = cfg.parallel.data, cfg.optim.batch_size
    if batch % replicas:
        raise UserError(
            f"parallel.data={replicas} with optim.batch_size={batch}; expected equal "
            "parts for all replicas"
        )
    if cfg.parallel.micro_batches > batch // replicas:
        raise UserError(
            f"parallel.micro_batches={cfg.parallel.micro_batches} of a process's "
            f"{batch // replicas} examples; expected at most one per example"
        )
    return LayersShared(cfg.parallel)
