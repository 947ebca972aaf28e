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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rkd_deploy.backends import RunOn
from rkd_deploy.backends.files import CARD_NAME, ONNX_NAME, with_checksums
from rkd_deploy.backends.pytorch import PyTorchBackend
from rkd_deploy.bench.graph_cost import graph_facts
from rkd_deploy.bench.parity import GOLDEN_NAME, gate, verify
from rkd_deploy.bench.timing import Progress
from rkd_deploy.card import ModelCard, unlistable
from rkd_deploy.errors import UsageError, installed_version, require
from rkd_deploy.export.early_exit import EarlyExit, ExitGraphs, require_branches
from rkd_deploy.export.fusion import fuse
from rkd_deploy.export.graph import ExportGraph, append_card, to_onnx, to_program
from rkd_deploy.export.levels import Choice, Target, choose_level, target_of_files
from rkd_deploy.export.precision.convert import convert, convert_ungated, require_passed
from rkd_deploy.export.precision.gate import HeldOut
from rkd_deploy.export.precision.images import PrecisionJob
from rkd_deploy.export.precision.options import AUTO, PrecisionOptions
from rkd_deploy.export.proving import (
    TOLERANCE,
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
from rkd_deploy.images import normalise
from rkd_deploy.models.foreign import check_classifier, check_finite_weights, check_real, plain
from rkd_deploy.storage import new_folder, write_bytes, write_json, write_text


def trim_memory() -> None:
    """Let the C library return freed memory to the system, where it is glibc.

    It keeps freed blocks of up to 32 MB for itself, as large as weights are, and whatever loads a model next allocates
    its own: in the export of a ResNet-18 that was a tenth of the peak.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


CARD_PACKAGES = ("rkd-deploy", "torch", "onnx", "onnxscript", "onnxruntime")
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
    if job is not None:
        _check_job(job.options, level, with_pytorch=with_pytorch, early_exit=early_exit)
    model = _checked(model, card)
    branches = None if early_exit is None else require_branches(model, early_exit)
    with new_folder(folder) as temporary:
        note("fusing and converting to ONNX")
        choice = _fused(model, card, outputs, level, target, progress, job)
        card = dataclasses.replace(
            card,
            outputs=tuple(outputs),
            fusion=choice.level if card.part in ("fused", "student") else "none",
            fusion_search=_search_summary(choice, job),
            versions={
                "python": platform.python_version(),
                **{name: installed_version(name) or "not installed" for name in CARD_PACKAGES},
            },
        )
        _write(choice.proto, temporary / ONNX_NAME)
        # A proof takes memory enough without two more copies of the network: what needs the graph reads it back.
        fused, choice = choice.network, dataclasses.replace(choice, network=model, proto=None)
        graph = ExportGraph(fused, card.preprocess, outputs).eval() if job is not None or with_pytorch else None
        del fused
        trim_memory()
        note("proving against PyTorch")
        draft = _Draft(temporary, card, reference_of(model, card), batches or [random_batch(card)])
        draft.prove(tolerance)
        exits = None
        if branches is not None:
            note("converting each branch, for early exit")
            exits = ExitGraphs(temporary, branches, draft.card, draft.images, tolerance)
        if job is not None:
            assert graph is not None
            note(f"converting to {job.options.precision} and judging on held-out images")
            draft.convert(graph, job, exits, folder)
        if exits is not None and early_exit is not None:
            note("measuring what early exit saves")
            draft.card = dataclasses.replace(draft.card, early_exit=exits.report(early_exit).to_record())
        note("writing and verifying the bundle")
        if with_pytorch and graph is not None:
            buffer = io.BytesIO()
            torch.export.save(to_program(graph, card.preprocess), buffer)
            write_bytes(temporary / "model.pt2", buffer.getvalue())
        if choice.search is not None:
            write_json(temporary / "fusion.json", choice.search.to_record())
        return draft.finish(job)


def _check_job(options: PrecisionOptions, level: str, *, with_pytorch: bool, early_exit: EarlyExit | None) -> None:
    """Refuse a lower precision beside what does not go with it."""
    if with_pytorch:
        raise UsageError(
            f"model.pt2 would be float32 and model.onnx {options.precision}. Leave one of --with-pytorch and "
            "--precision out."
        )
    if early_exit is not None and level != "tail" and options.keep not in ((), (AUTO,)):
        raise UsageError(
            f"--keep {','.join(options.keep)} names layers of level {level}, and the graphs for early exit have those "
            "of level tail. Use --fuse tail, or --keep auto."
        )


def _checked(model: nn.Module, card: ModelCard) -> nn.Module:
    """The network as everything here takes it; what would fail after minutes of converting is refused in a moment."""
    require("onnx", "export")
    name = f"the network {type(model).__name__}"
    if fault := unlistable(card.labels):
        raise UsageError(f"{fault} Give it another name.")
    check_finite_weights(model)
    check_real(model, name)
    model = plain(model.cpu())  # float32, and no parametrisation between a layer and its norm
    noise_NCHW = torch.from_numpy(normalise(random_batch(card, 2)[0], card.preprocess))
    check_classifier(model, noise_NCHW, name)
    return model


@dataclass
class _Draft:
    """A bundle in the making: with each step its folder and its card know more.

    Attributes:
        folder: Holds model.onnx; what else belongs to the bundle is written into it.
        card: What is known of the network so far.
        reference: The unfused network, which the file is held against.
        images: What it is proven on, gone through once a step.
    """

    folder: Path
    card: ModelCard
    reference: PyTorchBackend
    images: Batches

    @property
    def _file(self) -> Path:
        return self.folder / ONNX_NAME

    def prove(self, tolerance: float) -> None:
        """Hold the float32 file against PyTorch, and PyTorch's accuracy against what the card states."""
        self.card = dataclasses.replace(self.card, graph=graph_facts(self._file))
        self._proof, self._golden = prove(self.reference, self._file, self.card, self.images, tolerance)
        check_stated_accuracy(self._proof, self.card)
        self.card = dataclasses.replace(self.card, parity=parity_record(self._proof))

    def convert(self, graph: ExportGraph, job: PrecisionJob, exits: ExitGraphs | None, final: Path) -> None:
        """Replace the file, and the graphs for early exit, by those of lower precision, each held to its gate.

        Args:
            graph: What the file was exported from.
            job: Which precision, calibrated and judged on what.
            exits: The graphs for early exit.
            final: The bundle's folder to be: a report of what failed is left beside it.
        """
        inputs, held_out = job.inputs(self.card.preprocess), HeldOut(self.reference, job.held_out, self.card)
        proto = require("onnx", "export").load(self._file)
        converted = convert(graph, proto, self.card.preprocess, inputs, held_out, job.options)
        require_passed(converted, job, self.card, final)
        _write(converted.proto, self._file)
        conversion = converted.record(job)
        self._proof, self._golden = prove_converted(
            self._proof, self._golden, conversion, self._file, self.card, self.images
        )
        record = {**conversion.to_record(), "test_top1": self._proof.converted_top1}
        self.card = dataclasses.replace(self.card, precision=job.options.precision, lowering=record)
        if exits is not None:
            require_passed(exits.convert(job, inputs), job, self.card, final)

    def finish(self, job: PrecisionJob | None) -> Proof:
        """Write what goes beside the file, and verify the whole from the files alone, as who gets the bundle would.

        Args:
            job: Why the file is of a lower precision, if it is.
        """
        folder, card = self.folder, self.card
        prover = "onnxruntime" if job is None else job.options.prover
        # The card comes last: it has what was measured of the file that it is appended to.
        append_card(self._file, card)
        write_text(folder / "labels.txt", "".join(f"{label}\n" for label in card.labels))
        rule = card.preprocess.to_hugging_face()
        write_text(folder / "preprocessor_config.json", json.dumps(rule, indent=2) + "\n")
        write_bytes(folder / GOLDEN_NAME, npz(self._golden))
        with self.reference if job is None else RunOn(prover).load(self._file) as source:
            write_photo(folder, card, source.infer, float(self._golden["tolerance"]))
        write_text(folder / CARD_NAME, with_checksums(card, folder))
        gate(verify(folder, prover), f"{ONNX_NAME} against its golden data", card.precision)
        return self._proof


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
    options, inputs = job.options, job.inputs(card.preprocess)

    def converted(network: nn.Module) -> Any:
        graph = ExportGraph(network, card.preprocess, outputs).eval()
        return convert_ungated(graph, to_onnx(graph, card.preprocess, unfused=model), card.preprocess, inputs, options)

    choice = choose_level(model, converted, target_of_files(target, options), progress)
    return dataclasses.replace(choice, proto=float32(choice.network))


def _search_summary(choice: Choice, job: PrecisionJob | None) -> dict[str, Any]:
    """What the card says of the search for a level, and of what precision the files were that it timed."""
    if choice.search is None:
        return {}
    lower = {} if job is None else {"precision": job.options.precision, "target": job.options.runtime}
    return choice.search.to_summary() | lower
