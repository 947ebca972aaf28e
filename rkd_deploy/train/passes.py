"""Forward and backward passes with fewer kernels: what a recorded step is made of.

Each way of being faster is a switch (`Speedups`), so that it can be measured. What a fast way gives is held against the
plain one before it is used, and where it gives something else the plain one stays.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from rkd_deploy.models.staged import FeatureNetwork
from rkd_deploy.train.capture import captured, new_stream, replay_ms
from rkd_deploy.train.frozen import FoldedCopy, folded_copy
from rkd_deploy.train.methods.base import Losses, Method


@dataclass(frozen=True, kw_only=True)
class Speedups:
    """What makes a recorded step fast beyond being recorded; each can be left out, to measure what it is worth.

    Attributes:
        folded: Frozen networks have their batch norms folded and their weights cast once.
        fused: Their convolutions, sums and ReLUs are one kernel of cuDNN, where that is faster.
        meanwhile: They are computed on streams of their own beside what trains.
        cast_once: With amp, weights are cast to bfloat16 by one kernel, and gradients back by another.
        compiled: The passes of what trains are compiled by torch.compile.
        counted_once: The counters of all batch norms are moved by one kernel.
        cudnn_benchmark: cuDNN measures its algorithms.
        channels_last: The layout of maps and weights; None: the faster one, by measurement.
    """

    folded: bool = True
    fused: bool = True
    meanwhile: bool = True
    cast_once: bool = True
    compiled: bool = False
    counted_once: bool = True
    cudnn_benchmark: bool = True
    channels_last: bool | None = None


ALL = Speedups()
"""All that were measured to be worth it."""


class FastPasses:
    """Losses and gradients of batches of one shape.

    Args:
        method: On its CUDA device, all that is frozen frozen.
        amp: Whether it runs in bfloat16 where autocast would.
        speedups: Which there are.

    Attributes:
        dtype: Of the images that it takes.
        copies: Milliseconds of the passes of each frozen network's folded copies.
    """

    def __init__(self, method: Method, amp: bool, speedups: Speedups) -> None:
        self._method, self._amp, self._speedups = method, amp, speedups
        parameter = next(parameter for parameter in method.parameters() if parameter.requires_grad)
        self._device = parameter.device
        self.dtype = torch.bfloat16 if amp else parameter.dtype
        self._copies: list[FoldedCopy] = []
        self.copies: dict[str, float] = {}
        self._weights: dict[str, Tensor] = {}
        self._compiled: dict[FeatureNetwork, Callable[[Tensor], tuple[Tensor, ...]]] = {}
        self._aside, *self._streams = (new_stream() for _ in (None, *method.frozen_networks()))

    def prepare(self, x_NCHW: Tensor) -> None:
        """Get ready for batches of this shape and layout, of which this is one; statistics of batch norm move."""
        self._weights = self._cast_weights() if self._amp and self._speedups.cast_once else {}
        self._copies = self._stand_ins(x_NCHW)
        self._compiled = self._compiled_passes() if self._speedups.compiled else {}

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
                cast = torch.empty_like(parameter, dtype=self.dtype).copy_(parameter.detach())
                casts[name] = cast.requires_grad_(parameter.requires_grad)
        return casts

    def _stand_ins(self, x_NCHW: Tensor) -> list[FoldedCopy]:
        """Folded copies of the frozen networks: of those that give the same, the fastest of each."""
        self._method.stand_in({})
        self.copies = {}
        chosen: dict[FeatureNetwork, FoldedCopy] = {}
        for number, network in enumerate(self._method.frozen_networks() if self._speedups.folded else ()):
            best = float("inf")
            for fused in (True, False) if self._speedups.fused else (False,):
                copy = folded_copy(network, self.dtype, fused)
                if copy is None or not self._agrees(copy, network, x_NCHW):
                    continue
                graph = captured(functools.partial(copy.features, x_NCHW), self._aside)
                milliseconds = replay_ms(graph)
                self.copies[f"{number}, {'cudnn' if fused else 'folded'}"] = milliseconds
                if milliseconds < best:
                    best, chosen[network] = milliseconds, copy
        self._method.stand_in(chosen)
        return list(chosen.values())

    @torch.no_grad()
    def _agrees(self, copy: FoldedCopy, network: FeatureNetwork, x_NCHW: Tensor) -> bool:
        """Whether a copy gives the maps of its network: cuDNN need not know a fused kernel for every layer."""
        if x_NCHW.is_contiguous(memory_format=torch.channels_last):
            copy.to(memory_format=torch.channels_last)
        try:
            maps = copy.features(x_NCHW)
        except RuntimeError:
            return False
        with self._autocast():
            # bfloat16 has 8 bits, and over tens of layers two orders of summation drift per cents apart. What is looked
            # for, a kernel that leaves something out, is off by as much as the maps themselves.
            return _nearly_equal(maps, network.features(x_NCHW), 0.1 if self._amp else 0.01)

    def _compiled_passes(self) -> dict[FeatureNetwork, Callable[[Tensor], tuple[Tensor, ...]]]:
        """Compiled passes of the networks that train."""
        return {
            network: torch.compile(network.features, dynamic=False)
            for network in self._method.modules()
            if isinstance(network, FeatureNetwork)
            and not _has_networks(network)
            and network.training
            and any(parameter.requires_grad for parameter in network.parameters())
        }

    def __call__(self, x_NCHW: Tensor, y_N: Tensor, note: Callable[[Losses], None]) -> Losses:
        """Losses, without their autograd graph, and gradients in the parameters' `grad`.

        Args:
            x_NCHW: Images, in the layout that was prepared for.
            y_N: Labels, or targets.
            note: Called with the losses when they are known; what it does is done beside the backward pass.
        """
        named = dict(self._method.named_parameters())
        cast = [name for name in self._weights if named[name].requires_grad]
        with torch.no_grad():
            if cast:
                torch._foreach_copy_([self._weights[name] for name in cast], [named[name] for name in cast])
        with contextlib.ExitStack() as stack:
            if self._speedups.meanwhile:
                for copy, stream in zip(self._copies or (), self._streams, strict=False):
                    stack.enter_context(copy.started(x_NCHW, stream))
            if self._speedups.counted_once:
                stack.enter_context(_counted_once(self._method))
            for network, passes in self._compiled.items():
                stack.enter_context(_passing(network, passes))
            stack.enter_context(self._autocast())
            losses: Losses = functional_call(self._method, self._weights, (x_NCHW, y_N))
        uses = {
            name: self._weights.get(name, parameter) for name, parameter in named.items() if parameter.requires_grad
        }
        known = losses._replace(total=losses.total.detach())  # kept losses would keep the graph of this capture
        with aside(self._aside) if self._speedups.meanwhile else contextlib.nullcontext():
            note(known)
        # A parameter that this phase's loss does not read has no gradient, as after backward(): the update leaves it
        # alone.
        gradients = torch.autograd.grad(losses.total, list(uses.values()), allow_unused=True)
        self._keep(dict(zip((named[name] for name in uses), gradients, strict=True)))
        if self._speedups.meanwhile:  # a capture must not wait for a stream that it did not lead to
            torch.cuda.current_stream().wait_stream(self._aside)
        return known

    def _autocast(self) -> torch.autocast:
        # A graph must not hold the casts of another step's weights, which is what autocast's cache would give it.
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._amp, cache_enabled=False)

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


@contextlib.contextmanager
def aside(stream: torch.cuda.Stream) -> Iterator[None]:
    """What the block does is done on another stream, from where this one stands; somebody has to wait for it."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield


def _nearly_equal(maps: Iterable[Tensor], wanted: Iterable[Tensor], limit: float) -> bool:
    """Whether maps differ from others by no more than a share of them; those that are no numbers differ."""
    return all(bool((a - b).norm() <= limit * b.norm()) for a, b in zip(maps, wanted, strict=True))


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
def _passing(network: nn.Module, passes: Callable[[Tensor], tuple[Tensor, ...]]) -> Iterator[None]:
    """While the block runs, other passes give the network's stage maps."""
    # Past nn.Module.__setattr__, which would register the passes as a child: every parameter would be there twice.
    network.__dict__["features"] = passes
    try:
        yield
    finally:
        del network.__dict__["features"]


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
