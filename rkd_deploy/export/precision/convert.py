"""From proven float32 graphs to files of lower precision, judged on held-out images.

One graph gives the logits, or several whose logits add up (`early_exit.py`): then each partial sum is judged, because
an image may leave with it, and layers to keep are looked for in all of them at once. What one graph adds, it adds to
the same logits, so the harms of all layers are on one scale.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rkd_deploy.card import ModelCard, Preprocess
from rkd_deploy.errors import UsageError, require
from rkd_deploy.export.graph import OPSET, ExportGraph, to_onnx
from rkd_deploy.export.precision.gate import HeldOut, Judgement, failed
from rkd_deploy.export.precision.images import Lowering
from rkd_deploy.export.precision.int8 import Int8Quantiser, fewest, harms
from rkd_deploy.export.precision.layers import WEIGHTED, chosen, preprocessing, quantisable, summand
from rkd_deploy.export.precision.options import AUTO, QUANTISED, PrecisionOptions
from rkd_deploy.storage import write_json

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
BF16_OPSET = 22
"""The first whose convolutions are defined for bf16."""


def to_half(graph: ExportGraph, preprocess: Preprocess, precision: str) -> Any:
    """The graph exported again with its network in 16 bits.

    Args:
        graph: Pre-processing, network and outputs; left as it is.
        preprocess: For the type and shape of the input.
        precision: fp16 or bf16.

    Raises:
        UsageError: fp16, which ends at 65,504, cannot hold a weight.
    """
    dtype = DTYPES[precision]
    limit = torch.finfo(dtype).max
    for name, tensor in graph.network.state_dict().items():
        if tensor.dtype.is_floating_point and (largest := float(tensor.abs().amax())) > limit:
            raise UsageError(
                f"--precision {precision} ends at {limit:g}, and {name} holds {largest:g}. "
                "Choose --precision bf16, whose range is that of float32."
            )
    return to_onnx(graph.lowered(dtype), preprocess, opset=BF16_OPSET if precision == "bf16" else OPSET)


def to_fp8(proto: Any, inputs: npt.NDArray[Any], keep: Sequence[str] = ()) -> Any:
    """A copy of a float32 graph with FP8 Q/DQ pairs before its layers.

    Args:
        proto: An exported graph.
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


Array = npt.NDArray[Any]
Keep = Sequence[str]


@dataclass(frozen=True)
class Exportable:
    """A network as PyTorch has it and as a float32 ONNX graph."""

    graph: ExportGraph
    proto: Any


@dataclass(frozen=True)
class Lowered:
    """Graphs of lower precision.

    Attributes:
        protos: The graphs, without a card.
        judgements: What the gate saw of each partial sum of their logits; of a single graph just of that.
        kept: Layers left in float32.
        harms: Of every layer, the worst first, where they were searched for.
    """

    protos: tuple[Any, ...]
    judgements: tuple[Judgement, ...]
    kept: tuple[str, ...]
    harms: dict[str, float] | None = None

    @property
    def proto(self) -> Any:
        """The only graph."""
        (only,) = self.protos
        return only

    @property
    def judgement(self) -> Judgement:
        """Of the first sum that did not pass, else of the last one, which is the whole."""
        return next((one for one in self.judgements if not one.passed), self.judgements[-1])

    @property
    def passed(self) -> bool:
        """Whether every sum did."""
        return all(one.passed for one in self.judgements)

    def account(self, lowering: Lowering) -> dict[str, Any]:
        """Everything that was asked, done and found, for the card and the report."""
        options, calibration = lowering.options, lowering.calibration
        return {
            "precision": options.precision,
            "target": options.runtime,
            "proven_on": options.prover,
            "kept": list(self.kept),
            "harms": self.harms,
            "calibration": None if calibration is None else calibration.to_dict(),
            "held_out": lowering.held_out_source,
            "gate": self.judgement.to_dict(),
            **({"steps": [one.to_dict() for one in self.judgements]} if len(self.judgements) > 1 else {}),
        }


def lower(
    graph: ExportGraph,
    proto: Any,
    preprocess: Preprocess,
    inputs: Array | None,
    held_out: HeldOut,
    options: PrecisionOptions,
) -> Lowered:
    """Convert one graph, and judge: `lower_sum` of a single summand.

    Args:
        graph: What `proto` was exported from.
        proto: The float32 ONNX graph; left as it is.
        preprocess: How the graph takes images.
        inputs: Calibration images as the graph takes them, for int8 and fp8.
        held_out: To judge on.
        options: Precision, target, layers to keep, limits.

    Returns:
        The graph, whether or not it passed: its judgement says.
    """
    return lower_sum([Exportable(graph, proto)], preprocess, inputs, [held_out], options)


def lower_sum(
    summands: Sequence[Exportable],
    preprocess: Preprocess,
    inputs: Array | None,
    held_out: Sequence[HeldOut],
    options: PrecisionOptions,
) -> Lowered:
    """Convert, and judge.

    Args:
        summands: Networks whose logits add up, or a single one; left as they are.
        preprocess: How the graphs take images.
        inputs: Calibration images as the graphs take them, for int8 and fp8.
        held_out: To judge each partial sum on, with the reference's answers to it.
        options: Precision, target, layers to keep, limits.

    Returns:
        The graphs, whether or not they passed: their judgements say.

    Raises:
        UsageError: A layer to keep is unknown, or the precision cannot hold the network.
        MissingDependencyError: What converts to it, or runs it here, is not installed.
    """
    if options.precision not in QUANTISED:
        protos = [to_half(one.graph, preprocess, options.precision) for one in summands]
        return _judged(protos, held_out, options)
    assert inputs is not None  # Lowering has seen to it
    if options.precision == "int8":
        return _int8(summands, inputs, held_out, options)
    nodes = [summand(quantisable(one.proto, WEIGHTED), number) for number, one in enumerate(summands)]
    excluded = chosen(nodes, options.keep)
    protos = [to_fp8(one.proto, inputs, without) for one, without in zip(summands, excluded, strict=True)]
    return _judged(protos, held_out, options, options.keep)


def insist(lowered: Lowered, lowering: Lowering, card: ModelCard, folder: Path) -> None:
    """Let what passed its gate through; else leave a report beside the bundle's folder.

    Raises:
        GateError: It did not pass; the message names FOLDER.report.json.
    """
    if lowered.passed:
        return
    report = folder.with_name(f"{folder.name}.report.json")
    write_json(report, {"name": card.name, **lowered.account(lowering), "versions": dict(card.versions)})
    raise failed(lowered.judgement, lowering.options.precision, lowered.kept, report)


def unjudged(
    graph: ExportGraph, proto: Any, preprocess: Preprocess, inputs: Array | None, options: PrecisionOptions
) -> Any:
    """The file of lower precision before any layer is kept, which is what fusion levels are measured by.

    Args:
        graph: What `proto` was exported from.
        proto: The float32 ONNX graph; left as it is.
        preprocess: How the graph takes images.
        inputs: Calibration images as the graph takes them, for int8 and fp8.
        options: Precision and target.
    """
    if options.precision not in QUANTISED:
        return to_half(graph, preprocess, options.precision)
    assert inputs is not None  # Lowering has seen to it
    if options.precision == "fp8":
        return to_fp8(proto, inputs)
    with Int8Quantiser(proto, inputs, options.runtime) as quantiser:
        return quantiser.quantised()


def _int8(
    summands: Sequence[Exportable], inputs: Array, held_out: Sequence[HeldOut], options: PrecisionOptions
) -> Lowered:
    with ExitStack() as opened:
        quantisers = [opened.enter_context(Int8Quantiser(one.proto, inputs, options.runtime)) for one in summands]
        nodes = [summand(quantiser.nodes, number) for number, quantiser in enumerate(quantisers)]

        def attempt(keep: Keep) -> Lowered:
            excluded = chosen(nodes, keep)
            protos = [one.quantised(without=without) for one, without in zip(quantisers, excluded, strict=True)]
            return _judged(protos, held_out, options, keep)

        if options.keep != (AUTO,):
            return attempt(options.keep)
        return _searched(attempt, lambda: _ranked(summands, quantisers, nodes, inputs, options))


def _searched(attempt: Callable[[Keep], Lowered], ranked: Callable[[], dict[str, float]]) -> Lowered:
    """With the fewest layers kept that let the gate pass."""
    tried: dict[tuple[str, ...], Lowered] = {(): attempt(())}
    if tried[()].passed:
        return tried[()]

    def passes(keep: Keep) -> bool:
        tried[tuple(keep)] = attempt(keep)
        return tried[tuple(keep)].passed

    found = ranked()
    return replace(tried[tuple(fewest(list(found), passes))], harms=found)


def _ranked(
    summands: Sequence[Exportable],
    quantisers: Sequence[Int8Quantiser],
    nodes: Sequence[dict[str, str]],
    inputs: Array,
    options: PrecisionOptions,
) -> dict[str, float]:
    """Harms of all layers, the worst first; where graphs share a name, as they do that of the head, their sum."""
    found: dict[str, float] = defaultdict(float)
    for one, quantiser, named in zip(summands, quantisers, nodes, strict=True):
        for name, harm in harms(quantiser, named, one.proto, inputs, options.prover).items():
            found[name] += harm
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def _judged(protos: Sequence[Any], held_out: Sequence[HeldOut], options: PrecisionOptions, keep: Keep = ()) -> Lowered:
    added = [step.answers(proto, options.prover) for proto, step in zip(protos, held_out, strict=True)]
    sums = np.cumsum(added, axis=0)
    judgements = [step.judge(z_NK, options.gates) for step, z_NK in zip(held_out, sums, strict=True)]
    return Lowered(tuple(protos), tuple(judgements), tuple(keep))
