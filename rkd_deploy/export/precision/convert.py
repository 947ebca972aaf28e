"""Converts float32 graphs to a lower precision and judges the result on held-out images.

There is one graph that gives the logits, or there are several whose logits add up (`early_exit.py`). In the second case
every partial sum is judged, because an image may leave with it, and layers to keep in float32 are searched for in all
graphs at once: what one graph adds, it adds to the same logits, so that all sensitivities are on one scale.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rkd_deploy.backends import Array
from rkd_deploy.card import ModelCard, Preprocess
from rkd_deploy.errors import UsageError, require
from rkd_deploy.export.graph import OPSET, ExportGraph, MapInput, to_onnx
from rkd_deploy.export.precision.gate import GateResult, HeldOut, gate_error, logits_of_steps
from rkd_deploy.export.precision.images import PrecisionJob
from rkd_deploy.export.precision.int8 import Int8Quantiser, fewest_kept, sensitivities
from rkd_deploy.export.precision.layers import WEIGHTED, branch_layers, preprocessing, quantisable, resolve_layers
from rkd_deploy.export.precision.options import AUTO, QUANTISED, PrecisionOptions
from rkd_deploy.storage import write_json

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
BF16_OPSET = 22
"""The first opset whose convolutions are defined for bf16."""


def to_half(graph: ExportGraph, preprocess: Preprocess | MapInput, precision: str) -> Any:
    """Export a graph again with its network in 16 bits.

    Args:
        graph: Pre-processing, network and outputs; left as it is.
        preprocess: Gives the type and shape of the input.
        precision: fp16 or bf16.

    Returns:
        An onnx.ModelProto with float32 pre-processing and outputs.

    Raises:
        UsageError: A weight is larger than fp16 can hold (65,504).
    """
    dtype = DTYPES[precision]
    limit = torch.finfo(dtype).max
    for name, tensor in graph.network.state_dict().items():
        if tensor.dtype.is_floating_point and (largest := float(tensor.abs().amax())) > limit:
            raise UsageError(
                f"--precision {precision} ends at {limit:g}, and {name} holds {largest:g}. "
                "Choose --precision bf16, whose range is that of float32."
            )
    return to_onnx(graph.in_dtype(dtype), preprocess, opset=BF16_OPSET if precision == "bf16" else OPSET)


def to_fp8(proto: Any, inputs: Array, keep: Sequence[str] = ()) -> Any:
    """Quantise a float32 graph to FP8 with NVIDIA's ModelOpt: Q/DQ pairs before its layers.

    Args:
        proto: The exported graph; left as it is.
        inputs: Calibration images as the graph takes them.
        keep: Nodes to leave in float32.

    Raises:
        MissingDependencyError: ModelOpt is not installed.
    """
    onnx = require("onnx", "export")
    modelopt = require("modelopt.onnx.quantization", "quant")
    with tempfile.TemporaryDirectory(prefix="rkd-deploy-fp8-") as name:
        source, target = Path(name) / "model.onnx", Path(name) / "fp8.onnx"
        source.write_bytes(proto.SerializeToString())
        modelopt.quantize(
            str(source),
            quantize_mode="fp8",
            calibration_data={proto.graph.input[0].name: inputs},
            calibration_eps=["cpu"],  # its CUDA calibration can crash where cuDNN does not fit
            high_precision_dtype="fp32",
            nodes_to_exclude=[*preprocessing(proto), *keep],
            output_path=str(target),
            log_level="ERROR",
        )
        return onnx.load(target)


@dataclass(frozen=True)
class Exportable:
    """A network to convert.

    Attributes:
        graph: The network as PyTorch has it.
        proto: The float32 ONNX graph that was made of it.
        preprocess: How the graph takes images, or the map that it takes.
        inputs: What it is calibrated on for int8 and fp8, as the graph takes it.
    """

    graph: ExportGraph
    proto: Any
    preprocess: Preprocess | MapInput
    inputs: Array | None = None


@dataclass(frozen=True)
class PrecisionRecord:
    """What was asked for, done and measured when a precision was lowered; the card and the report hold it.

    Attributes:
        job: Options and images.
        results: Of the gate, for each partial sum of the logits, the whole last.
        float32_layers: Layers left in float32.
        sensitivities: Mean squared change of the logits by each layer alone, the largest first; None: not searched.
    """

    job: PrecisionJob
    results: tuple[GateResult, ...]
    float32_layers: tuple[str, ...]
    sensitivities: Mapping[str, float] | None = None

    @property
    def result(self) -> GateResult:
        """The result that decides over all sums: the first that did not pass, else the last, which is the whole."""
        return _deciding(self.results)

    def to_record(self) -> dict[str, Any]:
        """The fields as JSON has them; ``harms`` is the name that cards gave to sensitivities from the first on."""
        options, calibration = self.job.options, self.job.calibration
        return {
            "precision": options.precision,
            "target": options.runtime,
            "proven_on": options.prover,
            "kept": list(self.float32_layers),
            "harms": None if self.sensitivities is None else dict(self.sensitivities),
            "calibration": None if calibration is None else calibration.to_dict(),
            "held_out": self.job.held_out_source,
            "gate": self.result.to_dict(),
            **({"steps": [result.to_dict() for result in self.results]} if len(self.results) > 1 else {}),
        }


def _deciding(results: Sequence[GateResult]) -> GateResult:
    return next((result for result in results if not result.passed), results[-1])


@dataclass(frozen=True)
class Converted:
    """Graphs of lower precision and what the gate measured of them, passed or not.

    Attributes:
        protos: The graphs, without a card.
        results: What the gate measured of each partial sum of the graphs' logits; one result for a single graph.
        float32_layers: Layers left in float32.
        sensitivities: Sensitivity of every layer, the largest first, where layers to keep were searched for.
    """

    protos: tuple[Any, ...]
    results: tuple[GateResult, ...]
    float32_layers: tuple[str, ...]
    sensitivities: dict[str, float] | None = None

    @property
    def proto(self) -> Any:
        """The graph, where it is a single one."""
        (only,) = self.protos
        return only

    @property
    def result(self) -> GateResult:
        """The result that decides over all sums: the first that did not pass, else the last, which is the whole."""
        return _deciding(self.results)

    @property
    def passed(self) -> bool:
        """Whether every sum passed."""
        return all(result.passed for result in self.results)

    def record(self, job: PrecisionJob) -> PrecisionRecord:
        """What is written of this conversion."""
        return PrecisionRecord(job, self.results, self.float32_layers, self.sensitivities)


def convert(
    graph: ExportGraph,
    proto: Any,
    preprocess: Preprocess,
    inputs: Array | None,
    held_out: HeldOut,
    options: PrecisionOptions,
) -> Converted:
    """Convert one graph to a lower precision and judge it: `convert_sum` of a single branch.

    Args:
        graph: What `proto` was exported from.
        proto: The float32 ONNX graph; left as it is.
        preprocess: How the graph takes images.
        inputs: Calibration images as the graph takes them, for int8 and fp8.
        held_out: Images to judge on.
        options: Precision, target, layers to keep, limits.
    """
    return convert_sum([Exportable(graph, proto, preprocess, inputs)], [held_out], options)


def convert_sum(branches: Sequence[Exportable], held_out: Sequence[HeldOut], options: PrecisionOptions) -> Converted:
    """Convert networks whose logits add up to a lower precision, and judge every partial sum.

    Args:
        branches: The networks, or a single one, in the order of `serve.early_exit.every_step`; left as they are.
        held_out: For each partial sum, the same images with its reference's answers to them.
        options: Precision, target, layers to keep, limits.

    Raises:
        UsageError: A layer to keep is unknown, or the precision cannot hold the network.
        MissingDependencyError: What converts to it, or runs it here, is not installed.
    """
    if options.precision not in QUANTISED:
        protos = [to_half(branch.graph, branch.preprocess, options.precision) for branch in branches]
        return _judged(protos, held_out, options)
    if options.precision == "int8":
        return _int8(branches, held_out, options)
    layers = [branch_layers(quantisable(branch.proto, WEIGHTED), number) for number, branch in enumerate(branches)]
    excluded = resolve_layers(layers, options.keep)
    protos = [to_fp8(branch.proto, _inputs(branch), nodes) for branch, nodes in zip(branches, excluded, strict=True)]
    return _judged(protos, held_out, options, options.keep)


def require_passed(converted: Converted, job: PrecisionJob, card: ModelCard, folder: Path) -> None:
    """Stop an export whose file did not pass its gate, and leave a report beside the bundle's folder.

    Raises:
        GateError: It did not pass; the message names FOLDER.report.json.
    """
    if converted.passed:
        return
    report = folder.with_name(f"{folder.name}.report.json")
    record = converted.record(job)
    write_json(report, {"name": card.name, **record.to_record(), "versions": dict(card.versions)})
    raise gate_error(converted.result, job.options.precision, converted.float32_layers, report)


def convert_ungated(
    graph: ExportGraph, proto: Any, preprocess: Preprocess, inputs: Array | None, options: PrecisionOptions
) -> Any:
    """Convert a graph with no layer kept and no gate: the file that fusion levels are timed by.

    Args:
        graph: What `proto` was exported from.
        proto: The float32 ONNX graph; left as it is.
        preprocess: How the graph takes images.
        inputs: Calibration images as the graph takes them, for int8 and fp8.
        options: Precision and target.
    """
    if options.precision not in QUANTISED:
        return to_half(graph, preprocess, options.precision)
    assert inputs is not None  # PrecisionJob refuses quantisation without calibration images
    if options.precision == "fp8":
        return to_fp8(proto, inputs)
    with Int8Quantiser(proto, inputs, options.runtime) as quantiser:
        return quantiser.quantised()


def _inputs(branch: Exportable) -> Array:
    assert branch.inputs is not None  # PrecisionJob refuses quantisation without calibration images
    return branch.inputs


def _int8(branches: Sequence[Exportable], held_out: Sequence[HeldOut], options: PrecisionOptions) -> Converted:
    with ExitStack() as stack:
        quantisers = [
            stack.enter_context(Int8Quantiser(branch.proto, _inputs(branch), options.runtime)) for branch in branches
        ]
        layers = [branch_layers(quantiser.nodes, number) for number, quantiser in enumerate(quantisers)]

        def attempt(keep: Sequence[str]) -> Converted:
            excluded = resolve_layers(layers, keep)
            protos = [quantiser.quantised(without=nodes) for quantiser, nodes in zip(quantisers, excluded, strict=True)]
            return _judged(protos, held_out, options, keep)

        if options.keep != (AUTO,):
            return attempt(options.keep)
        return _searched(attempt, lambda: _ranked(branches, quantisers, layers, options))


def _searched(attempt: Callable[[Sequence[str]], Converted], ranked: Callable[[], dict[str, float]]) -> Converted:
    """The conversion that keeps the fewest layers in float32 and passes its gate."""
    attempts: dict[tuple[str, ...], Converted] = {(): attempt(())}
    if attempts[()].passed:  # to measure every layer's sensitivity costs as many conversions as there are layers
        return attempts[()]

    def passes(keep: Sequence[str]) -> bool:
        attempts[tuple(keep)] = attempt(keep)
        return attempts[tuple(keep)].passed

    ranking = ranked()
    return replace(attempts[tuple(fewest_kept(list(ranking), passes))], sensitivities=ranking)


def _ranked(
    branches: Sequence[Exportable],
    quantisers: Sequence[Int8Quantiser],
    layers: Sequence[dict[str, str]],
    options: PrecisionOptions,
) -> dict[str, float]:
    """Sensitivities of all layers, the largest first; a name that graphs share, as that of the head, has their sum."""
    # A trunk's layers are ranked by what they do to S's logits; what they do to the assistants' is left out, and the
    # gate judges it all the same.
    total: dict[str, float] = defaultdict(float)
    for branch, quantiser, nodes in zip(branches, quantisers, layers, strict=True):
        for name, value in sensitivities(quantiser, nodes, branch.proto, _inputs(branch), options.prover).items():
            total[name] += value
    # Equal sensitivities are ordered by name, or two exports of one run could keep other layers.
    return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))


def _judged(
    protos: Sequence[Any], held_out: Sequence[HeldOut], options: PrecisionOptions, keep: Sequence[str] = ()
) -> Converted:
    # An image may leave after any branch, so each partial sum is a network of its own that has to pass.
    sums = logits_of_steps(protos, held_out[0].inputs, options.prover)
    results = [images.judge(z_NK, options.gates) for images, z_NK in zip(held_out, sums, strict=True)]
    return Converted(tuple(protos), tuple(results), tuple(keep))
