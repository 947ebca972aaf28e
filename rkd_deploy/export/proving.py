"""Proves an exported graph against PyTorch, and makes the golden data that prove it again.

Golden logits are PyTorch's where the file is float32. A file of lower precision is not PyTorch's equal: there they are
what the file itself gave on the backend that it was proven on, with PyTorch's beside them (`fp32_logits`), and the
tolerance is the largest difference between the two on the held-out images. Whatever runs the file elsewhere may round
otherwise, but not by more than the precision itself costs.

golden.npz begins behind the pre-processing, where most deployments go wrong. golden/photo.jpg begins before it: every
app and server that runs a bundle can be held against golden/photo.json.
"""

from __future__ import annotations

import dataclasses
import io
import math
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rkd_deploy.backends import Array, RunOn, infer_many
from rkd_deploy.backends.files import ONNX_NAME
from rkd_deploy.backends.pytorch import PyTorchBackend
from rkd_deploy.bench.accuracy import top1
from rkd_deploy.bench.parity import GOLDEN_PHOTO, PHOTO_LOGITS, Parity, PhotoAnswer, compare_logits, gate
from rkd_deploy.card import ModelCard, Preprocess
from rkd_deploy.errors import GateError
from rkd_deploy.export.graph import ExportGraph
from rkd_deploy.export.precision.convert import PrecisionRecord
from rkd_deploy.images import as_input, to_array
from rkd_deploy.models.foreign import check_logits
from rkd_deploy.storage import write_bytes, write_json

TOLERANCE = 1e-4
"""Largest difference of a float32 logit between PyTorch and the exported graph."""

ALLOWED_PER_10000 = 2
"""Images in 10,000 that may be classified otherwise than by PyTorch: near ties that rounding decides."""

Golden = dict[str, Any]
"""Arrays of golden.npz by name."""
Batches = Iterable[tuple[Array, Array]]
"""Images uint8 [n, H, W, C] with labels [n]; -1 where they are not known."""


@dataclass(frozen=True)
class Proof:
    """What an exported graph was proven by.

    Attributes:
        parity: Logits of the exported graph against PyTorch's.
        images: How many images were classified by both.
        differing: How many of them otherwise.
        torch_top1: PyTorch's accuracy on them in percent, where labels were given.
        onnx_top1: The exported float32 graph's.
        conversion: How the file got its lower precision, and what the gate measured; None for float32.
        converted_top1: Accuracy of the file of lower precision on the images above. Nothing was chosen by it.
    """

    parity: Parity
    images: int
    differing: int
    torch_top1: float | None
    onnx_top1: float | None
    conversion: PrecisionRecord | None = None
    converted_top1: float | None = None


def reference_of(model: nn.Module, card: ModelCard) -> PyTorchBackend:
    """The unfused PyTorch model behind the same pre-processing, which the exported graph is held against."""
    graph = ExportGraph(model, card.preprocess)
    shape = (None, *card.preprocess.input_shape)
    return PyTorchBackend(graph, input_shape=shape, input_dtype=card.preprocess.input_dtype, shared=True)


def prove(
    reference: PyTorchBackend, file: Path, card: ModelCard, batches: Batches, tolerance: float
) -> tuple[Proof, Golden]:
    """Run the PyTorch model and its exported graph over every image, and hold logits and classes against each other.

    Raises:
        DivergenceError: A logit of the reference is not finite.
        GateError: A logit differs by more than the tolerance, or more images than a few are classified otherwise.
    """
    labels, expected, exported, first = [], [], [], None
    with RunOn().load(file) as candidate:
        for images_NHWC, labels_n in batches:
            x = as_input(images_NHWC, card.preprocess)
            first = x[:8] if first is None else first
            expected.append(infer_many(reference, x))
            check_logits(torch.from_numpy(expected[-1]), f"the network of {card.name}")
            exported.append(infer_many(candidate, x))
            labels.append(labels_n)
    expected_NK, exported_NK, labels_N = np.concatenate(expected), np.concatenate(exported), np.concatenate(labels)
    parity = compare_logits(expected_NK, exported_NK, tolerance)
    gate(parity, f"{ONNX_NAME} on onnxruntime against PyTorch", largest=float(np.abs(expected_NK).max()))
    proof = Proof(
        parity=parity,
        images=parity.n,
        differing=int((expected_NK.argmax(1) != exported_NK.argmax(1)).sum()),
        torch_top1=_top1(expected_NK, labels_N),
        onnx_top1=_top1(exported_NK, labels_N),
    )
    # Rounded up: one image is allowed of any number, since a tie of two logits is decided by the order of summation.
    allowed = math.ceil(proof.images * ALLOWED_PER_10000 / 10000)
    if proof.differing > allowed:
        raise GateError(
            f"{ONNX_NAME} classifies {proof.differing} of {proof.images} images otherwise than PyTorch does; "
            f"allowed are {allowed} ({ALLOWED_PER_10000} in 10,000). Check the weights: float32 should not do that."
        )
    assert first is not None
    return proof, {"inputs": first, "logits": expected_NK[: len(first)], "tolerance": np.float64(tolerance)}


STATED_WITHIN = 0.5
"""Points by which an accuracy may differ from what training stated: its device rounds otherwise than the CPU here."""


def check_stated_accuracy(proof: Proof, card: ModelCard) -> None:
    """Hold the accuracy of the network against what its card states, if both are of as many images.

    Raises:
        GateError: They differ: these are not the weights, or not the images, that were judged when it was trained.
    """
    stated, images = card.metrics.get("accuracy"), card.metrics.get("images")
    if stated is None or proof.torch_top1 is None or images != proof.images:
        return
    # Counts of images, not shares: rounding to the nearest image undoes the division by their number.
    allowed = math.ceil(STATED_WITHIN * proof.images / 100)
    if abs(round((proof.torch_top1 - stated) * proof.images / 100)) > allowed:
        raise GateError(
            f"{card.name} was tested at {stated:.2f} % of {images} images when it was trained, and is right on "
            f"{proof.torch_top1:.2f} % of as many now; {allowed} images more or fewer are allowed. Its weights or the "
            "images were changed since: restore them, or train again."
        )


def prove_converted(
    proof: Proof,
    golden: Golden,
    conversion: PrecisionRecord,
    file: Path,
    card: ModelCard,
    batches: Batches,
) -> tuple[Proof, Golden]:
    """Extend the proof and the golden data of a float32 file to the file of lower precision that was made of it."""
    with RunOn(conversion.job.options.prover).load(file) as candidate:
        answers, labels = [], []
        for images_NHWC, labels_n in batches:
            answers.append(infer_many(candidate, as_input(images_NHWC, card.preprocess)))
            labels.append(labels_n)
    logits_NK = np.concatenate(answers)
    accuracy = _top1(logits_NK, np.concatenate(labels))
    proof = dataclasses.replace(proof, conversion=conversion, converted_top1=accuracy)
    # Another runtime rounds the quantised file otherwise, by steps of the same size: the file's own distance from the
    # float32 logits is the yardstick, and never less than a float32 file is allowed.
    tolerance = np.float64(max(TOLERANCE, conversion.result.max_abs_diff))
    first = {"logits": logits_NK[: len(golden["inputs"])], "tolerance": tolerance}
    return proof, {**golden, **first, "fp32_logits": golden["logits"]}


def _top1(logits_NK: Array, labels_N: Array) -> float | None:
    return None if (labels_N < 0).any() else top1(logits_NK.argmax(1), labels_N)


def random_batch(card: ModelCard, count: int = 64) -> tuple[Array, Array]:
    """Random images without labels (-1)."""
    preprocess = card.preprocess
    shape = (count, preprocess.height, preprocess.width, preprocess.channels)
    images_NHWC = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return images_NHWC, np.full(count, -1)


def npz(golden: Golden) -> bytes:
    """Golden data as the bytes of an .npz with fixed time stamps: np.savez would make every bundle differ."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, value in golden.items():
            array = io.BytesIO()
            np.save(array, np.ascontiguousarray(value) if np.ndim(value) else value, allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), array.getvalue())
    return buffer.getvalue()


def parity_record(proof: Proof) -> dict[str, Any]:
    """A proof of the float32 graph as the card has it, under `parity`."""
    return {
        **proof.parity.to_dict(),
        "differing": proof.differing,
        "torch_top1": proof.torch_top1,
        "onnx_top1": proof.onnx_top1,
    }


_LEAST_SIDE = 240
"""Pixels of the golden photo's shorter side, at least: for a network of tiny images it is shrunk as a real one is."""


def draw_photo(preprocess: Preprocess) -> bytes:
    """A landscape as JPEG, larger than what the model takes and of another shape; the same bytes for the same rule.

    Each way to get the pre-processing wrong changes the result: left is not right and up not down (crop, orientation),
    red is not blue (colour order), and stripes as fine as a pixel turn into moire unless they are averaged.
    """
    from PIL import Image

    high, wide = preprocess.resize_to
    height, width = max(_LEAST_SIDE, 5 * high // 4), max(3 * _LEAST_SIDE // 2, 5 * wide // 3)
    y, x = np.mgrid[0:height, 0:width]
    v, u = y / height, x / width
    picture = np.stack([90 + 110 * v, 140 + 70 * v, 235 - 40 * v], axis=2)  # the sky, paler below
    picture[np.hypot(x - 0.62 * width, y - 0.25 * height) < 0.15 * height] = 250, 205, 70
    stripes = 64.0 * (((x + y) // 2) % 2)
    for base, swing, colour, ploughed in ((0.55, 0.10, (70, 105, 60), 0), (0.72, 0.06, (95, 55, 25), 1)):
        hill = v > base + swing * np.sin(7 * u + 9 * base) - 0.12 * u
        picture[hill] = np.array(colour) + ploughed * stripes[hill, np.newaxis]
    fence = (v > 0.6) & (u < 0.45) & (x % 9 < 3)
    picture[fence] = 235, 230, 220
    buffer = io.BytesIO()
    # Without subsampling of colours: libraries enlarge those differently, and that is not what is tested.
    Image.fromarray(picture.astype(np.uint8)).save(buffer, "JPEG", quality=75, subsampling=0)
    return buffer.getvalue()


def write_photo(folder: Path, card: ModelCard, infer: Callable[[Array], Array], tolerance: float) -> None:
    """Write the photo of a bundle, and what must be answered: logits, their tolerance, the best class.

    Args:
        folder: The bundle's.
        card: The bundle's.
        infer: The logits [N, K] of what the graph takes, by the same network as those in golden.npz.
        tolerance: Largest difference of a logit.
    """
    photo = folder / GOLDEN_PHOTO
    photo.parent.mkdir()
    write_bytes(photo, draw_photo(card.preprocess))
    logits_K = infer(as_input(to_array(photo, card.preprocess)[np.newaxis], card.preprocess))[0].astype(np.float64)
    exponentials_K = np.exp(logits_K - logits_K.max())
    best = int(logits_K.argmax())
    answer = PhotoAnswer(
        logits=tuple(logits_K.tolist()),
        tolerance=tolerance,
        label=card.labels[best],
        index=best,
        probability=float(exponentials_K[best] / exponentials_K.sum()),
    )
    write_json(folder / PHOTO_LOGITS, asdict(answer))
