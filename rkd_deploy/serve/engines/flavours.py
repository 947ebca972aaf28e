"""TensorRT and TensorRT-RTX: two libraries with one programming interface, and the few places where they part.

TensorRT 10 and 11 and TensorRT-RTX 1 share every name that is used here, save those behind `Flavour.is_rtx` and
`Flavour.major`; a test holds each of our calls against the libraries' own bindings.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

from rkd_deploy.errors import BackendError, install_line, require, unknown_name

PACKAGES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Flavour to import name."""

OLDEST_TENSORRT = 10


@dataclass(frozen=True)
class Flavour:
    """One of the two libraries, imported."""

    name: str
    """tensorrt or tensorrt-rtx."""
    trt: Any
    """The module."""
    log: Any
    """The logger that every object of the library is made with; see `drain`."""
    messages: list[str] = field(repr=False)

    @property
    def is_rtx(self) -> bool:
        """Whether this is TensorRT-RTX."""
        return self.name == "tensorrt-rtx"

    @property
    def version(self) -> str:
        """Of the library, e.g. 11.4.0.106."""
        return str(self.trt.__version__)

    @property
    def major(self) -> int:
        """First number of the version."""
        return int(self.version.split(".")[0])

    def drain(self) -> str:
        """What the library complained of since the last call, as one line; it returns None where others raise."""
        lines = [" ".join(message.split()) for message in self.messages]
        self.messages.clear()
        return "; ".join(dict.fromkeys(lines)) or "the library gave no reason"


@cache
def load_flavour(name: str) -> Flavour:
    """Import one of the two.

    Args:
        name: tensorrt or tensorrt-rtx.

    Raises:
        MissingDependencyError: It is not installed.
        BackendError: It is older than TensorRT 10.
    """
    if name not in PACKAGES:
        raise BackendError(unknown_name("engine flavour", name, PACKAGES))
    trt = require(PACKAGES[name], name)
    messages: list[str] = []
    flavour = Flavour(name, trt, _logger(trt, messages), messages)
    if not flavour.is_rtx and flavour.major < OLDEST_TENSORRT:
        raise BackendError(
            f"TensorRT {flavour.version} is installed; strongly typed networks, which keep the precision that the ONNX "
            f"file is written in, need TensorRT {OLDEST_TENSORRT} or newer. Update with: {install_line(name)}"
        )
    return flavour


def _logger(trt: Any, messages: list[str]) -> Any:
    """Collects errors: TensorRT keeps the first logger of a process for good, so there is one for each library."""

    class Collector(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                messages.append(message)

    return Collector()
