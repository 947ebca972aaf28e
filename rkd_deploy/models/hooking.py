"""Stage maps of a network that cannot be traced: hooks on its modules, while the whole network runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from rkd_deploy.models.stage_maps import Step
from rkd_deploy.models.tracing import Reader, in_mode


class Hooked:
    """What `tracing.Traced` gives, of any network: only modules have names here, and nothing can be cut off.

    Args:
        network: Its weights stay where they are.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    one_answer = True
    """Not known before it is run in training."""

    def knows(self, stage: str) -> bool:
        """Whether there is a module of this name."""
        return bool(stage) and stage in dict(self.network.named_modules())

    def reader(self, stages: Sequence[str], answer: bool) -> Reader:
        """From (holder, images) to the tuple of what stages give, with the network's answer last if it is wanted."""

        def read(holder: nn.Module, x_NCHW: Tensor) -> tuple[Any, ...]:
            network: nn.Module = holder.get_submodule("network")
            found, result = _run(network, stages, x_NCHW)
            last = dict(found)
            return (*(last[stage] for stage in stages), *([result] if answer else []))

        return read

    def steps(self, x_NCHW: Tensor, stages: Sequence[str], answer: bool) -> list[Step]:
        """What the network's modules give, in eval mode, up to the last of these stages, or to its answer."""
        modules = dict(self.network.named_modules())
        with in_mode(self.network, False):
            found, _ = _run(self.network, list(modules), x_NCHW)
        return [
            Step(name, type(modules[name]).__name__, tuple(value.shape), True)
            for name, value in found
            if isinstance(value, Tensor) and name
        ]

    def used_modules(self, x_NCHW: Tensor, stages: Sequence[str]) -> set[str]:
        """Paths of the modules that are called before these stages have given their maps, and of all loose tensors."""
        with in_mode(self.network, False):
            found, _ = _run(self.network, [name for name, _ in self.network.named_modules()], x_NCHW)
        called = [name for name, _ in found]
        end = max(index for index, name in enumerate(called) if name in stages)
        loose = {name for name, tensor in self.network.named_parameters() if "." not in name}
        return {*called[: end + 1], *loose}

    def tail(self, stage: str) -> nn.Module | None:
        """Unknown: None."""
        return None


def _run(network: nn.Module, paths: Sequence[str], x_NCHW: Tensor) -> tuple[list[tuple[str, Any]], Any]:
    found: list[tuple[str, Any]] = []

    def note(path: str) -> Any:
        return lambda module, inputs, output: found.append((path, output))

    handles = [network.get_submodule(path).register_forward_hook(note(path)) for path in dict.fromkeys(paths)]
    try:
        result = network(x_NCHW)
    finally:
        for handle in handles:
            handle.remove()
    return found, result
