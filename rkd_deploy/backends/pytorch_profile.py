"""Times the operators of an exported PyTorch program, by PyTorch's own profiler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rkd_deploy.backends.protocol import LayerRun, LayerTime


def profile_operators(program: torch.fx.GraphModule, x: Tensor, count: int) -> list[LayerRun]:
    """Run a program operator by operator under the profiler.

    Args:
        program: An exported program's module, on the device of `x`.
        x: One batch.
        count: Number of runs.

    Returns:
        For each run, the time of every operator in the order in which they began.
    """
    interpreter = _NamedOperators(program)
    with torch.inference_mode(), torch.profiler.profile() as profile:
        for interpreter.run_number in range(count):
            interpreter.run(x)
        if x.is_cuda:  # kernels that still run when the profiler stops would have no time
            torch.cuda.current_stream(x.device).synchronize()
    runs: list[LayerRun] = [[] for _ in range(count)]
    for event in sorted(profile.events(), key=lambda event: event.time_range.start):
        run, _, name = event.name.partition(" ")
        # Of an annotated operator a GPU's profile has a second event, of the device, under the same name.
        if name in interpreter.kinds and run.isdecimal() and event.device_type.name == "CPU":
            total_us = kernel_us(event) if x.is_cuda else event.cpu_time_total
            op, precision = interpreter.kinds[name]
            runs[int(run)].append(LayerTime(name, op, total_us / 1000, precision))
    return runs


class _NamedOperators(torch.fx.Interpreter):
    """Runs a program operator by operator, each under its name and the number of the run in PyTorch's profile."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.run_number = 0
        self.kinds: dict[str, tuple[str, str]] = {}
        """Operator type and number type of each node, by the node's name."""

    def run_node(self, n: torch.fx.Node) -> Any:
        """Run one operator of the graph inside of a profiler record that bears its name."""
        if not isinstance(n.target, torch._ops.OpOverload):
            return super().run_node(n)
        with torch.profiler.record_function(f"{self.run_number} {n.name}"):
            result = super().run_node(n)
        if isinstance(result, Tensor):
            self.kinds[n.name] = (n.target.overloadpacket.__name__, str(result.dtype).removeprefix("torch."))
        return result


def kernel_us(event: Any) -> float:
    """Microseconds of the kernels that an operator launched, each counted once.

    PyTorch's profile has the span of an annotated operator on the device as one more kernel, of the annotation's name.

    Args:
        event: A torch.autograd.profiler_util.FunctionEvent of the host.
    """
    launched_us = sum(kernel.duration for kernel in event.kernels if kernel.name != event.name)
    return float(launched_us + sum(kernel_us(child) for child in event.cpu_children))
