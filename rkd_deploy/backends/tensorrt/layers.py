"""Reads the layers of a parsed network or of a finished engine, and their times."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

LayerFacts = dict[str, Any]


def network_layers(network: Any) -> list[LayerFacts]:
    """The layers that the parser made of the ONNX nodes, before any fusion.

    Args:
        network: An INetworkDefinition.

    Returns:
        For each layer its name, type, and type and shape of its first output (-1: the batch).
    """
    return [_described(network.get_layer(index)) for index in range(network.num_layers)]


def engine_layers(engine: Any, trt: Any) -> list[LayerFacts]:
    """The layers that run, after fusion, as the engine inspector lists them.

    Args:
        engine: An ICudaEngine, built with detailed profiling verbosity.
        trt: Module of the library that the engine belongs to.

    Returns:
        As `network_layers`; the inspector's other facts, the chosen kernel among them, under their own names.
    """
    inspector = engine.create_engine_inspector()
    content = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    return [_inspected(layer) for layer in content.get("Layers", [])]


def layer_table(layers: Sequence[Mapping[str, Any]]) -> str:
    """A text table of layers: name, type, data type and shape, a layer a line."""
    rows = [("layer", "type", "data type", "shape")]
    rows += [
        (str(layer["name"]), str(layer["type"]), str(layer.get("dtype", "")), _shape(layer.get("shape")))
        for layer in layers
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _described(layer: Any) -> LayerFacts:
    output = layer.get_output(0)
    return {
        "name": layer.name,
        "type": layer.type.name.lower(),
        "dtype": output.dtype.name.lower(),
        "shape": list(output.shape),
    }


def _inspected(layer: Any) -> LayerFacts:
    if isinstance(layer, str):  # of an engine that was built with less verbosity: names only
        return {"name": layer, "type": ""}
    output = next(iter(layer.get("Outputs") or [{}]))
    return {
        "name": layer.get("Name", ""),
        "type": layer.get("LayerType", ""),
        "dtype": output.get("Format/Datatype", ""),
        "shape": output.get("Dimensions"),
        **{key: value for key, value in layer.items() if key not in ("Name", "LayerType")},
    }


def _shape(shape: Any) -> str:
    return "x".join(str(size) for size in shape) if isinstance(shape, list) else ""


def layer_profiler(trt: Any) -> Any:
    """An IProfiler that collects `times`: name and milliseconds of each layer, in the order they run.

    Attached to an execution context, it makes each run wait for its end and report its layers then; a captured
    graph reports nothing.
    """

    class Profiler(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.times: list[tuple[str, float]] = []

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.times.append((layer_name, ms))

    return Profiler()
