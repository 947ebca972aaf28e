"""Predicts the least time of a network's run on a machine: arithmetic, memory, launches.

    floor = max(FLOPs / peak, bytes / bandwidth, launches x least time between two kernels of a CUDA graph)

Counted are convolutions and linear layers: what stands between them can be computed on the way. Each reads its input
and its weights and writes its output once; of a training pass each does three times its forward work (output, gradient
of the input, gradient of the weights). A network whose maps stay in a cache can beat the memory's term.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

BYTES = {"fp32": 4, "tf32": 4, "fp16": 2, "bf16": 2, "int8": 1}


@dataclass(frozen=True)
class Work:
    """What one run does at the least."""

    flops: float
    bytes: float
    launches: int

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes, self.launches + other.launches)

    def trained(self) -> Work:
        """The work of these layers with their backward pass, which is twice the forward one."""
        return Work(3 * self.flops, 3 * self.bytes, 3 * self.launches)

    def floor_ms(self, machine: Mapping[str, float], precision: str) -> float:
        """Least time of a run.

        Args:
            machine: `flops_NAME` for each arithmetic, `bytes` (both per second), `kernel_s` (least time of a launch).
            precision: Name of the arithmetic; fp32's peak stands for one that was not measured.
        """
        peak = machine.get(f"flops_{precision}", machine["flops_fp32"])
        return 1000 * max(
            self.flops / peak, self.bytes / machine["bytes"], self.launches * machine.get("kernel_s", 0.0)
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields as a record has them."""
        return asdict(self)


@torch.no_grad()
def forward_work(network: nn.Module, x: Tensor, precision: str = "fp32") -> Work:
    """The work of a forward pass, counted by running it once on an input of one image.

    Args:
        network: In eval mode, on the device of `x`.
        x: [N, C, H, W]; the first image is run, and counted N times.
        precision: Of maps and weights.
    """
    size, batch = BYTES[precision], len(x)
    flops = moved = launches = 0

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal flops, moved, launches
        weight = layer.weight
        assert isinstance(weight, Tensor)
        flops += 2 * batch * output.numel() * weight[0].numel()
        moved += size * (batch * (inputs[0].numel() + output.numel()) + weight.numel())
        launches += 1

    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    try:
        network(x[:1])
    finally:
        for hook in hooks:
            hook.remove()
    return Work(flops, moved, launches)
