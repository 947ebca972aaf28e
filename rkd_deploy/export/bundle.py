"""Writes the bundle: a folder with everything an app needs, proven before it gets its name.

    model.onnx                one file, the card inside
    model.json                the same card with the SHA-256 of every file, for readers without ONNX metadata
    labels.txt                one class name a line
    preprocessor_config.json  Hugging Face's field names
    golden.npz                inputs, the logits for them, and the tolerance
    golden/photo.jpg, .json   a whole photo, and the logits for it: any app or server can be held against these two
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
from rkd_deploy.bench.graph_cost import graph_facts
from rkd_deploy.bench.parity import GOLDEN_NAME, gate, verify
from rkd_deploy.bench.timing import Progress
from rkd_deploy.card import ModelCard
from rkd_deploy.errors import CheckpointError, UsageError, require
from rkd_deploy.export.early_exit import EarlyExit, ExitGraphs, require_branches
from rkd_deploy.export.fusion import fuse
from rkd_deploy.export.graph import ExportGraph, append_card, to_onnx, to_program
from rkd_deploy.export.measuring import Choice, Target, choose_level
from rkd_deploy.export.precision.convert import convert, convert_ungated, require_passed
from rkd_deploy.export.precision.gate import HeldOut
from rkd_deploy.export.precision.images import PrecisionJob
from rkd_deploy.export.precision.options import AUTO, PrecisionOptions
from rkd_deploy.export.proving import (
    TOLERANCE,
    Array,
    Batches,
    Proof,
    check_stated_accuracy,
    npz,
    parity_record,
    prove,
    prove_converted,
    random_batch,
    reference_of,
    write_photo,
)
from rkd_deploy.fields import check_number
from rkd_deploy.images import as_input, normalise
from rkd_deploy.models.foreign import check_classifier, check_real, plain
from rkd_deploy.storage import new_folder, write_bytes, write_json, write_text


def check_finite(model: nn.Module) -> None:
    """Refuse a network with a weight or a statistic that is NaN or infinite.

    Raises:
        CheckpointError: There is such a weight; the message names the tensor and counts.
    """
    for name, tensor in model.state_dict().items():
        if tensor.dtype.is_floating_point and not torch.isfinite(tensor).all():
            count = int((~torch.isfinite(tensor)).sum())
            raise CheckpointError(
                f"{count} of the {tensor.numel()} values of {name} are NaN or infinite; a network is exported only "
                "where all are finite. Take an earlier checkpoint, or train again with a lower train.lr."
            )


def trim_memory() -> None:
    """Let the C library return freed memory to the system, where it is glibc.

    It keeps freed blocks of up to 32 MB for itself, as large as weights are, and whatever loads a model next allocates
    its own: in the export of a ResNet-18 that was a tenth of the peak.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


PACKAGES = ("rkd-deploy", "torch", "onnx", "onnxscript", "onnxruntime")
"""Packages whose versions the card names."""


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
    job: PrecisionJob | None = None,
) -> Proof:
    """Fuse, export and prove a network, and only then let the bundle's folder appear.

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
            Runtime, or on what `job` is for.
        progress: Told how far that is.
        note: Called with the name of each stage as it begins.
        job: Convert the proven float32 graph to a lower precision, and judge the result on held-out images.

    Raises:
        CheckpointError: A weight is NaN or infinite.
        DivergenceError: All weights are finite, and the network's logits are not.
        ExportError: ONNX has no operator for something in the network; the message names it and its module.
        GateError: The exported graph does not do what the model does, the model has another accuracy than its card
            states, or a lower precision loses more than its limits allow; then FOLDER.report.json says what was tried.
            Nothing else is left behind.
        StorageError: The folder exists, or the disk is full; nothing is left behind.
        UsageError: The network gives probabilities; unknown level or outputs, a target without level `auto` or not that
            of `job`; early exit of a network that has no branches.
    """
    note = note or (lambda stage: None)
    check_number("--tolerance", tolerance, 0)
    if with_pytorch and job is not None:
        raise UsageError(
            f"model.pt2 would be float32 and model.onnx {job.options.precision}. Leave one of --with-pytorch and "
            "--precision out."
        )
    if job is not None and early_exit is not None:
        _check_named_layers(job.options, level)
    check_finite(model)
    # Two random images tell in a moment what would fail after minutes of converting and proving.
    noise_NCHW = torch.from_numpy(normalise(random_batch(card, 2)[0], card.preprocess))
    check_real(model, f"the network {type(model).__name__}")
    model = plain(model.cpu())  # float32, and no parametrisation between a layer and its norm
    check_classifier(model, noise_NCHW, f"the network {type(model).__name__}")
    onnx = require("onnx", "export")
    preprocess = card.preprocess
    branches = None if early_exit is None else require_branches(model, early_exit)
    with new_folder(folder) as temporary:
        note("fusing and converting to ONNX")
        choice = _fused(model, card, outputs, level, target, progress, job)
        card = dataclasses.replace(
            card,
            outputs=tuple(outputs),
            fusion=choice.level if card.part in ("fused", "student") else "none",
            fusion_search=_search_summary(choice, job),
            versions={"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        )
        file = temporary / ONNX_NAME
        _write(choice.proto, file)
        # A proof takes memory enough without two more copies of the network: what needs the graph reads it back.
        fused, choice = choice.network, dataclasses.replace(choice, network=model, proto=None)
        graph = ExportGraph(fused, preprocess, outputs).eval() if job is not None or with_pytorch else None
        del fused
        trim_memory()
        reference = reference_of(model, card)
        images = batches or [random_batch(card)]
        note("proving against PyTorch")
        card = dataclasses.replace(card, graph=graph_facts(file))
        proof, golden = prove(reference, file, card, images, tolerance)
        check_stated_accuracy(proof, card)
        card = dataclasses.replace(card, parity=parity_record(proof))
        if branches is not None:
            note("converting each branch, for early exit")
        exits = None if branches is None else ExitGraphs(temporary, branches, card, images, tolerance)
        if job is not None:
            note(f"converting to {job.options.precision} and judging on held-out images")
            inputs = _calibration_inputs(job, card)
            held_out = HeldOut(reference, job.held_out, card)
            assert graph is not None
            converted = convert(graph, onnx.load(file), preprocess, inputs, held_out, job.options)
            require_passed(converted, job, card, folder)
            _write(converted.proto, file)
            conversion = converted.record(job)
            proof, golden = prove_converted(proof, golden, conversion, file, card, images)
            record = {**conversion.to_record(), "test_top1": proof.converted_top1}
            card = dataclasses.replace(card, precision=job.options.precision, lowering=record)
            if exits is not None:
                require_passed(exits.convert(job, inputs), job, card, folder)
        if exits is not None and early_exit is not None:
            note("measuring what early exit saves")
            card = dataclasses.replace(card, early_exit=exits.report(early_exit).to_record())
        note("writing and verifying the bundle")
        # The card comes last: it has what was measured of the file that it is appended to.
        append_card(file, card)
        write_text(temporary / "labels.txt", "".join(f"{label}\n" for label in card.labels))
        write_text(temporary / "preprocessor_config.json", json.dumps(preprocess.to_hugging_face(), indent=2) + "\n")
        write_bytes(temporary / GOLDEN_NAME, npz(golden))
        with reference if job is None else RunOn(job.options.prover).load(file) as source:
            write_photo(temporary, card, source.infer, float(golden["tolerance"]))
        if with_pytorch and graph is not None:
            buffer = io.BytesIO()
            torch.export.save(to_program(graph, preprocess), buffer)
            write_bytes(temporary / "model.pt2", buffer.getvalue())
        if choice.search is not None:
            write_json(temporary / "fusion.json", choice.search.to_record())
        write_text(temporary / CARD_NAME, with_checksums(card, temporary))
        # From the files alone, as whoever gets the bundle would prove it.
        prover = "onnxruntime" if job is None else job.options.prover
        gate(verify(temporary, prover), f"{ONNX_NAME} against its golden data", card.precision)
    return proof


def _write(proto: Any, file: Path) -> None:
    """Write a graph without the metadata of converters and quantisers: the card is appended in the end."""
    # Serialised deterministically: the same run gives the same bytes, and so the same checksums.
    del proto.metadata_props[:]
    write_bytes(file, proto.SerializeToString(deterministic=True))


def _fused(
    model: nn.Module,
    card: ModelCard,
    outputs: Sequence[str],
    level: str,
    target: Target | None,
    progress: Progress | None,
    job: PrecisionJob | None,
) -> Choice:
    """The fused network and its float32 graph; level auto is chosen by timing the files that would ship."""

    def float32(network: nn.Module) -> Any:
        return to_onnx(ExportGraph(network, card.preprocess, outputs).eval(), card.preprocess, unfused=model)

    if level != "auto":
        if target is not None:
            raise UsageError(
                f"A target to measure on was given with level {level!r}, which is not measured: use level auto."
            )
        network = fuse(model, level)
        return Choice(level, network, float32(network))
    if job is None:
        return choose_level(model, float32, target or Target(), progress)
    options, inputs = job.options, _calibration_inputs(job, card)

    def converted(network: nn.Module) -> Any:
        graph = ExportGraph(network, card.preprocess, outputs).eval()
        return convert_ungated(graph, to_onnx(graph, card.preprocess, unfused=model), card.preprocess, inputs, options)

    choice = choose_level(model, converted, _measured_on(target, options), progress)
    return dataclasses.replace(choice, proto=float32(choice.network))


def _search_summary(choice: Choice, job: PrecisionJob | None) -> dict[str, Any]:
    """What the card says of the search for a level, and of what precision the files were that it timed."""
    if choice.search is None:
        return {}
    lower = {} if job is None else {"precision": job.options.precision, "target": job.options.runtime}
    return choice.search.to_summary() | lower


def _measured_on(target: Target | None, options: PrecisionOptions) -> Target:
    """What level auto measures files of lower precision on."""
    target = target or Target(RunOn(options.runs_on[0]))
    if target.run_on.backend not in options.runs_on:
        raise UsageError(
            f"Level auto would measure on {target.run_on.backend} files that are written for --target {options.runtime}"
            f", which {' or '.join(options.runs_on)} is to run. Measure on that, on the machine it is for, or name a "
            "level."
        )
    if options.keep not in ((), (AUTO,)):
        raise UsageError(
            f"--keep {','.join(options.keep)} names layers of one fusion level, and level auto compares several. Name "
            "the level too, or use --keep auto."
        )
    return target


def _calibration_inputs(job: PrecisionJob, card: ModelCard) -> Array | None:
    """Images to calibrate on, as the graph takes them; None where the precision needs none."""
    return None if job.calibration is None else as_input(job.calibration.images_NHWC, card.preprocess)


def _check_named_layers(options: PrecisionOptions, level: str) -> None:
    """Refuse layers to keep by names that the graphs for early exit, which have level tail, do not share."""
    if level != "tail" and options.keep not in ((), (AUTO,)):
        raise UsageError(
            f"--keep {','.join(options.keep)} names layers of level {level}, and the graphs for early exit have those "
            "of level tail. Use --fuse tail, or --keep auto."
        )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "not installed"
