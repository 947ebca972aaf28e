"""Says what in a network PyTorch's ONNX exporter cannot convert, and where it stands."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from rkd_deploy.errors import ExportError


def unsupported(network: nn.Module, capture: Callable[[], torch.export.ExportedProgram]) -> ExportError:
    """The error for a network that PyTorch's exporter would not convert.

    Args:
        network: Messages name paths of its modules.
        capture: Traces it for export, as the attribute `network` of a module.
    """
    with _entered(network) as path:
        try:
            program = capture()
        except Exception as failure:  # tracing breaks in any way that Python code can break on a symbol
            return ExportError(
                f"The network cannot be traced in {_named(network, path)}: {_first_line(failure)} Its operations must "
                "not depend on the values of an image: compute both ways and choose with torch.where, or replace the "
                "module before training."
            )
    try:
        torch.onnx.export(program, dynamo=True, verbose=False)
    except torch.onnx.errors.OnnxExporterError as error:
        operator, place = _operator(error, network)
        return ExportError(
            f"ONNX has no operator for {operator}, which is in {place}. Replace it by operations that ONNX has, or "
            f"take another network. PyTorch's exporter says: {_first_line(_causes(error)[-1])}"
        )
    return ExportError("The network can be exported before it is fused, and not after: name another level with --fuse.")


@contextmanager
def _entered(network: nn.Module) -> Iterator[list[str]]:
    """Follow a forward pass: yields the paths of the modules that it is inside of, the deepest last."""
    path: list[str] = []

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: path.append(name)

    def leave(*_: Any) -> None:
        path.pop()

    handles = []
    for name, module in network.named_modules():
        handles += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave)]
    try:
        yield path
    finally:
        for handle in handles:
            handle.remove()


def _named(network: nn.Module, path: list[str]) -> str:
    name = path[-1] if path else ""
    return f"{name} ({type(network.get_submodule(name)).__name__})" if name else f"{type(network).__name__} itself"


def _operator(error: BaseException, network: nn.Module) -> tuple[str, str]:
    """The operation that could not be translated and its module; only frames of the exporter know the node."""
    frames = [frame for cause in _causes(error) for frame, _ in traceback.walk_tb(cause.__traceback__)]
    nodes = [node for frame in frames if isinstance(node := frame.f_locals.get("node"), fx.Node)]
    if not nodes:
        return "an operation", type(network).__name__
    node = nodes[-1]
    *_, (path, _) = node.meta.get("nn_module_stack", {"": ("", "")}).values()
    return str(node.meta.get("original_aten", node.target)), _named(network, [path.partition(".")[2]])


def _causes(error: BaseException | None) -> list[BaseException]:
    return [] if error is None else [error, *_causes(error.__cause__)]


def _first_line(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text if text.endswith(".") else f"{text}."
