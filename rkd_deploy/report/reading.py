"""What a report needs of a bench: from memory or from its record, also one that an older version wrote."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rkd_deploy.bench.ceilings import Ceilings
from rkd_deploy.bench.layers import Layer, LayerTimes
from rkd_deploy.bench.results import RECORD_SCHEMA, Figures, Result
from rkd_deploy.bench.roofline import Prediction, Roofline
from rkd_deploy.errors import ModelFileError
from rkd_deploy.report.columns import cut_short

KINDS = ("bench", "compare")


@dataclass(frozen=True)
class Material:
    """What a page is made from; empty where nothing is known."""

    results: Sequence[Result] = ()
    roofline: Roofline = field(default_factory=lambda: Roofline((), ()))
    layers: Sequence[LayerTimes] = ()
    environments: Sequence[Mapping[str, Any]] = ()
    """Provenance and settings of each record, as one flat table: name to value."""
    remarks: Sequence[str] = ()
    """What is wrong with a record: that it is partial, say."""


def gather(records: Sequence[Mapping[str, Any]]) -> Material:
    """Join records, all their results side by side.

    Args:
        records: As `bench.report.to_record` makes them, or a compare's, with "roofline" and "layers" where these
            were measured. A field that a record lacks is unknown, one that this version does not know is left out.
    """
    rooflines = [record.get("roofline") or {} for record in records]
    return Material(
        results=[_result(row) for record in records for row in record["results"]],
        roofline=Roofline(
            tuple(_ceilings(row) for roofline in rooflines for row in roofline.get("ceilings", ())),
            tuple(_built(Prediction, row) for roofline in rooflines for row in roofline.get("predictions", ())),
        ),
        layers=[_layer_times(row) for record in records for row in record.get("layers") or ()],
        environments=[_environment(record) for record in records],
        remarks=[_remark(record) for record in records if record.get("partial")],
    )


def _remark(record: Mapping[str, Any]) -> str:
    """That a record is partial, and which of its results were cut short; the others are whole."""
    cut = [
        f"{one.model} on {one.backend}{'' if one.threads is None else f', threads {one.threads}'}, batch {one.batch}"
        for one in map(_result, record["results"])
        if cut_short(one)
    ]
    return "Interrupted: what had been measured until then." + (f" Cut short: {'; '.join(cut)}." if cut else "")


def read_records(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The records of some files.

    Raises:
        ModelFileError: A file cannot be read, is no record, or was written by a newer version.
    """
    return [_read(path) for path in paths]


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        kind, schema = record["kind"], record["schema"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelFileError(
            f"{path} is no record ({error}). rkd-deploy bench writes one: bench.json; and so does compare."
        ) from error
    if kind not in KINDS or not isinstance(schema, int) or schema > RECORD_SCHEMA or "results" not in record:
        raise ModelFileError(
            f"{path} is a record of kind {kind!r}, schema {schema!r}; a report is made from {' or '.join(KINDS)} of "
            f"schema {RECORD_SCHEMA} with results. Measure again, or update rkd-deploy."
        )
    assert isinstance(record, dict)
    try:
        gather([record])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelFileError(f"{path} is a damaged record ({error!r}). Measure again with rkd-deploy bench.") from error
    return record


def _built(kind: type[Any], row: Mapping[str, Any]) -> Any:
    """A dataclass from what a row has of its fields; None for those without a default that it lacks."""
    wanted = {one.name: one for one in dataclasses.fields(kind)}
    missing = {
        name: None
        for name, one in wanted.items()
        if name not in row
        and one.default is dataclasses.MISSING
        and one.default_factory is dataclasses.MISSING
        and one.init
    }
    return kind(**missing, **{name: value for name, value in row.items() if name in wanted and wanted[name].init})


def _result(row: Mapping[str, Any]) -> Result:
    if not isinstance(row["model"], str) or not isinstance(row["batch"], int):
        raise TypeError("model and batch of a result")
    alone = row.get("device_only")
    result: Result = _built(Result, {**_lists(row), "device_only": alone and _built(Figures, _lists(alone))})
    return result


def _lists(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**row, **{name: row.get(name) or [] for name in ("samples_ms", "round_medians_ms")}}


def _ceilings(row: Mapping[str, Any]) -> Ceilings:
    rates = {int(size): float(rate) for size, rate in row["bytes_per_s"].items()}  # JSON has text for keys
    ceilings: Ceilings = _built(Ceilings, {**row, "bytes_per_s": rates})
    return ceilings


def _layer_times(row: Mapping[str, Any]) -> LayerTimes:
    layers = tuple(_built(Layer, layer) for layer in row["layers"])
    times: LayerTimes = _built(LayerTimes, {**row, "layers": layers})
    return times


def _environment(record: Mapping[str, Any]) -> dict[str, Any]:
    known = dict(record.get("provenance") or {})
    versions, gpus, git = known.pop("versions", None), known.pop("gpus", None), known.pop("git", None)
    flat = {**known, **{f"setting {name}": value for name, value in (record.get("settings") or {}).items()}}
    flat |= {name: version for name, version in (versions or {}).items() if version is not None}
    for number, gpu in enumerate(gpus or ()):
        flat |= {f"GPU {number} {name}": value for name, value in gpu.items()}
    if git:
        flat["commit"] = f"{str(git.get('commit'))[:12]}{', changed since' if git.get('dirty') else ''}"
    return flat
