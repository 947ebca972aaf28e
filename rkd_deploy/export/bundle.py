"""The bundle: one folder with everything an app needs, proven before it gets its name.

    model.onnx                one file, the card inside
    model.json                the same card with the SHA-256 of every file, for readers without ONNX metadata
    labels.txt                one class name a line
    preprocessor_config.json  Hugging Face's field names
    golden.npz                inputs, the logits for them, and the tolerance
    model.pt2                 on request: the same graph as an exported PyTorch program
    student.onnx, assistant_1.onnx, ..   on request: S and each A alone, for early exit
    fusion.json               where the level was chosen by measuring: the whole measurement

The folder appears whole or not at all. The same model and settings give the same bytes; level `auto` alone depends on
the moment, and the card says which level it chose.

Golden logits are PyTorch's where the file is float32. A file of lower precision is not PyTorch's equal: there they are
what the file itself gave on the backend that it was proven on, with PyTorch's beside them (`fp32_logits`), and the
tolerance is the largest difference between the two on the held-out images. Whatever runs the file elsewhere may round
otherwise, but not by more than the precision itself costs.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from rkd_deploy.card import ModelCard
from rkd_deploy.errors import GateError, UsageError
from rkd_deploy.export.early_exit import EarlyExit, check, write_exits
from rkd_deploy.export.fusion import fuse
from rkd_deploy.export.graph import ExportGraph, stamp, to_onnx, to_program
from rkd_deploy.export.judging import HeldOut, Judgement, as_input, failed
from rkd_deploy.export.lowering import Lowered, lower, unjudged
from rkd_deploy.export.precision import AUTO, Lowering, PrecisionOptions
from rkd_deploy.export.selection import Choice, Target, choose_level
from rkd_deploy.export.weights import check_finite
from rkd_deploy.serve.backends import infer_many, load_backend
from rkd_deploy.serve.backends.pytorch import PyTorchBackend
from rkd_deploy.serve.bench.accuracy import top1
from rkd_deploy.serve.bench.parity import GOLDEN_NAME, Parity, compare, gate, verify
from rkd_deploy.serve.bench.timing import Progress
from rkd_deploy.serve.checksums import CARD_NAME, sealed
from rkd_deploy.serve.files import ONNX_NAME
from rkd_deploy.storage import new_folder, write_bytes, write_json, write_text

TOLERANCE = 1e-4
"""Largest difference of a float32 logit between PyTorch and the exported graph."""

ALLOWED_PER_10000 = 2
"""Images in 10,000 that may be classified otherwise than by PyTorch: near ties that rounding decides."""

Array = npt.NDArray[Any]
Golden = dict[str, Any]
"""Arrays of golden.npz by name."""


@dataclass(frozen=True)
class Proof:
    """What the gate saw.

    Attributes:
        parity: Logits of the exported graph against PyTorch's.
        images: How many images were classified by both.
        differing: How many of them otherwise.
        torch_top1: PyTorch's accuracy on them in percent, where labels were given.
        onnx_top1: The exported float32 graph's.
        judgement: Of the file of lower precision, on held-out images; None for float32.
        lowered_top1: Its accuracy on the images above. Nothing was chosen by it.
    """

    parity: Parity
    images: int
    differing: int
    torch_top1: float | None
    onnx_top1: float | None
    judgement: Judgement | None = None
    lowered_top1: float | None = None


def export_bundle(
    model: nn.Module,
    card: ModelCard,
    folder: Path,
    *,
    batches: Iterable[tuple[Array, Array]] | None = None,
    level: str = "tail",
    outputs: Sequence[str] = ("logits",),
    tolerance: float = TOLERANCE,
    with_pytorch: bool = False,
    early_exit: EarlyExit | None = None,
    target: Target | None = None,
    progress: Progress | None = None,
    lowering: Lowering | None = None,
) -> Proof:
    """Fuse, export, prove, and only then let the folder appear.

    Args:
        model: Normalised float images [N, C, H, W] to logits [N, K]: S with A, S alone, or any classifier.
        card: What is known of it; its fusion, outputs, parity and versions are filled in here.
        folder: Where the bundle goes; must not exist.
        batches: Real images, uint8 [n, H, W, C], with labels [n]: every one is run through both. Without any, random
            images take their place and nothing is said of accuracy. Gone through twice for a lower precision.
        level: Fusion level (`rkd_deploy.export.fusion`), or ``"auto"``; of a classifier without adapters only batch
            norm is folded.
        outputs: Any of logits, probabilities, features.
        tolerance: Largest allowed difference of a logit.
        with_pytorch: Write model.pt2 too.
        early_exit: Write a graph of each branch too, to run one after the other (`rkd_deploy.export.early_exit`).
        target: What level `auto` measures on, files of lower precision included. Default: batch 1 on the CPU with ONNX
            Runtime, or on what `lowering` is for.
        progress: Told how far that is.
        lowering: Lower the precision of the proven float32 graph, and judge what comes out of that on held-out images.

    Raises:
        CheckpointError: A weight is NaN or infinite.
        GateError: The exported graph does not do what the model does, or a lower precision loses more than its limits
            allow; then FOLDER.report.json says what was tried. Nothing else is left behind.
        StorageError: The folder exists, or the disk is full; nothing is left behind.
        UsageError: Unknown level or outputs, a target without level `auto` or not that of `lowering`; early exit of a
            network that has no branches, or together with `lowering`.
    """
    if with_pytorch and lowering is not None:
        raise UsageError(
            f"model.pt2 would be float32 and model.onnx {lowering.options.precision}. Leave one of --with-pytorch and "
            "--precision out."
        )
    if lowering is not None and early_exit is not None:
        raise UsageError(
            f"--precision {lowering.options.precision} lowers one graph, model.onnx. Early exit adds up the logits of "
            "several, S's and each A's: rounded one by one, their sums are those of another network, which no gate "
            "here has judged, and the threshold was chosen for float32 confidences. Export two bundles: one with "
            "--early-exit, one with --precision."
        )
    check_finite(model)
    preprocess = card.preprocess
    branches = None if early_exit is None else check(model)
    choice = _fused(model.cpu(), card, outputs, level, target, progress, lowering)
    graph, proto = ExportGraph(choice.network, preprocess, outputs).eval(), choice.proto
    card = dataclasses.replace(
        card,
        outputs=tuple(outputs),
        fusion=choice.level if card.part in ("fused", "student") else "none",
        fusion_search=choice.summary,
        versions={name: _version(name) for name in ("rkd-deploy", "torch", "onnx", "onnxscript", "onnxruntime")},
    )
    with new_folder(folder) as temporary:
        file = temporary / ONNX_NAME
        stamp(proto, card)
        write_bytes(file, proto.SerializeToString(deterministic=True))
        reference = _reference(model, card)
        images = batches or [_random_batch(card)]
        proof, golden = _prove(reference, file, card, images, tolerance)
        card = dataclasses.replace(card, parity=_account(proof))
        if early_exit is not None and branches is not None:
            card = dataclasses.replace(card, early_exit=write_exits(temporary, branches, card, early_exit, tolerance))
        if lowering is not None:
            lowered = _lowered(graph, proto, card, reference, lowering, folder)
            proto = lowered.proto
            write_bytes(file, proto.SerializeToString(deterministic=True))
            proof, golden = _measure(proof, golden, lowered.judgement, file, card, images, lowering)
            account = {**lowered.account(lowering), "test_top1": proof.lowered_top1}
            card = dataclasses.replace(card, precision=lowering.options.precision, lowering=account)
        stamp(proto, card)
        write_bytes(file, proto.SerializeToString(deterministic=True))
        write_text(temporary / "labels.txt", "".join(f"{label}\n" for label in card.labels))
        write_text(temporary / "preprocessor_config.json", json.dumps(preprocess.to_hugging_face(), indent=2) + "\n")
        write_bytes(temporary / GOLDEN_NAME, _npz(golden))
        if with_pytorch:
            buffer = io.BytesIO()
            torch.export.save(to_program(graph, preprocess), buffer)
            write_bytes(temporary / "model.pt2", buffer.getvalue())
        if choice.record:
            write_json(temporary / "fusion.json", choice.record)
        write_text(temporary / CARD_NAME, sealed(card, temporary))
        prover = "onnxruntime" if lowering is None else lowering.options.prover
        gate(verify(temporary, prover), f"{ONNX_NAME} against its golden data")
    return proof


def _fused(
    model: nn.Module,
    card: ModelCard,
    outputs: Sequence[str],
    level: str,
    target: Target | None,
    progress: Progress | None,
    lowering: Lowering | None,
) -> Choice:
    """The fused network and its float32 graph; level auto is chosen by the files that would ship."""

    def float32(network: nn.Module) -> Any:
        return to_onnx(ExportGraph(network, card.preprocess, outputs).eval(), card.preprocess)

    if level != "auto":
        if target is not None:
            raise UsageError(
                f"A target to measure on was given with level {level!r}, which is not measured: use level auto."
            )
        network = fuse(model, level)
        return Choice(level, network, float32(network))
    if lowering is None:
        return choose_level(model, float32, target or Target(), progress)
    asked, inputs = lowering.options, _calibration_inputs(lowering, card)

    def lowered(network: nn.Module) -> Any:
        graph = ExportGraph(network, card.preprocess, outputs).eval()
        return unjudged(graph, to_onnx(graph, card.preprocess), card.preprocess, inputs, asked)

    choice = choose_level(model, lowered, _measured_on(target, asked), progress)
    summary = {**choice.summary, "precision": asked.precision, "target": asked.runtime} if choice.summary else {}
    return dataclasses.replace(choice, proto=float32(choice.network), summary=summary)


def _measured_on(target: Target | None, asked: PrecisionOptions) -> Target:
    """Where level auto measures files of lower precision."""
    target = target or Target(backend=asked.runs_on[0])
    if target.backend not in asked.runs_on:
        raise UsageError(
            f"Level auto would measure on {target.backend} files that are written for --target {asked.runtime}, which "
            f"{' or '.join(asked.runs_on)} is to run. Measure on that, on the machine it is for, or name a level."
        )
    if asked.keep not in ((), (AUTO,)):
        raise UsageError(
            f"--keep {','.join(asked.keep)} names layers of one fusion level, and level auto compares several. Name "
            "the level too, or use --keep auto."
        )
    return target


def _calibration_inputs(lowering: Lowering, card: ModelCard) -> Array | None:
    """Images to calibrate on, as the graph takes them."""
    return None if lowering.calibration is None else as_input(lowering.calibration.images_NHWC, card)


def _lowered(
    graph: ExportGraph, proto: Any, card: ModelCard, reference: PyTorchBackend, lowering: Lowering, folder: Path
) -> Lowered:
    """The graph in lower precision, if it passes its gate; else a report beside the folder, and an error."""
    inputs = _calibration_inputs(lowering, card)
    held_out = HeldOut(reference, lowering.held_out, card)
    lowered = lower(graph, proto, card.preprocess, inputs, held_out, lowering.options)
    if not lowered.judgement.passed:
        report = folder.with_name(f"{folder.name}.report.json")
        write_json(report, {"name": card.name, **lowered.account(lowering), "versions": dict(card.versions)})
        raise failed(lowered.judgement, lowering.options.precision, lowered.kept, report)
    return lowered


def _measure(
    proof: Proof,
    golden: Golden,
    judgement: Judgement,
    file: Path,
    card: ModelCard,
    batches: Iterable[tuple[Array, Array]],
    lowering: Lowering,
) -> tuple[Proof, Golden]:
    """The proof and the golden data of a file of lower precision."""
    with load_backend(lowering.options.prover, file) as candidate:
        found, labels = [], []
        for images_NHWC, labels_n in batches:
            found.append(infer_many(candidate, as_input(images_NHWC, card)))
            labels.append(labels_n)
    found_NK = np.concatenate(found)
    proof = dataclasses.replace(proof, judgement=judgement, lowered_top1=_top1(found_NK, np.concatenate(labels)))
    own = {"logits": found_NK[: len(golden["inputs"])], "tolerance": np.float64(max(TOLERANCE, judgement.max_abs_diff))}
    return proof, {**golden, **own, "fp32_logits": golden["logits"]}


def _reference(model: nn.Module, card: ModelCard) -> PyTorchBackend:
    """The unfused model behind the same pre-processing: what the exported graph is held against."""
    graph = ExportGraph(model, card.preprocess)
    shape = (None, *card.preprocess.input_shape)
    return PyTorchBackend(graph, input_shape=shape, input_dtype=card.preprocess.input_dtype)


def _prove(
    reference: PyTorchBackend, file: Path, card: ModelCard, batches: Iterable[tuple[Array, Array]], tolerance: float
) -> tuple[Proof, Golden]:
    """Run both over every image; gate on logits and on classes."""
    labels, expected, found, first = [], [], [], None
    with load_backend("onnxruntime", file) as candidate:
        for images_NHWC, labels_n in batches:
            x = as_input(images_NHWC, card)
            first = x[:8] if first is None else first
            expected.append(infer_many(reference, x))
            found.append(infer_many(candidate, x))
            labels.append(labels_n)
    expected_NK, found_NK, labels_N = np.concatenate(expected), np.concatenate(found), np.concatenate(labels)
    parity = compare(expected_NK, found_NK, tolerance)
    gate(parity, f"{ONNX_NAME} on onnxruntime against PyTorch")
    proof = Proof(
        parity=parity,
        images=parity.n,
        differing=int((expected_NK.argmax(1) != found_NK.argmax(1)).sum()),
        torch_top1=_top1(expected_NK, labels_N),
        onnx_top1=_top1(found_NK, labels_N),
    )
    allowed = math.ceil(proof.images * ALLOWED_PER_10000 / 10000)
    if proof.differing > allowed:
        raise GateError(
            f"{ONNX_NAME} classifies {proof.differing} of {proof.images} images otherwise than PyTorch does; "
            f"allowed are {allowed} ({ALLOWED_PER_10000} in 10,000). Check the weights: float32 should not do that."
        )
    assert first is not None
    return proof, {"inputs": first, "logits": expected_NK[: len(first)], "tolerance": np.float64(tolerance)}


def _top1(logits_NK: Array, labels_N: Array) -> float | None:
    return None if (labels_N < 0).any() else top1(logits_NK.argmax(1), labels_N)


def _random_batch(card: ModelCard, count: int = 64) -> tuple[Array, Array]:
    """Random images without labels (-1)."""
    preprocess = card.preprocess
    shape = (count, preprocess.height, preprocess.width, preprocess.channels)
    images_NHWC = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return images_NHWC, np.full(count, -1)


def _npz(golden: Golden) -> bytes:
    """An .npz with fixed time stamps: np.savez would make every bundle differ."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, value in golden.items():
            array = io.BytesIO()
            np.save(array, np.ascontiguousarray(value) if np.ndim(value) else value, allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), array.getvalue())
    return buffer.getvalue()


def _account(proof: Proof) -> dict[str, Any]:
    return {
        **proof.parity.to_dict(),
        "differing": proof.differing,
        "torch_top1": proof.torch_top1,
        "onnx_top1": proof.onnx_top1,
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "not installed"
