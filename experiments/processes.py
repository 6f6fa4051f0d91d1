"""The processes that train one model: one alone, or several that share its layers and batches."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import highway_bp as hb
from experiments.errors import UserError
from experiments.failures import Failures, ToldElsewhere, is_lost_touch
from experiments.interrupt import Interrupted
from experiments.run_folder import BeingTrained, RunFolder


class OneProcess:
    """Has all layers, and nobody to agree with."""

    rank, size = 0, 1

    def together(self) -> AbstractContextManager:
        """Let no process of the run be left behind by one that fails inside."""
        return contextlib.nullcontext()

    def meet(self, device: torch.device) -> None:
        """Get in touch with the others."""

    def enter(self, folder: RunFolder) -> AbstractContextManager:
        """Keep processes of other runs out of the folder; raises BeingTrained if one is in it."""
        return folder.to_itself()

    @property
    def fields(self) -> dict[str, int]:
        """What a row says of the processes."""
        return {}

    @property
    def writes(self) -> bool:
        """Whether this process keeps the run's files."""
        return self.rank == 0

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

    def model_state(self, model: nn.Module) -> dict[str, Any]:
        return model.state_dict()

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return optimizer.state_dict()


class LayersShared(OneProcess):
    """Processes started by torchrun: ``data`` replicas of a model, whose layers are shared out.

    What they keep together is what one process would: a checkpoint can be read by any number of
    them.

    Args:
        settings: the config group ``parallel``.

    Raises:
        UserError: not started by torchrun, or by a number that cannot be shared out; sizes that
            are none.
    """

    def __init__(self, settings: Mapping[str, Any]):
        if "RANK" not in os.environ:
            raise UserError(
                "parallel=layers: not started by torchrun; expected "
                "torchrun --nproc-per-node=2 train.py ..."
            )
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        _check_sizes(settings["sizes"])
        self.replicas = settings["data"]
        if self.size % self.replicas:
            raise UserError(
                f"parallel.data={self.replicas} with {self.size} processes; expected "
                "torchrun's number to be a multiple"
            )
        self._settings, self._timeout = settings, timedelta(seconds=settings["timeout"])
        if not self.writes:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  all say the same
        by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._serves = self.rank == 0 and not by_torchrun  # with its first connection

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        timeout = self._settings["timeout"]
        try:
            self._failures = Failures(self._connect, self.rank, self.size, timeout)
        except UserError as error:  # this process can tell nobody else
            self._tell(str(error))
            raise ToldElsewhere(1) from error
        try:
            yield
        except (BeingTrained, KeyboardInterrupt):
            raise
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> NoReturn:
        """Tell of it, or let another process do so."""
        if isinstance(error, Interrupted):  # all have agreed on it
            raise error if self.writes else ToldElsewhere(error.exit_code)
        if not isinstance(error, UserError) and not is_lost_touch(error):
            traceback.print_exception(error)  # a bug, perhaps on this rank alone
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's: there is something to tell yet
        line = self._failures.line(error)
        self._tell(line)
        raise ToldElsewhere(1) from error

    @staticmethod
    def _tell(line: str) -> None:
        print(f"error: {line}", file=sys.stderr, flush=True)

    def meet(self, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", self.rank)))
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=self._connect(),
            rank=self.rank,
            world_size=self.size,
            timeout=self._timeout,
        )
        layers = self.size // self.replicas  # processes that share the layers of one replica
        ranks = torch.arange(self.size).view(self.replicas, layers)
        self._layers = self._groups(ranks)
        self._data = self._groups(ranks.T)

    def _groups(self, ranks: Tensor) -> dist.ProcessGroup:
        """This process's group, of those in the rows of ``ranks``."""
        return dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=self._timeout)[0]

    def _connect(self) -> dist.Store:
        """Where processes find each other, apart from what those before a restart left there.

        torch's own way to it (env://) was seen to connect restarted processes to the dead ones.
        """
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        try:
            store = dist.TCPStore(
                host,
                int(port),
                self.size,
                is_master=self._serves,
                wait_for_workers=False,
                timeout=self._timeout,
            )
        except dist.DistError as error:
            raise UserError(
                f"parallel=layers: rank {self.rank} of {self.size} cannot meet the "
                f"others at {host}:{port} ({error})"
            ) from error
        self._serves = False
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
        try:
            hb.shard(
                model,
                self._layers,
                self._settings["sizes"],
                self._settings["scan"],
                self._settings["micro_batches"],
            )
        except (TypeError, ValueError) as error:
            raise UserError(f"parallel=layers: {error}") from error

    @property
    def fields(self) -> dict[str, int]:
        return {
            "processes": self.size,
            "replicas": self.replicas,
            "micro_batches": self._settings["micro_batches"],
        }

    def replicated(self, model: nn.Module) -> nn.Module:
        return model if self.replicas == 1 else hb.replicate(model, self._data)

    def part(self, batch: Tensor) -> Tensor:
        return batch.chunk(self.replicas)[dist.get_rank(self._data)]

    def mean(self, values: Tensor) -> Tensor:
        if self.replicas > 1:
            dist.all_reduce(values, group=self._data)
        return values / self.replicas

    def agreed(self, signum: int | None) -> int | None:
        most = torch.tensor(signum or 0)
        if torch.cuda.is_available() and dist.get_backend() == "nccl":
            most = most.cuda()
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most) or None

    def known_to_all(self, value: Any) -> Any:
        said = [value]
        dist.broadcast_object_list(said, src=0)
        return said[0]

    def model_state(self, model: nn.Module) -> dict[str, Any]:
        return hb.whole_state_dict(model)

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


def _check_sizes(sizes: object) -> None:
    listed = isinstance(sizes, list | ListConfig) and all(type(n) is int for n in sizes)
    if not listed and sizes is not None:
        raise UserError(
            f"parallel.sizes={sizes}; expected null or a list of numbers of layers, such as [4,2]"
        )


def processes_of(cfg: DictConfig) -> OneProcess:
    """The processes that ``cfg`` asks for.

    Raises:
        UserError: not started by torchrun; asked for a sweep, or for advice, which is of one
            process; a batch that cannot be shared out.
    """
    if not cfg.parallel.layers:
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
