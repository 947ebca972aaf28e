"""The processes that train one network together, and how they agree.

torchrun starts R processes ("ranks") and tells each its number in the environment. All of them run the same code on
their share of every batch. Only the first one touches the run folder and shows progress; what it reads, decides or
fails at reaches the others through `Group.on_main`, so that all of them go the same way or stop together.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from rkd_deploy.errors import RkdError

_T = TypeVar("_T")

_TIMEOUT = timedelta(minutes=30)  # the others wait while the first one evaluates; a rank that dies is noticed at once
_RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


@dataclass(frozen=True)
class Group:
    """The processes of one training run, as one of them sees them.

    Attributes:
        rank: Number of this process, from 0.
        size: How many processes there are.
        local_rank: Number of this process on its machine: which GPU it takes.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    def on_main(self, call: Callable[[], _T]) -> _T:
        """Call on rank 0 alone; every rank gets the result, or raises the `RkdError` that was raised there."""
        if self.size == 1:
            return call()
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            # An error that stayed here would leave the others waiting in their next exchange until it times out.
            try:
                outcome[0] = call()
            except RkdError as error:
                outcome[1] = error
        # Over the CPU, by gloo: what failed on rank 0 may be its GPU, and the error has to get through.
        dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
        if outcome[1] is not None:
            raise outcome[1]
        value: _T = outcome[0]
        return value

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, as a new tensor."""
        return self._reduced(tensor, dist.ReduceOp.SUM)

    def smallest(self, tensor: Tensor) -> Tensor:
        """The minimum over ranks, element by element, as a new tensor."""
        return self._reduced(tensor, dist.ReduceOp.MIN)

    def any(self, mine: bool) -> bool:
        """Whether `mine` is true on any rank."""
        return bool(self.summed(torch.tensor(int(mine))).item())

    def _reduced(self, tensor: Tensor, operation: Any) -> Tensor:
        if self.size == 1:
            return tensor
        result = tensor.clone()
        dist.all_reduce(result, operation)
        return result


ALONE = Group()
"""The group of a process that trains alone: nothing is exchanged."""


def restarted() -> bool:
    """Whether torchrun or Slurm has started this command again, after a failure or a preemption."""
    return any(int(os.environ.get(name) or 0) > 0 for name in _RESTARTS)


def is_main_process() -> bool:
    """Whether this process writes files and speaks to people (rank 0); known before the process group exists."""
    return int(os.environ.get("RANK") or 0) == 0


@contextmanager
def process_group() -> Iterator[Group]:
    """The process group that torchrun started this process in, or `ALONE`; destroyed when the outermost block ends."""
    size = int(os.environ.get("WORLD_SIZE") or 1)
    if size == 1:
        yield ALONE
        return
    group = Group(int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK") or 0))
    if dist.is_initialized():  # by a block around this one
        yield group
        return
    dist.init_process_group(
        # Both: gradients go from GPU to GPU by NCCL, votes and errors from CPU to CPU, which only gloo can do.
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        store=_store(),
        rank=group.rank,
        world_size=group.size,
        timeout=_TIMEOUT,
    )
    try:
        yield group
    finally:
        dist.destroy_process_group()


def _store() -> Store:
    """The store through which the ranks find each other.

    torchrun on one machine, unless it is given a rendezvous, hands the store of the ranks that died to those that it
    starts in their place, addresses of the dead included: these keep to names of their own. Several machines get a new
    store each time, and each of them counts its own restarts.
    """
    store: Store = next(rendezvous("env://", timeout=_TIMEOUT))[0]
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        return store
    return PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT') or 0}", store)


class StopVote:
    """Lets every rank vote after each step to go on, save or stop; all ranks learn the outcome after the same step.

    Votes are exchanged while the next step is computed, so that no rank waits: a wish of one step is answered after the
    next. A single process is answered at once.

    Args:
        group: The processes that vote.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._pending: tuple[Any, Tensor] | None = None

    def vote(self, wish: int) -> int:
        """Hand in this rank's wish; returns the highest wish of any rank in the step before."""
        if self._group.size == 1:
            return wish
        before = self._collect()
        counted = torch.tensor([wish])
        # The tensor is held with the work: gloo writes the outcome into it while the next step is computed.
        self._pending = (dist.all_reduce(counted, dist.ReduceOp.MAX, async_op=True), counted)
        return before

    def finish(self, wish: int) -> int:
        """Hand in this rank's wish at the end of an epoch; waits for and returns the highest of the last two steps."""
        # Both answers: what `vote` gives is of the step before, and no further step will fetch that of the last one.
        return wish if self._group.size == 1 else max(self.vote(wish), self._collect())

    def _collect(self) -> int:
        if self._pending is None:
            return 0
        work, counted = self._pending
        self._pending = None
        work.wait()
        return int(counted.item())
