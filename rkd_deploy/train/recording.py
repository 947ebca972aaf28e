"""Records a whole training step, from batch to update, as one CUDA graph, and replays it.

The host launches a graph for each step and looks at nothing until the epoch ends. What changes from step to step lies
in tables on the device: the random numbers of the epoch's batches, its learning rates, and the number of the step.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from rkd_deploy.data.loader import DeviceLoader, Loader
from rkd_deploy.models.staged import FeatureNetwork
from rkd_deploy.recipe import TrainRecipe
from rkd_deploy.train.frozen import ConvAddReLU, FoldedCopy, folded_copy
from rkd_deploy.train.methods.base import Losses, Method
from rkd_deploy.train.norms import BatchNormAddReLU, Sums, fused_passes
from rkd_deploy.train.state import EpochSums
from rkd_deploy.train.stepping import Stepper

_WARM_UPS = 3  # libraries choose their kernels and take their workspaces before anything is recorded
_TIMED = 10


@dataclass(frozen=True, kw_only=True)
class Speedups:
    """What makes a recorded step fast beyond being recorded; each can be left out, to measure what it is worth.

    Attributes:
        folded: Frozen networks have their batch norms folded and their weights cast once.
        fused: Their convolutions, sums and ReLUs are one kernel of cuDNN.
        meanwhile: They are computed on streams of their own beside what trains.
        cast_once: With amp, weights are cast to bfloat16 by one kernel, and gradients back by another.
        fused_norms: Batch norm, sum and ReLU of what trains are four kernels (`norms.py`); with amp and channels_last.
        counted_once: The counters of all batch norms are moved by one kernel.
        cudnn_benchmark: cuDNN measures its algorithms.
        channels_last: The layout of maps and weights; None: the faster one, by measurement.
    """

    folded: bool = True
    fused: bool = True
    meanwhile: bool = True
    cast_once: bool = True
    fused_norms: bool = False
    counted_once: bool = True
    cudnn_benchmark: bool = True
    channels_last: bool | None = None


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

    Attributes:
        replay_ms: Milliseconds of a replay, by layout (channels_last or contiguous), of those that were measured.
        channels_last: The layout that is used.
    """

    def __init__(
        self,
        method: Method,
        optimizer: torch.optim.Optimizer,
        recipe: TrainRecipe,
        loader: Loader,
        speedups: Speedups = Speedups(),
    ) -> None:
        self._method, self._optimizer, self._recipe, self._loader = method, optimizer, recipe, loader
        self._speedups = replace(speedups, channels_last=True) if recipe.channels_last else speedups
        self._trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
        self._device = self._trained[0].device
        self._dtype = torch.bfloat16 if recipe.amp else self._trained[0].dtype
        self._step_1 = torch.zeros(1, dtype=torch.long, device=self._device)
        self._rates_S = torch.zeros(len(loader), dtype=torch.float32, device=self._device)
        self._rate = torch.zeros((), dtype=torch.float32, device=self._device)
        self._draws_SDB: Tensor | None = None
        self._x_NCHW: Tensor | None = None
        self._y_N: Tensor | None = None
        self._sums = EpochSums()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._burnt_in: tuple[float, ...] = ()
        self._copies: list[FoldedCopy] | None = None
        self._weights: dict[str, Tensor] = {}
        self._fused: dict[FeatureNetwork, fx.GraphModule] = {}
        self._norm_sums: Sums | None = None
        self.channels_last: bool | None = self._speedups.channels_last
        self.replay_ms: dict[str, float] = {}
        with torch.cuda.device(self._device):
            self._stream, *self._streams = (_stream() for _ in (None, *method.frozen_networks()))

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
            if self._graph is None or self._burnt_in != self._method.epoch_weights():
                self._record()
            sums.count_in(self._sums)
            assert self._graph is not None
            self._graph.replay()
            sums.images += self._loader.batch_size
            yield

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
        return x_NCHW.to(self._dtype, memory_format=layout), y_N

    def _record(self) -> None:
        self._graph = None  # gives the memory of the one before back
        self._burnt_in = self._method.epoch_weights()
        with torch.cuda.device(self._device), _benchmarking(self._speedups.cudnn_benchmark):
            if self.channels_last is None:
                for layout in (False, True):
                    self._copies = None
                    self._record_in(layout)
                    self.replay_ms["channels_last" if layout else "contiguous"] = self.timed(_TIMED)
                self.channels_last = self.replay_ms["channels_last"] < self.replay_ms["contiguous"]
                if self.channels_last:
                    return  # recorded last
                self._copies = None
            self._record_in(self.channels_last)

    def _record_in(self, channels_last: bool) -> None:
        """Record a step in one layout; training stands where it stood."""
        self._graph = None
        self.channels_last = channels_last
        self._lay_out()
        self._weights = self._cast_weights() if self._recipe.amp and self._speedups.cast_once else {}
        before = [(tensor, tensor.clone()) for tensor in self._moving()]
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            if self._copies is None:
                self._copies = self._stand_ins()
            self._fused = self._fused_networks() if self._speedups.fused_norms and channels_last else {}
            _restore(before)
            for _ in range(_WARM_UPS):
                self._step()
                _restore(before)  # the tables end with the epoch
        current.wait_stream(self._stream)
        gc.collect()  # what dead cycles hold of an earlier graph is not given back in the middle of a capture
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as the one that pins the loader's memory, may go on calling CUDA.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            self._step()
        self._graph = graph
        _restore(before)

    @property
    def copies(self) -> list[str]:
        """What stands in for each frozen network, in words."""
        fused = [any(isinstance(module, ConvAddReLU) for module in copy.modules()) for copy in self._copies or ()]
        return ["fused" if value else "folded" for value in fused]

    @property
    def fused_norms(self) -> int:
        """How many batch norms have kernels of `norms.py`."""
        return sum(isinstance(layer, BatchNormAddReLU) for p in self._fused.values() for layer in p.modules())

    def timed(self, replays: int = _TIMED, warm_ups: int = 2) -> float:
        """Milliseconds of a replay; training stands where it stood."""
        assert self._graph is not None
        before = [(tensor, tensor.clone()) for tensor in self._moving()]
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        for number in range(warm_ups + replays):
            if number == warm_ups:
                start.record()
            self._step_1.zero_()  # the tables end with the epoch
            self._graph.replay()
        end.record()
        end.synchronize()
        _restore(before)
        return float(start.elapsed_time(end)) / replays

    def _moving(self) -> list[Tensor]:
        """All that a step changes, the number of the step first."""
        momenta = [state["momentum_buffer"] for state in self._optimizer.state.values() if "momentum_buffer" in state]
        return [self._step_1, *self._trained, *momenta, *self._method.buffers()]

    def _lay_out(self) -> None:
        """Weights and momenta in the layout, and momenta where there are none: a first step would be another one."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        self._method.to(memory_format=layout)
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate
            for parameter in group["params"] if group["momentum"] else ():
                momentum = torch.zeros_like(parameter)
                if "momentum_buffer" in (state := self._optimizer.state[parameter]):
                    momentum.copy_(state["momentum_buffer"])
                state["momentum_buffer"] = momentum

    def _cast_weights(self) -> dict[str, Tensor]:
        """A bfloat16 tensor for each weight that autocast would cast at every use, by its name in the method."""
        casts: dict[str, Tensor] = {}
        uncast = {
            id(parameter)
            for module in self._method.modules()
            if type(module) not in (nn.Conv2d, nn.Linear)
            for parameter in module.parameters(recurse=False)
        }
        for name, parameter in self._method.named_parameters():
            if id(parameter) not in uncast:
                cast = torch.empty_like(parameter, dtype=self._dtype).copy_(parameter.detach())
                casts[name] = cast.requires_grad_(parameter.requires_grad)
        return casts

    def _stand_ins(self) -> list[FoldedCopy]:
        """Folded copies of the frozen networks, of those that give the same."""
        self._method.stand_in({})
        if not self._speedups.folded:
            return []
        x_NCHW, _ = self._batch()
        copies: dict[FeatureNetwork, FoldedCopy] = {}
        for network in self._method.frozen_networks():
            for fused in (True, False) if self._speedups.fused else (False,):
                copy = folded_copy(network, self._dtype, fused=fused)
                if copy is not None and self._agrees(copy, network, x_NCHW):
                    copies[network] = copy
                    break
        self._method.stand_in(copies)
        return list(copies.values())

    @torch.no_grad()
    def _agrees(self, copy: FoldedCopy, network: FeatureNetwork, x_NCHW: Tensor) -> bool:
        """Whether a copy gives the maps of its network: cuDNN need not know a fused kernel for every layer."""
        copy.to(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)
        try:
            maps = copy.features(x_NCHW)
        except RuntimeError:
            return False
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._recipe.amp, cache_enabled=False):
            wanted = network.features(x_NCHW)
        limit = 0.1 if self._recipe.amp else 0.01
        return all(bool((a - b).norm() <= limit * b.norm()) for a, b in zip(maps, wanted, strict=True))

    @torch.no_grad()
    def _fused_networks(self) -> dict[FeatureNetwork, fx.GraphModule]:
        """Passes with fused norms of the networks that train, of those that give the same."""
        x_NCHW, _ = self._batch()
        fused: dict[FeatureNetwork, fx.GraphModule] = {}
        self._norm_sums = None
        for network in self._method.modules():
            trains = network.training and any(parameter.requires_grad for parameter in network.parameters())
            if not trains or not isinstance(network, FeatureNetwork) or _has_networks(network):
                continue
            passes = fused_passes(network)
            if passes is None:
                continue
            layers = [layer for layer in passes.modules() if isinstance(layer, BatchNormAddReLU)]
            for layer in layers:
                layer.sums = Sums(0, self._device)  # its own zeros, for once
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._recipe.amp, cache_enabled=False):
                try:
                    maps = passes(x_NCHW)
                except (RuntimeError, OSError):  # no NVRTC, or one that refuses the source
                    continue
                wanted = network.features(x_NCHW)
            if all(bool((a - b).norm() <= 0.1 * b.norm()) for a, b in zip(maps, wanted, strict=True)):
                fused[network] = passes
        layers = [layer for p in fused.values() for layer in p.modules() if isinstance(layer, BatchNormAddReLU)]
        self._norm_sums = Sums(4 * sum(layer.norm.num_features for layer in layers), self._device)
        for layer in layers:
            layer.sums = self._norm_sums
        return fused

    def _step(self) -> None:
        """One training step, all of it on the device."""
        self._rate.copy_(self._rates_S.index_select(0, self._step_1)[0])
        x_NCHW, y_N = self._batch()
        losses = self._passes(x_NCHW, y_N)
        if self._recipe.clip_norm is not None:
            norm = nn.utils.clip_grad_norm_(self._trained, self._recipe.clip_norm)
            losses = losses._replace(parts=losses.parts | {"grad_norm": norm})
        self._optimizer.step()
        self._step_1 += 1
        self._sums.add(losses, y_N, self._step_1)

    def _passes(self, x_NCHW: Tensor, y_N: Tensor) -> Losses:
        """Losses without their autograd graph, which would outlive the capture; gradients in the parameters' `grad`."""
        named = dict(self._method.named_parameters())
        cast = [name for name in self._weights if named[name].requires_grad]
        with torch.no_grad():
            if cast:
                torch._foreach_copy_([self._weights[name] for name in cast], [named[name] for name in cast])
        with contextlib.ExitStack() as stack:
            if self._speedups.meanwhile:
                for copy, stream in zip(self._copies or (), self._streams, strict=False):
                    stack.enter_context(copy.started(x_NCHW, stream))
            if self._speedups.counted_once or self._fused:
                stack.enter_context(_counted_once(self._method))
            if self._norm_sums is not None:
                self._norm_sums.clear()
            for network, passes in self._fused.items():
                stack.enter_context(_passing(network, passes))
            # A graph must not hold the casts of another step's weights, which is what autocast's cache would give it.
            stack.enter_context(
                torch.autocast(self._device.type, torch.bfloat16, enabled=self._recipe.amp, cache_enabled=False)
            )
            losses: Losses = functional_call(self._method, self._weights, (x_NCHW, y_N))
        uses = {
            name: self._weights.get(name, parameter) for name, parameter in named.items() if parameter.requires_grad
        }
        gradients = torch.autograd.grad(losses.total, list(uses.values()), allow_unused=True)
        self._keep(dict(zip((named[name] for name in uses), gradients, strict=True)))
        return losses._replace(total=losses.total.detach())

    def _keep(self, gradients: dict[nn.Parameter, Tensor | None]) -> None:
        """Gradients in the type and layout of their parameters: those that are neither are copied by one kernel."""
        copied: dict[nn.Parameter, Tensor] = {}
        for parameter, gradient in gradients.items():
            parameter.grad = None
            if gradient is None:
                continue
            gradient = _laid_out_as(parameter, gradient)
            if gradient.dtype == parameter.dtype and gradient.stride() == parameter.stride():
                parameter.grad = gradient
            else:
                copied[parameter] = gradient
        if copied:
            targets = [torch.empty_like(parameter) for parameter in copied]
            torch._foreach_copy_(targets, list(copied.values()))
            for parameter, target in zip(copied, targets, strict=True):
                parameter.grad = target


def _stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


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


def _laid_out_as(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The gradient with its parameter's strides, where only those of sides of length 1 differ: kernels compare them."""
    for layout in (torch.contiguous_format, torch.channels_last):
        if parameter.ndim != 4 and layout is torch.channels_last:
            continue
        if parameter.is_contiguous(memory_format=layout) and gradient.is_contiguous(memory_format=layout):
            return gradient.as_strided(parameter.shape, parameter.stride())
    return gradient


def _has_networks(network: nn.Module) -> bool:
    return any(isinstance(module, FeatureNetwork) for module in network.modules() if module is not network)


@contextlib.contextmanager
def _passing(network: nn.Module, passes: nn.Module) -> Iterator[None]:
    """While the block runs, other passes give the network's stage maps."""
    network.__dict__["features"] = passes
    try:
        yield
    finally:
        del network.__dict__["features"]


@contextlib.contextmanager
def _benchmarking(on: bool) -> Iterator[None]:
    """While the block runs, cuDNN measures its algorithms for each new shape."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = on or before
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextlib.contextmanager
def _counted_once(method: Method) -> Iterator[None]:
    """While the block runs, batch norms do not count their batches; afterwards all counters move at once."""
    norms = [
        module
        for module in method.modules()
        # Without a momentum the counter is the weight of the batch: such a norm needs its own.
        if isinstance(module, _BatchNorm) and module.training and module.momentum is not None
    ]
    counters = {norm: norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None}
    for norm in counters:
        norm.num_batches_tracked = None
    try:
        yield
    finally:
        for norm, counter in counters.items():
            norm.num_batches_tracked = counter
    if counters:
        torch._foreach_add_(list(counters.values()), 1)
