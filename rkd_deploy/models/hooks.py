"""Reads the maps of a network that cannot be traced, by forward hooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from rkd_deploy.models.stage_maps import Step
from rkd_deploy.models.staged import in_mode
from rkd_deploy.models.tracing import Reader


class Hooked:
    """Reads stage maps by forward hooks, for networks that `tracing.Traced` cannot trace: only modules have names.

    Args:
        network: The network to read; its weights stay where they are.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    single_output = True
    """Whether the network gives one tensor; taken for granted, because only a run in training could tell."""

    def knows(self, stage: str) -> bool:
        """Whether the network has a module of this name."""
        return bool(stage) and stage in dict(self.network.named_modules())

    def reader(self, stages: Sequence[str], answer: bool) -> Reader:
        """A function from (holder, images) to the maps of some stages, the network's answer last if it is wanted."""

        def read(holder: nn.Module, x_NCHW: Tensor) -> tuple[Any, ...]:
            network: nn.Module = holder.get_submodule("network")
            outputs, result = _run_hooked(network, stages, x_NCHW)
            last = dict(outputs)
            return (*(last[stage] for stage in stages), *([result] if answer else []))

        return read

    def steps(self, x_NCHW: Tensor, stages: Sequence[str], answer: bool) -> list[Step]:
        """Run the network in eval mode; gives the outputs of all modules, in the order of their calls."""
        modules = dict(self.network.named_modules())
        with in_mode(self.network, False):
            outputs, _ = _run_hooked(self.network, list(modules), x_NCHW)
        return [
            Step(name, type(modules[name]).__name__, tuple(value.shape), True)
            for name, value in outputs
            if isinstance(value, Tensor) and name
        ]

    def used_modules(self, x_NCHW: Tensor, stages: Sequence[str]) -> set[str]:
        """Paths of the modules that are called until some stages have given their maps, and of all loose tensors."""
        with in_mode(self.network, False):
            outputs, _ = _run_hooked(self.network, [name for name, _ in self.network.named_modules()], x_NCHW)
        called = [name for name, _ in outputs]
        end = max(index for index, name in enumerate(called) if name in stages)
        loose = {name for name, tensor in self.network.named_parameters() if "." not in name}
        return {*called[: end + 1], *loose}

    def tail(self, stage: str) -> nn.Module | None:
        """No function: hooks do not show how the logits follow from a map."""
        return None


def _run_hooked(network: nn.Module, paths: Sequence[str], x_NCHW: Tensor) -> tuple[list[tuple[str, Any]], Any]:
    outputs: list[tuple[str, Any]] = []

    def note(path: str) -> Any:
        return lambda module, inputs, output: outputs.append((path, output))

    handles = [network.get_submodule(path).register_forward_hook(note(path)) for path in dict.fromkeys(paths)]
    try:
        result = network(x_NCHW)
    finally:
        for handle in handles:
            handle.remove()
    return outputs, result
