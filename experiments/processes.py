"""The processes that train one model: one alone, or several that share its layers."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import nn

import highway_bp as hb
from experiments.errors import UserError
from experiments.run_folder import BeingTrained, RunFolder


class OneProcess:
    """Has all layers, and nobody to agree with."""

    rank, size = 0, 1

    def meet(self, device: torch.device) -> None:
        """Get in touch with the others."""

    def enter(self, folder: RunFolder) -> AbstractContextManager:
        """Keep processes of other runs out of the folder; raises BeingTrained if one is in it."""
        return folder.to_itself()

    @property
    def writes(self) -> bool:
        """Whether this process keeps the run's files."""
        return self.rank == 0

    def share(self, model: nn.Module) -> None:
        """Give every process its layers."""

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
    """Processes started by torchrun, each of which has a share of the layers.

    What they keep together is what one process would: a checkpoint can be read by any number of
    them.

    Args:
        settings: the config group ``parallel``.

    Raises:
        UserError: not started by torchrun.
    """

    def __init__(self, settings: Mapping[str, Any]):
        if "RANK" not in os.environ:
            raise UserError("parallel=layers: not started by torchrun; expected "
                            "torchrun --nproc-per-node=2 train.py ...")  # fmt: skip
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self._settings = settings
        if not self.writes:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  all say the same

    def meet(self, device: torch.device) -> None:
        """Raises UserError if the others do not come."""
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", self.rank)))
        try:
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo", store=self._store(),
                rank=self.rank, world_size=self.size,
                timeout=timedelta(seconds=self._settings["timeout"]),
            )  # fmt: skip
        except (RuntimeError, ValueError) as error:
            raise UserError(f"parallel=layers: rank {self.rank} of {self.size} cannot meet the "
                            f"others ({error})") from error  # fmt: skip

    def _store(self) -> dist.Store:
        """Where processes find each other, apart from what those before a restart left there.

        torch's own way to it (env://) was seen to connect restarted processes to the dead ones.
        """
        by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), self.size,
                              is_master=self.rank == 0 and not by_torchrun)  # fmt: skip
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
        sizes = self._settings["sizes"]
        try:
            chains = hb.shard(model, sizes=sizes and list(sizes), scan=self._settings["scan"],
                              micro_batches=self._settings["micro_batches"])  # fmt: skip
        except (TypeError, ValueError) as error:
            raise UserError(f"parallel=layers: {error}") from error
        own = {id(p) for chain in chains for p in chain.own_parameters()}
        self._others = {id(p) for chain in chains for p in chain.parameters()} - own

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
        hb.synchronize(model)
        return model.state_dict()

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Every parameter's state from a process that trains it; whole on the first alone.

        All number the parameters alike, as all have the whole model.
        """
        whole = optimizer.state_dict()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        mine = {i: state for i, state in whole["state"].items()
                if id(parameters[i]) not in self._others}  # fmt: skip
        everyone = [None] * self.size if self.writes else None
        dist.gather_object(mine, everyone, dst=0)
        whole["state"] = {i: state for found in everyone or [] for i, state in found.items()}
        return whole


def processes_of(cfg: DictConfig) -> OneProcess:
    """The processes that ``cfg`` asks for.

    Raises:
        UserError: not started by torchrun, or asked for what is measured by one process alone.
    """
    if not cfg.parallel.layers:
        return OneProcess()
    if cfg.advise or cfg.diagnostics.at or "signal" in cfg.schedule:
        raise UserError("parallel=layers: advise, diagnostics and schedule=adaptive measure "
                        "gradients in one process; expected a schedule of the step alone")
    return LayersShared(cfg.parallel)
