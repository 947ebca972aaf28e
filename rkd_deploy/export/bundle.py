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
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import io
import json
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rkd_deploy.backends import RunOn
from rkd_deploy.backends.files import CARD_NAME, ONNX_NAME, with_checksums
from rkd_deploy.bench.parity import GOLDEN_NAME, gate, verify
from rkd_deploy.bench.timing import Progress
from rkd_deploy.card import ModelCard
from rkd_deploy.errors import CheckpointError, UsageError, require
from rkd_deploy.export.early_exit import EarlyExit, Exits, check
from rkd_deploy.export.fusion import fuse
from rkd_deploy.export.graph import ExportGraph, append_card, to_onnx, to_program
from rkd_deploy.export.measuring import Choice, Target, choose_level
from rkd_deploy.export.precision.convert import insist, lower, unjudged
from rkd_deploy.export.precision.gate import HeldOut
from rkd_deploy.export.precision.images import Lowering
from rkd_deploy.export.precision.options import AUTO, PrecisionOptions
from rkd_deploy.export.proving import (
    TOLERANCE,
    Array,
    Batches,
    Proof,
    account,
    check_stated_accuracy,
    npz,
    prove,
    prove_lowered,
    random_batch,
    reference_of,
)
from rkd_deploy.fields import check_number
from rkd_deploy.images import as_input, normalise
from rkd_deploy.models.logits import check_ends_in_logits
from rkd_deploy.storage import new_folder, write_bytes, write_json, write_text


def check_finite(model: nn.Module) -> None:
    """Refuse a network with a weight or a statistic that is NaN or infinite.

    Raises:
        CheckpointError: There is one; the message names the tensor and counts.
    """
    for name, tensor in model.state_dict().items():
        if tensor.dtype.is_floating_point and not torch.isfinite(tensor).all():
            count = int((~torch.isfinite(tensor)).sum())
            raise CheckpointError(
                f"{count} of the {tensor.numel()} values of {name} are NaN or infinite; a network is exported only "
                "where all are finite. Take an earlier checkpoint, or train again with a lower train.lr."
            )


def give_back() -> None:
    """Let the C library return to the system what was freed, where it is glibc.

    It keeps freed blocks of up to 32 MB for itself, as large as weights are, and what loads a model next takes its own
    besides: of a ResNet-18's export that was a tenth of the peak.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


PACKAGES = ("rkd-deploy", "torch", "onnx", "onnxscript", "onnxruntime")
"""Whose versions the card names."""


def export_bundle(
    model: nn.Module,
    card: ModelCard,
    folder: Path,
    *,
    batches: Batches | None = None,
    level: str = "tail",
    outputs: Sequence[str] = ("logits",),
    tolerance: float = TOLERANCE,
    with_pytorch: bool = False,
    early_exit: EarlyExit | None = None,
    target: Target | None = None,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
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
        note: Called with the name of each stage as it begins.
        lowering: Lower the precision of the proven float32 graph, and judge what comes out of that on held-out images.

    Raises:
        CheckpointError: A weight is NaN or infinite.
        DivergenceError: All weights are finite, and the network's logits are not.
        ExportError: ONNX has no operator for something in the network; the message names it and its module.
        GateError: The exported graph does not do what the model does, the model has another accuracy than its card
            states, or a lower precision loses more than its limits allow; then FOLDER.report.json says what was tried.
            Nothing else is left behind.
        StorageError: The folder exists, or the disk is full; nothing is left behind.
        UsageError: The network gives probabilities; unknown level or outputs, a target without level `auto` or not that
            of `lowering`; early exit of a network that has no branches.
    """
    note = note or (lambda stage: None)
    check_number("--tolerance", tolerance, 0)
    if with_pytorch and lowering is not None:
        raise UsageError(
            f"model.pt2 would be float32 and model.onnx {lowering.options.precision}. Leave one of --with-pytorch and "
            "--precision out."
        )
    if lowering is not None and early_exit is not None:
        _check_named_layers(lowering.options, level)
    check_finite(model)
    noise_NCHW = torch.from_numpy(normalise(random_batch(card, 2)[0], card.preprocess))
    check_ends_in_logits(model.cpu(), noise_NCHW, f"the network {type(model).__name__}")
    onnx = require("onnx", "export")
    preprocess = card.preprocess
    branches = None if early_exit is None else check(model, early_exit)
    with new_folder(folder) as temporary:
        note("fusing and converting to ONNX")
        choice = _fused(model.cpu(), card, outputs, level, target, progress, lowering)
        card = dataclasses.replace(
            card,
            outputs=tuple(outputs),
            fusion=choice.level if card.part in ("fused", "student") else "none",
            fusion_search=choice.summary,
            versions={"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        )
        file = temporary / ONNX_NAME
        _write(choice.proto, file)
        # A proof takes memory enough without two more copies of the network: what needs the graph reads it back.
        fused, choice = choice.network, dataclasses.replace(choice, network=model, proto=None)
        graph = ExportGraph(fused, preprocess, outputs).eval() if lowering is not None or with_pytorch else None
        del fused
        give_back()
        reference = reference_of(model, card)
        images = batches or [random_batch(card)]
        note("proving against PyTorch")
        proof, golden = prove(reference, file, card, images, tolerance)
        check_stated_accuracy(proof, card)
        card = dataclasses.replace(card, parity=account(proof))
        if branches is not None:
            note("converting each branch, for early exit")
        exits = None if branches is None else Exits(temporary, branches, card, images, tolerance)
        if lowering is not None:
            note(f"converting to {lowering.options.precision} and judging on held-out images")
            inputs, prover = _calibration_inputs(lowering, card), lowering.options.prover
            held_out = HeldOut(reference, lowering.held_out, card)
            assert graph is not None
            lowered = lower(graph, onnx.load(file), preprocess, inputs, held_out, lowering.options)
            insist(lowered, lowering, card, folder)
            _write(lowered.proto, file)
            proof, golden = prove_lowered(proof, golden, lowered.judgement, lowered.kept, file, card, images, prover)
            told = {**lowered.account(lowering), "test_top1": proof.lowered_top1}
            card = dataclasses.replace(card, precision=lowering.options.precision, lowering=told)
            if exits is not None:
                insist(exits.lower(lowering, inputs), lowering, card, folder)
        if exits is not None and early_exit is not None:
            note("measuring what early exit saves")
            card = dataclasses.replace(card, early_exit=exits.report(early_exit))
        note("writing and verifying the bundle")
        append_card(file, card)
        write_text(temporary / "labels.txt", "".join(f"{label}\n" for label in card.labels))
        write_text(temporary / "preprocessor_config.json", json.dumps(preprocess.to_hugging_face(), indent=2) + "\n")
        write_bytes(temporary / GOLDEN_NAME, npz(golden))
        if with_pytorch and graph is not None:
            buffer = io.BytesIO()
            torch.export.save(to_program(graph, preprocess), buffer)
            write_bytes(temporary / "model.pt2", buffer.getvalue())
        if choice.record:
            write_json(temporary / "fusion.json", choice.record)
        write_text(temporary / CARD_NAME, with_checksums(card, temporary))
        prover = "onnxruntime" if lowering is None else lowering.options.prover
        gate(verify(temporary, prover), f"{ONNX_NAME} against its golden data", card.precision)
    return proof


def _write(proto: Any, file: Path) -> None:
    """Without metadata, those of converters and quantisers included: the card is appended in the end."""
    del proto.metadata_props[:]
    write_bytes(file, proto.SerializeToString(deterministic=True))


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
        return to_onnx(ExportGraph(network, card.preprocess, outputs).eval(), card.preprocess, unfused=model)

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
        return unjudged(graph, to_onnx(graph, card.preprocess, unfused=model), card.preprocess, inputs, asked)

    choice = choose_level(model, lowered, _measured_on(target, asked), progress)
    summary = {**choice.summary, "precision": asked.precision, "target": asked.runtime} if choice.summary else {}
    return dataclasses.replace(choice, proto=float32(choice.network), summary=summary)


def _measured_on(target: Target | None, asked: PrecisionOptions) -> Target:
    """Where level auto measures files of lower precision."""
    target = target or Target(RunOn(asked.runs_on[0]))
    if target.run_on.backend not in asked.runs_on:
        raise UsageError(
            f"Level auto would measure on {target.run_on.backend} files that are written for --target {asked.runtime}, "
            f"which {' or '.join(asked.runs_on)} is to run. Measure on that, on the machine it is for, or name a level."
        )
    if asked.keep not in ((), (AUTO,)):
        raise UsageError(
            f"--keep {','.join(asked.keep)} names layers of one fusion level, and level auto compares several. Name "
            "the level too, or use --keep auto."
        )
    return target


def _calibration_inputs(lowering: Lowering, card: ModelCard) -> Array | None:
    """Images to calibrate on, as the graph takes them."""
    return None if lowering.calibration is None else as_input(lowering.calibration.images_NHWC, card.preprocess)


def _check_named_layers(asked: PrecisionOptions, level: str) -> None:
    """Early exit and lower precision: a layer has one name in all graphs, or is found by the package."""
    if level != "tail" and asked.keep not in ((), (AUTO,)):
        raise UsageError(
            f"--keep {','.join(asked.keep)} names layers of level {level}, and the graphs for early exit have those of "
            "level tail. Use --fuse tail, or --keep auto."
        )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "not installed"
