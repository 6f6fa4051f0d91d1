"""The processes that train one model: one alone, or several that share its layers and batches."""

from __future__ import annotations

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
from experiments.errors import GRACE, UserError, naming
from experiments.identity import differing
from experiments.interrupt import Interrupted
from experiments.run_folder import BeingTrained, RunFolder


class OneProcess:
    """Has all layers, and nobody to agree with.

    Attributes:
        writes: whether this process keeps the run's files.
        fields: what a row says of the processes.
    """

    size = 1
    writes = True
    fields: Mapping[str, int] = {}

    def together(self) -> AbstractContextManager:
        """Let no process of the run be left behind by one that fails inside."""
        return contextlib.nullcontext()

    def meet(self, device: torch.device, settings: Mapping[str, Any]) -> None:
        """Get in touch with the others, which have to have the same settings."""

    def enter(self, folder: RunFolder) -> AbstractContextManager:
        """Keep processes of other runs out of the folder; raises BeingTrained if one is in it."""
        return folder.to_itself()

    def share(self, model: nn.Module) -> None:
        """Give every process its layers."""

    def replicated(self, model: nn.Module) -> nn.Module:
        """What is called in the model's place for its gradients."""
        return model

    def part(self, batch: Tensor) -> Tensor:
        """This process's examples of a batch (B, ...)."""
        return batch

    def mean(self, values: Tensor) -> Tensor:
        """Of all parts of a batch, each of which has the same number of examples."""
        return values

    def agreed(self, signum: int | None) -> int | None:
        """The signal that any process has received."""
        return signum

    def known_to_all(self, value: Any) -> Any:
        """What the first process says."""
        return value

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return optimizer.state_dict()


class LayersShared(OneProcess):
    """Processes started by torchrun: ``data`` replicas of a model, whose layers are shared out.

    What they keep together is what one process would: a checkpoint can be read by any number of
    them.

    Args:
        settings: the config group ``parallel``.

    Raises:
        UserError: not started by torchrun, or by a number that cannot be shared out.
    """

    def __init__(self, settings: Mapping[str, Any]):
        if "RANK" not in os.environ:
            raise UserError(
                "parallel=layers: not started by torchrun; expected "
                "torchrun --nproc-per-node=2 train.py ..."
            )
        with naming("parallel=layers: RANK and WORLD_SIZE of torchrun", KeyError):
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
    def together(self) -> Iterator[None]:
        try:
            yield
        except Interrupted as stopped:  # all have agreed on it
            if self.writes:
                raise
            raise SystemExit(stopped.exit_code) from stopped
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            raise UserError(self._who_is_missing(error)) from error

    def _who_is_missing(self, error: RuntimeError) -> str:
        """What is known of processes whose messages do not come through any more."""
        time.sleep(GRACE)  # one that has failed reports it, and torchrun ends this one
        lost = str(error).splitlines()[0]
        try:
            if self._roll_call is not None:
                dist.monitored_barrier(self._roll_call, self._answer, wait_all_ranks=True)
        except RuntimeError as silence:
            return f"a process does not answer: {str(silence).splitlines()[0]}"
        return f"messages between the processes do not come through; is the network up? ({lost})"

    def meet(self, device: torch.device, settings: Mapping[str, Any]) -> None:
        store = self._store()
        check_alike(store, self.rank, self.size, settings)  # groups of processes depend on them
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
        ranks = torch.arange(self.size).view(self.replicas, -1)  # a row shares a replica's layers
        group = partial(dist.new_subgroups_by_enumeration, timeout=self._timeout)
        (self._layers, _), (self._data, _) = group(ranks.tolist()), group(ranks.T.tolist())
        # In it the first rank waits for the others' answers, and they for longer: it reports.
        self._answer = min(self._timeout, timedelta(seconds=30))
        self._roll_call = dist.new_group(backend="gloo", timeout=2 * self._answer)

    def _store(self) -> dist.Store:
        """Where processes find each other, apart from what those before a restart left there.

        torch's own way to it (env://) was seen to connect restarted processes to the dead ones.
        """
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        serves = self.writes and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        store = dist.TCPStore(host, port, self.size, serves, self._timeout, wait_for_workers=False)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return dist.PrefixStore(f"highway_bp/{attempt}", store)

    @contextlib.contextmanager
    def enter(self, folder: RunFolder) -> Iterator[None]:
        busy = False
        with contextlib.ExitStack() as stack:
            if self.writes:
                try:
                    stack.enter_context(folder.to_itself())
                except BeingTrained:
                    busy = True
            if self.known_to_all(busy):
                raise BeingTrained(folder.path)
            yield

    def share(self, model: nn.Module) -> None:
        sizes, scan, parts = (self._settings[key] for key in ("sizes", "scan", "micro_batches"))
        with naming("parallel=layers"):
            hb.shard(model, self._layers, sizes, scan, parts)

    def replicated(self, model: nn.Module) -> nn.Module:
        return model if self.replicas == 1 else hb.replicate(model, self._data)

    def part(self, batch: Tensor) -> Tensor:
        return batch.chunk(self.replicas)[dist.get_rank(self._data)]

    def mean(self, values: Tensor) -> Tensor:
        dist.all_reduce(values, group=self._data)
        return values / self.replicas

    def agreed(self, signum: int | None) -> int | None:
        self._signal.fill_(signum or 0)
        dist.all_reduce(self._signal, dist.ReduceOp.MAX)
        return int(self._signal) or None

    def known_to_all(self, value: Any) -> Any:
        said = [value]
        dist.broadcast_object_list(said, src=0)
        return said[0]

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Every parameter's state from a process that trains it; whole on the first alone.

        All number the parameters alike, as all have the whole model.
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

    Raises:
        UserError: two of them differ; on every process the same line.
    """
    store.set(f"settings/{rank}", json.dumps(settings))
    first, *others = (json.loads(store.get(f"settings/{other}")) for other in range(size))
    for other, found in enumerate(others, 1):
        if difference := differing(first, found):
            key, a, b = difference
            raise UserError(
                f"{key} is {a} on rank 0 and {b} on rank {other}; expected the same arguments on "
                "all processes"
            )


def processes_of(cfg: DictConfig) -> OneProcess:
    """The processes that ``cfg`` asks for.

    Raises:
        UserError: several processes without parallel=layers, or the reverse; asked for a sweep, or
            for advice, which is of one process; a batch that cannot be shared out.
    """
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
