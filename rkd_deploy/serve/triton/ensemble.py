"""Makes a Triton model answer encoded images: an ensemble of pre-processing and model.

NAME-pixels/    BYTES to what NAME takes: the python backend with `rkd_deploy.images`, copied into each version
NAME-images/    the ensemble: BYTES -> NAME-pixels -> NAME
"""

from __future__ import annotations

from pathlib import Path

from rkd_deploy import images
from rkd_deploy.card import ModelCard
from rkd_deploy.serve.triton.config import ensemble_text, pixels_text
from rkd_deploy.serve.triton.signature import Batching, Signature

_CODE = Path(__file__).with_name("pixels.py")
_MODULES = ("card", "decoding", "errors", "fields", "image_folders", "images", "storage")
"""What `rkd_deploy.images` is made of; none of them needs more than numpy and Pillow."""
_KEEP = "An ensemble has no file of its own. Without this one, copies by object stores and git would lose the folder.\n"


def stage_names(model: str) -> tuple[str, str]:
    """The model that prepares images for a model, and the ensemble of both."""
    return f"{model}-pixels", f"{model}-images"


def configurations(model: str, signature: Signature, batching: Batching) -> dict[str, str]:
    """The text of config.pbtxt of both, by name."""
    pixels, ensemble = stage_names(model)
    return {
        pixels: pixels_text(pixels, signature.input, batching.most),
        ensemble: ensemble_text(ensemble, pixels, model, signature, batching.most),
    }


def pixels_files(card: ModelCard) -> dict[str, bytes]:
    """The files of a version that prepares images, by their names in its folder."""
    package = Path(images.__file__).parent
    files = {f"rkd_deploy/{module}.py": (package / f"{module}.py").read_bytes() for module in _MODULES}
    stub = b'"""The part of rkd-deploy that reads images, as it was when the model was exported."""\n'
    return {
        "model.py": _CODE.read_bytes(),
        "model.json": f"{card.to_json()}\n".encode(),
        "rkd_deploy/__init__.py": stub,
        **files,
    }


def ensemble_files() -> dict[str, bytes]:
    """The files of the ensemble's one version, by their names in its folder."""
    return {"keep.txt": _KEEP.encode()}
