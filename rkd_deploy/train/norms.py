"""Batch norm in training, with the sum and the ReLU behind it, in two kernels each way.

    y   = relu(w h + b + z),  h = (x - mean) / sqrt(var + eps)        mean, var over the batch, per channel
    g   = dL/dy where y > 0, else 0
    dw  = sum g h,  db = sum g,  dz = g
    dx  = w / sqrt(var + eps) (g - mean(g) - h mean(g h))

PyTorch has a kernel for each of these steps, eight to eleven for a layer, and small networks are bound by their number.
Maps are bfloat16 in NHWC; sums are float32, added up in no fixed order.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from rkd_deploy.models.staged import FeatureNetwork
from rkd_deploy.train import kernels
from rkd_deploy.train.frozen import ADDITIONS, MapsAndLogits, is_relu


class Sums:
    """Zeros for the sums of all layers of a step, cleared at once.

    Args:
        length: Numbers that a step takes at most.
        device: Where they are.
    """

    def __init__(self, length: int, device: torch.device) -> None:
        self._values = torch.zeros(length, device=device)
        self._taken = 0

    def clear(self) -> None:
        """Begin a step: set the sums of all layers to zero at once."""
        self._values.zero_()
        self._taken = 0

    def take(self, count: int) -> Tensor:
        """Zeros that nobody else has in this step."""
        self._taken += count
        # A step with more layers than were counted still gets right sums, only one kernel more.
        if self._taken > len(self._values):
            return self._values.new_zeros(count)
        return self._values[self._taken - count : self._taken]


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_NCHW: Tensor, z_NCHW: Tensor | None, weight: Tensor, bias: Tensor, layer: BatchNormAddReLU
    ) -> Tensor:
        norm, sums = layer.norm, layer.sums
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert sums is not None
        x_NCHW = x_NCHW.contiguous(memory_format=torch.channels_last)
        z = x_NCHW if z_NCHW is None else z_NCHW.contiguous(memory_format=torch.channels_last)
        y_NCHW, channels = torch.empty_like(x_NCHW), x_NCHW.shape[1]
        rows, used = x_NCHW.numel() // channels, torch.empty(2 * channels, device=x_NCHW.device)
        total = sums.take(2 * channels)
        kernels.launch("norm_statistics", rows, channels, x_NCHW, total)
        adds = int(z_NCHW is not None)
        kernels.launch(
            "norm_forward", rows, channels, x_NCHW, z, y_NCHW, total, weight, bias, norm.running_mean, norm.running_var,
            used, layer.settings, adds, int(layer.relu),
        )  # fmt: skip
        # Without a ReLU y is not looked at again, and what follows may write over it.
        ctx.save_for_backward(x_NCHW, y_NCHW if layer.relu else x_NCHW, used, weight)
        ctx.layer, ctx.adds = layer, adds
        return y_NCHW

    @staticmethod
    def backward(ctx: Any, dy_NCHW: Tensor) -> tuple[Tensor | None, ...]:
        x_NCHW, y_NCHW, used, weight = ctx.saved_tensors
        relu, channels = int(ctx.layer.relu), x_NCHW.shape[1]
        rows, total = x_NCHW.numel() // channels, ctx.layer.sums.take(2 * channels)
        dy_NCHW = dy_NCHW.contiguous(memory_format=torch.channels_last)
        kernels.launch("norm_backward_sums", rows, channels, dy_NCHW, y_NCHW, x_NCHW, used, total, relu)
        dx_NCHW, dweight, dbias = torch.empty_like(x_NCHW), torch.empty_like(weight), torch.empty_like(weight)
        writes = ctx.adds and relu  # without a ReLU z's gradient is y's
        dz_NCHW = torch.empty_like(x_NCHW) if writes else dy_NCHW
        kernels.launch(
            "norm_backward", rows, channels, dy_NCHW, y_NCHW, x_NCHW, used, total, weight,
            dx_NCHW, dz_NCHW, dweight, dbias, int(writes), relu,
        )  # fmt: skip
        return dx_NCHW, dz_NCHW if ctx.adds else None, dweight, dbias, None


class BatchNormAddReLU(nn.Module):
    """The operation relu(norm(x) + z) in training; on a CPU, and where the kernels do not fit, its parts.

    Args:
        norm: With weights, running statistics and a momentum; it may belong to another network too.
        relu: Whether a ReLU comes last.
    """

    def __init__(self, norm: nn.BatchNorm2d, relu: bool) -> None:
        super().__init__()
        self.norm, self.relu = norm, relu
        self.sums: Sums | None = None
        self.settings = torch.tensor([norm.eps, norm.momentum or 0.0], device=norm.weight.device)

    def forward(self, x_NCHW: Tensor, z_NCHW: Tensor | None = None) -> Tensor:
        """The ReLU of the normalised map, and of a map of its shape added where there is one."""
        if self._fits(x_NCHW, z_NCHW):
            return cast(Tensor, _Fused.apply(x_NCHW, z_NCHW, self.norm.weight, self.norm.bias, self))
        out = self.norm(x_NCHW)
        out = out if z_NCHW is None else out + z_NCHW
        return torch.relu(out) if self.relu else cast(Tensor, out)

    def _fits(self, x_NCHW: Tensor, z_NCHW: Tensor | None) -> bool:
        return (
            self.sums is not None
            and kernels.fits(x_NCHW)
            and self.norm.weight.dtype is torch.float32
            and (z_NCHW is None or (z_NCHW.dtype is torch.bfloat16 and z_NCHW.shape == x_NCHW.shape))
        )


def fused_passes(network: FeatureNetwork) -> fx.GraphModule | None:
    """The passes of a network in training, of its own layers, each batch norm and what follows it one operation.

    Returns:
        Images to stage maps; None where the network cannot be traced.
    """
    try:
        passes = fx.symbolic_trace(MapsAndLogits(network, logits=False))
    except Exception:  # a symbol in place of a tensor breaks Python code in any way
        return None
    modules = dict(passes.named_modules())
    for node in list(passes.graph.nodes):
        # A norm is fused with what alone reads it: a sum that another operation reads as well has to stay in memory as
        # it is.
        if node.op != "call_module" or not _is_norm(modules[str(node.target)]):
            continue
        others: list[Any] = []
        last, reader = node, _only_reader(node)
        if reader is not None and reader.op == "call_function" and reader.target in ADDITIONS and not reader.kwargs:
            rest, after = [argument for argument in reader.args if argument is not node], _only_reader(reader)
            if len(rest) == 1 and isinstance(rest[0], fx.Node) and after is not None and is_relu(after, modules):
                others, last, reader = rest, reader, after
        relu = reader is not None and is_relu(reader, modules)
        name = f"fused_{node.name}"
        modules[name] = BatchNormAddReLU(cast(nn.BatchNorm2d, modules[str(node.target)]), relu)
        passes.add_module(name, modules[name])
        end = reader if relu and reader is not None else last
        with passes.graph.inserting_before(end):
            fused = passes.graph.call_module(name, (node.args[0], *others))
        end.replace_all_uses_with(fused)
        for old in dict.fromkeys((end, last, node)):
            passes.graph.erase_node(old)
    passes.recompile()
    return passes


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_norm(module: nn.Module) -> bool:
    return type(module) is nn.BatchNorm2d and module.affine and module.track_running_stats and bool(module.momentum)
