"""Records a whole training step, from batch to update, as one CUDA graph, and replays it.

The host launches a graph for each step and looks at nothing until the epoch ends. What changes from step to step lies
in tables on the device: the random numbers of the epoch's batches, its learning rates, and the number of the step.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rkd_deploy.data.loader import DeviceLoader, Loader
from rkd_deploy.recipe import TrainRecipe
from rkd_deploy.train.capture import captured, new_stream, replay_ms
from rkd_deploy.train.methods.base import Method
from rkd_deploy.train.passes import ALL, FastPasses, Speedups
from rkd_deploy.train.state import EpochSums
from rkd_deploy.train.stepping import Stepper


class EagerSteps:
    """Trains step by step as PyTorch is read: where there is no CUDA, and where processes or pieces share a batch.

    Args:
        stepper: Makes the updates.
        loader: Gives this process's share of every batch.
    """

    def __init__(self, stepper: Stepper, loader: Loader) -> None:
        self._stepper, self._loader = stepper, loader

    def epoch(self, number: int, first_batch: int, sums: EpochSums, rates: Sequence[float]) -> Iterator[None]:
        """Train an epoch, as `RecordedSteps.epoch` does."""
        for batch, (x_NCHW, y_N) in enumerate(self._loader.epoch(number, first_batch), first_batch):
            sums.add(self._stepper.step(x_NCHW, y_N, rates[batch]), y_N, batch + 1)
            yield


class RecordedSteps:
    """Trains by replaying one recorded step; records anew where a weight changed that the record has burnt in.

    Args:
        method: On its CUDA device, all that is frozen frozen.
        optimizer: Over what the method trains; every step of it is recorded.
        recipe: Table `[train]`.
        loader: Batches of one size.
        speedups: Left out only to be measured.
        otherwise: Makes the steps where they cannot be recorded. Default: that is an error.

    Attributes:
        replay_ms: Milliseconds of a replay, by layout (channels_last or contiguous), of those that were measured.
        channels_last: The layout that is used.
        passes: What is recorded.
    """

    def __init__(
        self,
        method: Method,
        optimizer: torch.optim.Optimizer,
        recipe: TrainRecipe,
        loader: Loader,
        speedups: Speedups = ALL,
        *,
        otherwise: EagerSteps | None = None,
    ) -> None:
        self._method, self._optimizer, self._recipe, self._loader = method, optimizer, recipe, loader
        self._speedups = replace(speedups, channels_last=True) if recipe.channels_last else speedups
        self._trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
        self._device = self._trained[0].device
        self._step_1 = torch.zeros(1, dtype=torch.long, device=self._device)
        self._rates_S = torch.zeros(len(loader), dtype=torch.float32, device=self._device)
        self._rate = torch.zeros((), dtype=torch.float32, device=self._device)
        self._draws_SDB: Tensor | None = None
        self._x_NCHW: Tensor | None = None
        self._y_N: Tensor | None = None
        self._sums = EpochSums()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._burnt_in: tuple[float, ...] = ()
        self.channels_last: bool | None = self._speedups.channels_last
        self.replay_ms: dict[str, float] = {}
        self._seconds, self._failure, self._otherwise = 0.0, "", otherwise
        with torch.cuda.device(self._device):
            self._stream = new_stream()
            self.passes = FastPasses(method, recipe.amp, self._speedups)

    def epoch(self, number: int, first_batch: int, sums: EpochSums, rates: Sequence[float]) -> Iterator[None]:
        """Train an epoch, step by step; nothing here waits for the device.

        Args:
            number: Of the epoch, from 0; the method knows of it already.
            first_batch: Batch to begin with, for a resumed run.
            sums: Of the epoch so far; counted on in place.
            rates: Learning rate of every step of the epoch.
        """
        self._rates_S.copy_(torch.tensor(rates, dtype=torch.float32))
        self._step_1.fill_(first_batch)
        for _ in self._batches(number, first_batch):
            if self._failure or not self._recorded():
                assert self._otherwise is not None
                yield from self._otherwise.epoch(number, first_batch, sums, rates)
                return
            sums.count_in(self._sums)
            assert self._graph is not None
            self._graph.replay()
            sums.images += self._loader.batch_size
            yield

    def news(self) -> dict[str, Any]:
        """What was recorded since this was asked for: layout, milliseconds of what was measured, seconds it took."""
        if not self._seconds:
            return {}
        seconds, self._seconds = self._seconds, 0.0
        layout = "channels_last" if self.channels_last else "contiguous"
        if self._failure:
            return {"failure": self._failure, "seconds": seconds}
        return {"layout": layout, "replay_ms": self.replay_ms, "copies_ms": self.passes.copies, "seconds": seconds}

    def _batches(self, number: int, first_batch: int) -> Iterator[None]:
        """Put the batches of an epoch where the recorded step finds them: all at once if the device makes them."""
        loader = self._loader
        if isinstance(loader, DeviceLoader) and loader.on_device_alone:
            self._draws_SDB = _in_place(self._draws_SDB, loader.draws_by_batch(number))
            yield from (None for _ in range(first_batch, len(loader)))
            return
        for x_NCHW, y_N in loader.epoch(number, first_batch):
            self._x_NCHW, self._y_N = _in_place(self._x_NCHW, x_NCHW), _in_place(self._y_N, y_N)
            yield

    def _batch(self) -> tuple[Tensor, Tensor]:
        if self._draws_SDB is not None:
            assert isinstance(self._loader, DeviceLoader)
            x_NCHW, y_N = self._loader.batch(self._draws_SDB.index_select(0, self._step_1)[0])
        else:
            assert self._x_NCHW is not None
            assert self._y_N is not None
            x_NCHW, y_N = self._x_NCHW, self._y_N
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return x_NCHW.to(self.passes.dtype, memory_format=layout), y_N

    def _recorded(self) -> bool:
        """Record what is to be recorded; whether that could be done."""
        if self._graph is not None and self._burnt_in == self._method.epoch_weights():
            return True
        began = time.perf_counter()
        try:
            self._choose_and_record()
        except RuntimeError as error:
            if self._otherwise is None:
                raise
            self._graph, self._failure = None, str(error).partition("\n")[0]
            # Copies and gradients were made for a graph that there will not be; plain steps begin without either.
            self._method.stand_in({})
            for parameter in self._trained:
                parameter.grad = None
        self._seconds += time.perf_counter() - began
        return not self._failure

    def _choose_and_record(self) -> None:
        self._graph = None  # gives the memory of the one before back
        # Weights of losses are Python numbers, so the graph holds them as constants. They change between epochs only.
        self._burnt_in = self._method.epoch_weights()
        with torch.cuda.device(self._device), _benchmarking(self._speedups.cudnn_benchmark):
            if self.channels_last is None:
                for layout in (False, True):
                    self._record_in(layout)
                    self.replay_ms["channels_last" if layout else "contiguous"] = self.timed()
                self.channels_last = self.replay_ms["channels_last"] < self.replay_ms["contiguous"]
                if self.channels_last:
                    return  # recorded last
            self._record_in(self.channels_last)

    def _record_in(self, channels_last: bool) -> None:
        """Record a step in one layout; training stands where it stood."""
        self._graph = None
        self.channels_last = channels_last
        self._lay_out()
        before = self._snapshot()
        try:
            self.passes.prepare(self._batch()[0])
            _restore(before)
            self._graph = captured(self._step, self._stream, lambda: _restore(before))  # the tables end with the epoch
        finally:
            _restore(before)

    def timed(self) -> float:
        """Milliseconds of a replay; training stands where it stood."""
        assert self._graph is not None
        before = self._snapshot()
        milliseconds = replay_ms(self._graph, self._step_1.zero_)  # the tables end with the epoch
        _restore(before)
        return milliseconds

    def _lay_out(self) -> None:
        """Weights and momenta in the layout, and momenta where there are none: a first step would be another one."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        self._method.to(memory_format=layout)
        for group in self._optimizer.param_groups:
            # A tensor, which the recorded update reads at each replay: a Python number would be a constant of the
            # graph.
            group["lr"] = self._rate
            for parameter in group["params"] if group["momentum"] else ():
                momentum = torch.zeros_like(parameter)
                if "momentum_buffer" in (state := self._optimizer.state[parameter]):
                    momentum.copy_(state["momentum_buffer"])
                state["momentum_buffer"] = momentum

    def _snapshot(self) -> list[tuple[Tensor, Tensor]]:
        """All that a step changes, and its values."""
        momenta = [state["momentum_buffer"] for state in self._optimizer.state.values() if "momentum_buffer" in state]
        moving = [self._step_1, *self._trained, *momenta, *self._method.buffers()]
        # Detached: a clone with a gradient would keep the weights' autograd nodes, of the present stream: a
        # backward pass that is captured on another stream would have to wait for this one, which ends the capture.
        return [(tensor, tensor.detach().clone()) for tensor in moving]

    def _step(self) -> None:
        """One training step, all of it on the device."""
        self._rate.copy_(self._rates_S.index_select(0, self._step_1)[0])
        x_NCHW, y_N = self._batch()
        self._step_1 += 1
        if self._recipe.clip_norm is None:
            self.passes(x_NCHW, y_N, lambda losses: self._sums.add(losses, y_N, self._step_1))
        else:
            losses = self.passes(x_NCHW, y_N, lambda losses: None)
            norm = nn.utils.clip_grad_norm_(self._trained, self._recipe.clip_norm)
            self._sums.add(losses._replace(parts=losses.parts | {"grad_norm": norm}), y_N, self._step_1)
        self._optimizer.step()


def _in_place(place: Tensor | None, value: Tensor) -> Tensor:
    """The value at the address that a record reads; the first one gives the place."""
    if place is None:
        return value.clone()
    if place.shape != value.shape:
        raise AssertionError(f"{tuple(value.shape)} for {tuple(place.shape)}")  # loaders give batches of one size
    return place.copy_(value, non_blocking=True)


def _restore(before: Sequence[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for tensor, value in before:
            tensor.copy_(value)


@contextlib.contextmanager
def _benchmarking(on: bool) -> Iterator[None]:
    """While the block runs, cuDNN measures its algorithms for each new shape."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = on or before
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
