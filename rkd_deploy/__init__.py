"""Residual knowledge distillation, from a teacher to a fused, measured, embeddable model.

Names are resolved when they are first used: importing this package imports neither torch nor onnxruntime.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rkd_deploy.backends import Backend, RunOn, load_backend
    from rkd_deploy.bench.parity import verify
    from rkd_deploy.bench.timing import measure
    from rkd_deploy.card import ModelCard, Preprocess
    from rkd_deploy.errors import RkdError
    from rkd_deploy.export.bundle import export_bundle
    from rkd_deploy.export.fusion import fuse
    from rkd_deploy.models.separation.separate import Separation, separate
    from rkd_deploy.recipe import Recipe, read_recipe
    from rkd_deploy.serve.classifier import Classifier, Prediction, load
    from rkd_deploy.train.fitting import fit

__version__ = "0.1.0"

_HOMES = {
    "read_recipe": "recipe",
    "Recipe": "recipe",
    "fit": "train.fitting",
    "separate": "models.separation.separate",
    "Separation": "models.separation.separate",
    "fuse": "export.fusion",
    "export_bundle": "export.bundle",
    "load": "serve.classifier",
    "Classifier": "serve.classifier",
    "Prediction": "serve.classifier",
    "load_backend": "backends",
    "Backend": "backends",
    "RunOn": "backends",
    "measure": "bench.timing",
    "verify": "bench.parity",
    "ModelCard": "card",
    "Preprocess": "card",
    "RkdError": "errors",
}

_EXTRAS = {"train": "train", "models": "train", "export": "export"}
"""Rooms whose names need PyTorch, to the extra that brings it."""

__all__ = [
    "Recipe",
    "read_recipe",
    "fit",
    "Separation",
    "separate",
    "fuse",
    "export_bundle",
    "Backend",
    "Classifier",
    "Prediction",
    "load",
    "load_backend",
    "RunOn",
    "measure",
    "verify",
    "ModelCard",
    "Preprocess",
    "RkdError",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES[name]
    try:
        value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    except ModuleNotFoundError as error:
        from rkd_deploy.errors import MissingDependencyError, install_line

        stage = home.split(".")[0]
        if isinstance(error, MissingDependencyError) or stage not in _EXTRAS:
            raise
        raise MissingDependencyError(
            f"{error.name} is needed for {name} and is not installed. Install it with: {install_line(_EXTRAS[stage])}"
        ) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    from importlib.util import find_spec

    # Without PyTorch its names are left out: help(rkd_deploy) asks for every name that stands here.
    hidden = () if find_spec("torch") else [name for name in _HOMES if _HOMES[name].split(".")[0] in _EXTRAS]
    return sorted({*globals(), *__all__}.difference(hidden))
