"""Imports runtimes with their telemetry off, so that none of them calls home.

None writes an identifier into the home folder either.

ONNX Runtime reads ORT_DISABLE_TELEMETRY when it is imported. OpenVINO has no such variable: it sends an event as soon
as it is imported, through the package openvino_telemetry, and takes a stub of its own where that cannot be imported. A
program that imports one of them before this package decides for itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from rkd_deploy.errors import require

_PACKAGE = "openvino_telemetry"

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def require_runtime(package: str, extra: str) -> ModuleType:
    """Import a runtime's library; arguments and errors as for `errors.require`."""
    if package in sys.modules:
        return require(package, extra)
    with _without_telemetry():
        return require(package, extra)


@contextmanager
def _without_telemetry() -> Iterator[None]:
    if _PACKAGE in sys.modules:
        yield
        return
    sys.modules[_PACKAGE] = None  # type: ignore[assignment]  # Python's own way to say: cannot be imported
    try:
        yield
    finally:
        sys.modules.pop(_PACKAGE, None)
