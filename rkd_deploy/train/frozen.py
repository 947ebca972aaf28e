"""Makes frozen networks fast: batch norm folded, weights cast once, kernels fused."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from rkd_deploy.export.fusion.batch_norm import fold_batch_norms
from rkd_deploy.models.staged import FeatureNetwork

_ADDITIONS = (operator.add, operator.iadd, torch.add)
_RELUS = (torch.relu, torch.relu_, functional.relu)


class FoldedCopy(FeatureNetwork):
    """A copy of a frozen network that gives its maps and logits with fewer kernels.

    Args:
        passes: Images to stage maps, and to logits behind them where `logits` says so.
        logits: Whether `passes` gives logits.
        channels: Of the last map.
        dtype: Of weights and maps.
    """

    fc: None

    def __init__(self, passes: nn.Module, logits: bool, channels: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.fc, self.passes, self.logits, self.dtype, self._channels = None, passes, logits, dtype, channels
        self._stream: torch.cuda.Stream | None = None
        self._started: tuple[Tensor, tuple[Tensor, ...]] | None = None

    @property
    def channels(self) -> int:
        """Channels of the last map."""
        return self._channels

    def without_head(self) -> FeatureNetwork:
        """Nothing is ever cut from a copy that only stands in."""
        raise AssertionError("a folded copy is not cut")

    @contextlib.contextmanager
    def started(self, x_NCHW: Tensor, stream: torch.cuda.Stream) -> Iterator[None]:
        """Compute on a stream of its own while the block runs; `features` and `maps_and_logits` wait for it."""
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._started = x_NCHW, self._run(x_NCHW)
        self._stream = stream
        try:
            yield
        finally:
            torch.cuda.current_stream().wait_stream(stream)  # also where nobody asked: a capture must not end before
            self._started = None

    def features(self, x_NCHW: Tensor) -> tuple[Tensor, ...]:
        """The stage maps."""
        results = self._results(x_NCHW)
        return results[:-1] if self.logits else results

    def maps_and_logits(self, x_NCHW: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Stage maps and logits [N, K] of one pass."""
        assert self.logits
        *maps, logits_NK = self._results(x_NCHW)
        return tuple(maps), logits_NK

    def _results(self, x_NCHW: Tensor) -> tuple[Tensor, ...]:
        if self._started is None or self._started[0] is not x_NCHW:
            return self._run(x_NCHW)
        assert self._stream is not None
        torch.cuda.current_stream().wait_stream(self._stream)
        return self._started[1]

    @torch.no_grad()
    def _run(self, x_NCHW: Tensor) -> tuple[Tensor, ...]:
        # Weights are cast already: autocast would cast them at every pass, which is what the copy saves.
        with torch.autocast(x_NCHW.device.type, enabled=False):
            return tuple(self.passes(x_NCHW.to(self.dtype)))


class _MapsAndLogits(nn.Module):
    """The stage maps of a network, and its logits behind them where they are wanted, as a module: to be traced.

    Args:
        network: Its layers are used, not copied.
        logits: Whether the logits come last.
    """

    def __init__(self, network: FeatureNetwork, logits: bool) -> None:
        super().__init__()
        self.network, self.logits = network, logits

    def forward(self, x_NCHW: Tensor) -> tuple[Tensor, ...]:
        """The maps of images, and their logits."""
        if not self.logits:
            return tuple(self.network.features(x_NCHW))
        maps, logits_NK = self.network.maps_and_logits(x_NCHW)
        return (*maps, logits_NK)


def folded_copy(network: FeatureNetwork, dtype: torch.dtype, fused: bool) -> FoldedCopy | None:
    """The copy of a frozen network in eval mode; None where its passes cannot be traced.

    Args:
        network: T, or a branch that stands still.
        dtype: Of the copy's weights and maps.
        fused: Whether sum and ReLU behind a convolution are one operation with it (`ConvAddReLU`).
    """
    # First with the head: its logits come out of the same pass. A head that cannot be traced is left to the network
    # itself.
    for logits in (True, False):
        passes = fold_batch_norms(_MapsAndLogits(network, logits).eval())
        if isinstance(passes, fx.GraphModule):
            if fused:
                fuse_relus(passes)
            for module in passes.modules():
                # A norm that could not be folded keeps the statistics of its layer in float32, as autocast has it.
                if dtype.itemsize > 2 or not isinstance(module, _BatchNorm):
                    _cast(module, dtype)
            return FoldedCopy(passes.eval().requires_grad_(False), logits, network.channels, dtype)
    return None


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


class ConvAddReLU(nn.Module):
    """The operation relu(conv(x) + z): one kernel of cuDNN; on a CPU its parts.

    Args:
        conv: With a bias, of zero padding.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self._zeros: dict[torch.Size, Tensor] = {}

    def forward(self, x_NCHW: Tensor, z_NCHW: Tensor | None = None) -> Tensor:
        """The ReLU of the convolution, and of a map of its shape added where there is one."""
        conv = self.conv
        if not x_NCHW.is_cuda:
            out = conv(x_NCHW)
            return torch.relu(out if z_NCHW is None else out + z_NCHW)
        # cuDNN's kernel reads z even where its factor is 0, and 0 times what lies in fresh memory may be no number:
        # cudnn_convolution_relu hands it such memory, so zeros are added here instead.
        z = self._zeros_like_output(x_NCHW) if z_NCHW is None else z_NCHW
        padding = cast(tuple[int, ...], conv.padding)
        return torch.cudnn_convolution_add_relu(
            x_NCHW, conv.weight, z, 1.0, conv.bias, conv.stride, padding, conv.dilation, conv.groups
        )

    def _zeros_like_output(self, x_NCHW: Tensor) -> Tensor:
        if x_NCHW.shape not in self._zeros:
            self._zeros[x_NCHW.shape] = torch.zeros_like(self.conv(x_NCHW))
        return self._zeros[x_NCHW.shape]


def fuse_relus(passes: fx.GraphModule) -> None:
    """Make relu(conv(x)) and relu(conv(x) + z) one operation, in place, where nothing else reads what lies between."""
    modules = dict(passes.named_modules())
    for node in list(passes.graph.nodes):
        if not _is_relu(node, modules) or not isinstance(node.args[0], fx.Node) or len(node.args[0].users) != 1:
            continue
        before = node.args[0]
        conv: Any = before
        others: list[Any] = []
        if before.op == "call_function" and before.target in _ADDITIONS and len(before.args) == 2 and not before.kwargs:
            # Either side of the sum may be the convolution; of two, the first takes the other's result as z.
            conv, *others = sorted(before.args, key=lambda argument: not _is_conv(argument, modules))
        if not _is_conv(conv, modules) or any(not isinstance(other, fx.Node) or other is conv for other in others):
            continue
        name = f"fused_{node.name}"
        passes.add_module(name, ConvAddReLU(cast(nn.Conv2d, modules[str(conv.target)])))
        with passes.graph.inserting_before(node):
            operation = passes.graph.call_module(name, (conv.args[0], *others))
        node.replace_all_uses_with(operation)
        for old in dict.fromkeys((node, before, conv)):
            passes.graph.erase_node(old)
    passes.recompile()


def _is_relu(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether an operation is a ReLU, as a module, a function or a method."""
    if node.op == "call_module":
        return type(modules[str(node.target)]) is nn.ReLU
    return (node.op == "call_function" and node.target in _RELUS) or (
        node.op == "call_method" and node.target in ("relu", "relu_")
    )


def _is_conv(node: object, modules: dict[str, nn.Module]) -> bool:
    """Whether it is a convolution that cuDNN can fuse, and that one operation alone reads."""
    if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.users) != 1:
        return False
    conv = modules[str(node.target)]
    return (
        type(conv) is nn.Conv2d
        and conv.groups == 1
        and conv.bias is not None
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
    )
