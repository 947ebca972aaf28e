"""The exceptions of rkd-deploy, and the exit code each one ends a command with.

    RkdError                      1  could not be done
    +-- UsageError                2  wrong usage: an unknown name, a value outside its rule
    |   `-- RecipeError           2  a recipe key or value that cannot be
    +-- MissingDependencyError    1  an optional package is not installed
    +-- BackendError              1  a backend cannot run here, or not where it was asked to
    +-- DataError                 1  images or labels missing, broken, or not fitting the model
    +-- CheckpointError           1  weights missing, foreign, truncated
    +-- BudgetError               1  no student and assistant fit the budget
    +-- ExportError               1  a network that cannot be written as an ONNX graph
    +-- ModelFileError            1  a bundle, card or ONNX file is missing, corrupt, or too new
    +-- StorageError              1  a file could not be written whole (disk full, no permission)
    +-- DivergenceError           1  the training loss is no longer finite
    +-- InterruptedTraining     130  stopped by a signal; the checkpoint is written
    +-- InterruptedBench        130  stopped by a signal; what was measured is written, marked as partial
    `-- GateError                 3  a gate failed: parity, accuracy

Every message carries three things: the value that was found, the rule it breaks, and the way out.
"""

from __future__ import annotations

import difflib
import importlib
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

EXTRAS = {
    "torch": "train",
    "torchvision": "train",
    "torch_pruning": "train",
    "safetensors": "train",
    "sklearn": "train",
    "matplotlib": "train",
    "timm": "timm",
    "webdataset": "webdataset",
    "tensorboard": "tensorboard",
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "cpu",
    "openvino": "openvino",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "tensorrt-rtx",
    "cuda": "tensorrt",
    "modelopt": "quant",
    "starlette": "serve",
    "uvicorn": "serve",
    "executorch": "executorch",
    "mlperf_loadgen": "loadgen",
}
"""The extra of this package that brings each optional package, by its import name."""


class RkdError(Exception):
    """Base of every error this package raises on purpose."""

    exit_code = 1

    def __init__(self, *args: object, **options: Any) -> None:
        super().__init__(*(_without_endless_words(arg) if isinstance(arg, str) else arg for arg in args), **options)


class UsageError(RkdError, ValueError):
    """A name or value that the user gave and that cannot be."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe key or value that cannot be; the message names the key and the choices."""


class MissingDependencyError(RkdError, ImportError):
    """An optional package is not installed; the message ends in the exact install line."""


class BackendError(RkdError, RuntimeError):
    """A backend cannot run here, or would run elsewhere than it was asked to."""


class DataError(RkdError):
    """Images or labels are missing, broken, or do not fit the model."""


class CheckpointError(RkdError):
    """Weights are missing, truncated, or belong to another network."""


class BudgetError(RkdError, ValueError):
    """No student and assistant fit the budget."""


class ExportError(RkdError):
    """A network cannot be written as an ONNX graph; the message names the module and the operator."""


class ModelFileError(RkdError):
    """A bundle, card or ONNX file is missing, corrupt, or written by a newer schema."""


class StorageError(RkdError, OSError):
    """A file could not be written whole; what stood there before is intact."""


class DivergenceError(RkdError, ArithmeticError):
    """The training loss is no longer finite."""


class InterruptedTraining(RkdError):
    """Training was stopped by a signal, after its checkpoint was written."""

    exit_code = 130


class InterruptedBench(RkdError):
    """A bench was stopped by Ctrl-C or SIGTERM, after what it had measured was written."""

    exit_code = 130


class GateError(RkdError):
    """A gate failed: the exported file does not do what the trained model does."""

    exit_code = 3


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution; None where it is not installed."""
    from importlib.metadata import PackageNotFoundError, version  # slow to import, and every command imports this file

    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency, or say how to install it.

    Args:
        module: Import name, e.g. ``"onnxruntime"``.
        extra: The extra of this package that brings it, e.g. ``"cpu"``.

    Raises:
        MissingDependencyError: The package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # A module that exists but fails to import one of its own parts is a broken installation: let that be seen.
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingDependencyError(
            f"{module} is needed here and is not installed. Install it with: {install_line(extra)}"
        ) from error


def missing_package(error: ModuleNotFoundError) -> MissingDependencyError | None:
    """The error for an optional package that an import did not find; None for any other module."""
    package = (error.name or "").split(".")[0]
    if package not in EXTRAS:
        return None
    return MissingDependencyError(
        f"{package} is needed here and is not installed. Install it with: {install_line(EXTRAS[package])}"
    )


def command_line(*words: object) -> str:
    """An rkd-deploy command to paste into a shell, each word quoted where it has to be."""
    return shlex.join(["rkd-deploy", *map(_argument, words)])


def _argument(word: object) -> str:
    # A path that begins with a dash would be taken for an option.
    return f"./{word}" if isinstance(word, Path) and str(word).startswith("-") else str(word)


def install_line(extra: str) -> str:
    """The exact pip command that brings an extra."""
    return f"pip install 'rkd-deploy[{extra}]'"


_LONGEST_WORD = 1000


def _without_endless_words(message: str) -> str:
    """A message whose words, a path of thousands of characters for example, are cut in their middle."""
    return re.sub(rf"\S{{{_LONGEST_WORD},}}", _cut, message)


def _cut(word: re.Match[str]) -> str:
    text = word[0]
    return f"{text[:100]}[{len(text) - 200:,} characters]{text[-100:]}"


def shortened(value: object) -> str:
    """A value as Python writes it, at most 80 characters of it, for messages."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a whole number of thousands of digits; lists too deep in one another
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= 80 else f"{text[:77]}..."


def unknown_name(kind: str, name: object, choices: Iterable[str]) -> str:
    """Sentence for a name that is none of the choices: the nearest one first, then all of them."""
    names = sorted(choices)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"Unknown {kind} {shortened(name)}.{hint} Choices: {', '.join(names)}."
