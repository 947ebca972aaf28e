"""Reads records of benches and comparisons, older versions' too, into typed values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rkd_deploy.bench.layers import LayerTimes
from rkd_deploy.bench.loadgen import ScenarioResult
from rkd_deploy.bench.machine import MachineState, Provenance
from rkd_deploy.bench.results import RECORD_SCHEMA, Percentile, Result, result_of_row
from rkd_deploy.bench.roofline import Roofline
from rkd_deploy.decoding import DecodingError, decode, read_json
from rkd_deploy.errors import ModelFileError

KINDS = ("bench", "compare")
_SMALLEST, _LARGEST = 1e-12, 1e18


@dataclass(frozen=True)
class MachineStates:
    """States of the machine before the first and after the last measurement."""

    before: MachineState
    after: MachineState


@dataclass(frozen=True)
class BenchRecord:
    """A bench as a record holds it; empty where nothing was measured, fields of later versions left out.

    Attributes:
        results: Results in the order they were measured.
        scenarios: Results of LoadGen's scenarios.
        roofline: Bounds that were predicted, and the ceilings of the machine they follow from.
        layers: Time of each layer.
        provenance: What was run, when and where.
        settings: How it was measured, by the names of `bench`'s arguments.
        conditions: The machine before and after.
        partial: Whether the bench ended before all that was asked for was measured.
    """

    results: tuple[Result, ...]
    scenarios: tuple[ScenarioResult, ...] = ()
    roofline: Roofline = field(default_factory=Roofline)
    layers: tuple[LayerTimes, ...] = ()
    provenance: Provenance = field(default_factory=Provenance)
    settings: Mapping[str, Any] = field(default_factory=dict)
    conditions: MachineStates | None = None
    partial: bool = False


def read_record(path: Path) -> dict[str, Any]:
    """Read the JSON of a record; its kind and schema are checked.

    Raises:
        ModelFileError: The file cannot be read, is no record, or was written by a newer version.
    """
    try:
        content = read_json(path)
    except DecodingError as error:
        raise ModelFileError(
            f"{path} is no record ({error}). rkd-deploy bench writes one: bench.json; and so does compare."
        ) from error
    kind, schema = content.get("kind"), content.get("schema")
    if kind not in KINDS or type(schema) is not int or schema > RECORD_SCHEMA or "results" not in content:
        raise ModelFileError(
            f"{path} is a record of kind {kind!r}, schema {schema!r}; a report is made from {' or '.join(KINDS)} of "
            f"schema {RECORD_SCHEMA} with results. Measure again, or update rkd-deploy."
        )
    return content


def read_bench(path: Path) -> BenchRecord:
    """Read the bench out of a record's file.

    Raises:
        ModelFileError: As for `read_record`; or the record is damaged.
    """
    content = read_record(path)
    try:
        return bench_record(content)
    except DecodingError as error:
        raise damaged(path, error) from error


def bench_record(content: Mapping[str, Any]) -> BenchRecord:
    """Read the bench out of a record's JSON.

    Raises:
        DecodingError: The record is damaged.
    """
    rows = decode(tuple[Any, ...], content["results"], "results")
    known: dict[str, Any] = {"results": [], "scenarios": content.get("loadgen")}
    for name in ("roofline", "layers", "provenance", "settings", "conditions", "partial"):
        known[name] = content.get(name)
    record = decode(BenchRecord, {name: value for name, value in known.items() if value is not None})
    results = tuple(result_of_row(row, f"results[{place}]") for place, row in enumerate(rows))
    record = BenchRecord(**{**vars(record), "results": results})
    _check_numbers(record, "", "")
    return record


def _check_numbers(value: Any, name: str, where: str) -> None:
    """Hold every number of a record to a range, by the name of its field: plots and tables divide by times and rates.

    Raises:
        DecodingError: A time, a rate or a count is not positive, an accuracy no percentage, or a number beyond reason.
    """
    if dataclasses.is_dataclass(value):
        for item in dataclasses.fields(value):
            kind = "percentile" if isinstance(value, Percentile) and item.name == "ms" else item.name
            _check_numbers(getattr(value, item.name), kind, f"{where}.{item.name}" if where else item.name)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _check_numbers(item, name, f"{where}.{key}")
    elif isinstance(value, list | tuple) and not all(isinstance(item, float) for item in value):
        for place, item in enumerate(value):
            _check_numbers(item, name, f"{where}[{place}]")
    elif isinstance(value, list | tuple) and value:  # thousands of samples: their ends are enough
        for item in (min(value), max(value)):
            _check_numbers(item, name, where)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        low, high = _range(name)
        if not low <= value <= high:
            raise DecodingError(f"{where} is {value} where a number from {low:g} to {high:g} is expected")


def _range(name: str) -> tuple[float, float]:
    if name == "accuracy":
        return 0, 100
    if name in ("batch", "streams", "runs"):
        return 1, _LARGEST
    positive = name in ("percentile", "kernels") or name.endswith(("_ms", "_per_s"))
    return (_SMALLEST if positive and name != "bound_ms" else -_LARGEST), _LARGEST


def damaged(path: Path, error: DecodingError) -> ModelFileError:
    """The error for a record that is damaged."""
    return ModelFileError(f"{path} is a damaged record: {error}. Measure again with rkd-deploy bench.")
