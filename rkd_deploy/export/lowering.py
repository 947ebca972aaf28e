"""From a proven float32 graph to a file of lower precision, judged on held-out images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy.typing as npt

from rkd_deploy.card import Preprocess
from rkd_deploy.export.fp8 import to_fp8
from rkd_deploy.export.graph import ExportGraph
from rkd_deploy.export.half import to_half
from rkd_deploy.export.int8 import Int8Quantiser
from rkd_deploy.export.judging import HeldOut, Judgement
from rkd_deploy.export.layers import WEIGHTED, chosen, quantisable
from rkd_deploy.export.precision import AUTO, QUANTISED, Lowering, PrecisionOptions
from rkd_deploy.export.sensitivity import fewest, harms

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Lowered:
    """A graph of lower precision.

    Attributes:
        proto: The graph, without a card.
        judgement: What the gate saw of it.
        kept: Layers left in float32.
        harms: Of every layer, the worst first, where they were searched for.
    """

    proto: Any
    judgement: Judgement
    kept: tuple[str, ...]
    harms: dict[str, float] | None = None

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
        }


def lower(
    graph: ExportGraph,
    proto: Any,
    preprocess: Preprocess,
    inputs: Array | None,
    held_out: HeldOut,
    options: PrecisionOptions,
) -> Lowered:
    """Convert, and judge.

    Args:
        graph: What `proto` was exported from.
        proto: The float32 ONNX graph; left as it is.
        preprocess: How the graph takes images.
        inputs: Calibration images as the graph takes them, for int8 and fp8.
        held_out: To judge on.
        options: Precision, target, layers to keep, limits.

    Returns:
        The graph, whether or not it passed: its judgement says.

    Raises:
        UsageError: A layer to keep is unknown, or the precision cannot hold the network.
        MissingDependencyError: What converts to it, or runs it here, is not installed.
    """
    if options.precision in QUANTISED:
        assert inputs is not None  # Lowering has seen to it
        return (
            _int8(proto, inputs, held_out, options)
            if options.precision == "int8"
            else _fp8(proto, inputs, held_out, options)
        )
    lowered = to_half(graph, preprocess, options.precision)
    return Lowered(lowered, _judge(lowered, held_out, options), ())


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


def _fp8(proto: Any, inputs: Array, held_out: HeldOut, options: PrecisionOptions) -> Lowered:
    lowered = to_fp8(proto, inputs, chosen(quantisable(proto, WEIGHTED), options.keep))
    return Lowered(lowered, _judge(lowered, held_out, options), options.keep)


def _int8(proto: Any, inputs: Array, held_out: HeldOut, options: PrecisionOptions) -> Lowered:
    with Int8Quantiser(proto, inputs, options.runtime) as quantiser:
        tried: dict[tuple[str, ...], Lowered] = {}

        def passes(keep: Sequence[str]) -> bool:
            lowered = quantiser.quantised(without=chosen(quantiser.nodes, keep))
            tried[tuple(keep)] = Lowered(lowered, _judge(lowered, held_out, options), tuple(keep))
            return tried[tuple(keep)].judgement.passed

        searching = options.keep == (AUTO,)
        first = () if searching else options.keep
        if passes(first) or not searching:
            return tried[first]
        found = harms(quantiser, proto, inputs, options.prover)
        return replace(tried[tuple(fewest(list(found), passes))], harms=found)


def _judge(proto: Any, held_out: HeldOut, options: PrecisionOptions) -> Judgement:
    return held_out.judge(held_out.answers(proto, options.prover), options.gates)
