"""torch.onnx's exporter without its detours: the same file, in half of the time for small networks."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def quick_exporter(graph: nn.Module, x: Tensor) -> Iterator[None]:
    """While torch.onnx.export converts this graph, it says nothing and does nothing twice.

    Args:
        graph: In eval mode.
        x: The example of its input, of which type and shape count.
    """
    with _quiet(), _out_of_place(graph, _random(x)), _operators_read_once():
        yield


@contextmanager
def _out_of_place(graph: nn.Module, x: Tensor) -> Iterator[None]:
    """Activations leave their input alone, if nobody reads it afterwards: one that overwrites it costs 0.1 s."""
    overwriting: list[Any] = [module for module in graph.modules() if getattr(module, "inplace", False) is True]
    try:
        with torch.no_grad():
            overwritten = graph(x) if overwriting else None
            for module in overwriting:
                module.inplace = False
            if overwriting and not _same(overwritten, graph(x)):  # a shortcut, say, that means what was overwritten
                for module in overwriting:
                    module.inplace = True
        yield
    finally:
        for module in overwriting:
            module.inplace = True


def _random(x: Tensor) -> Tensor:
    """An input of the same kind that reaches both sides of an activation."""
    generator = torch.Generator().manual_seed(0)
    if x.dtype.is_floating_point:
        return torch.randn(x.shape, generator=generator, dtype=x.dtype)
    return torch.randint(256, x.shape, generator=generator, dtype=x.dtype)


def _same(one: Any, other: Any) -> bool:
    pairs = zip(one, other, strict=True) if isinstance(one, tuple) else [(one, other)]
    return all(torch.equal(a, b) for a, b in pairs)


@contextmanager
def _operators_read_once() -> Iterator[None]:
    """The table of ONNX's operators is kept: for every file, 500 functions are parsed from their source, for 1 s.

    These names are torch's own business. Where another version has others, it takes its second.
    """
    try:
        from torch.onnx._internal.exporter import _registration

        registration: Any = _registration
        library = registration.onnxscript_apis
        original = library.get_torchlib_ops
    except (ImportError, AttributeError):
        yield
        return
    library.get_torchlib_ops = functools.partial(_kept, original)
    try:
        yield
    finally:
        library.get_torchlib_ops = original


@functools.cache
def _kept(read: Any) -> Any:
    return read()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's own progress and deprecation notes away from people who can do nothing about them."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)
