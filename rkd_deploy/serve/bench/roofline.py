"""Prediction first: how fast a model could be on this machine, before it is measured.

With W multiply-adds, Q bytes that have to be moved at the least, and the machine's ceilings pi (MAC/s) and beta
(bytes/s), no run takes less than

    t >= max(W / pi, Q / beta),

which is Williams, Waterman and Patterson's roofline (CACM 52(4), 2009) read as time: at W / Q MACs per byte the roof is
min(pi, beta W / Q). The measured median is then told as the share t / p50 of it. `graph_cost` counts W and Q,
`ceilings` measures pi and beta through the backend itself.

Not covered: what starting operators costs (for small networks at batch 1 most of the time), operators that are no
product, activations that do not stay in a cache. So a small share says that there is room, not that it can be had.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rkd_deploy.errors import UsageError, require
from rkd_deploy.serve.bench import tabular
from rkd_deploy.serve.bench.ceilings import ARITHMETIC, BACKENDS, Ceilings, footprint, measure_ceilings
from rkd_deploy.serve.bench.graph_cost import Cost, graph_cost
from rkd_deploy.serve.bench.report import Result
from rkd_deploy.serve.bench.tabular import Column, milliseconds
from rkd_deploy.serve.bench.timing import Progress
from rkd_deploy.serve.files import model_name, model_path, read_card

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One model at one batch size on one backend; None where it cannot be told, and `note` says why."""

    model: str
    file_bytes: int
    backend: str
    device: str
    threads: int | None
    batch: int
    macs: int | None = None
    """Of one call."""
    least_bytes: int | None = None
    """Weights, input and outputs, each once."""
    unfused_bytes: int | None = None
    """All operators' inputs and outputs."""
    arithmetic: str | None = None
    macs_per_s: float | None = None
    """The machine's ceiling."""
    bytes_per_s: float | None = None
    """The machine's ceiling for a working set of this size."""
    bound_ms: float | None = None
    """No call can be faster."""
    limit: str | None = None
    """Which ceiling it comes from: "compute" or "memory"."""
    note: str | None = None


@dataclass(frozen=True)
class Roofline:
    """What was predicted, and from what."""

    ceilings: tuple[Ceilings, ...]
    predictions: tuple[Prediction, ...]

    def to_record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def bound(macs: int, least_bytes: int, macs_per_s: float, bytes_per_s: float) -> tuple[float, str]:
    """The roofline as time.

    Returns:
        Milliseconds, and which ceiling they come from: "compute" or "memory".
    """
    compute, memory = 1000 * macs / macs_per_s, 1000 * least_bytes / bytes_per_s
    return (compute, "compute") if compute >= memory else (memory, "memory")


def predict(
    models: Sequence[str | os.PathLike[str]],
    *,
    backend: str = "onnxruntime",
    device: str | None = None,
    batches: Sequence[int] = (1, 8, 32),
    threads: int | None = None,
    progress: Progress | None = None,
) -> Roofline:
    """What each model has to do, what the machine can do, and the time that follows.

    Args:
        models: Bundle folders or ONNX files; of others the prediction says that nothing is known.
        backend: As for `load_backend`, and so `device` and `threads`.
        device: "cpu", "cuda" or "cuda:N"; None: the backend's own.
        batches: Numbers of images in one call.
        threads: Threads inside one operator on a CPU; None leaves it to the runtime.
        progress: Told what is being done.

    Returns:
        A prediction for each batch size and model, in that order.

    Raises:
        MissingDependencyError: onnx is not installed.
        ModelFileError: A model is missing.
        BackendError: The backend cannot run here.
    """
    subjects = [_subject(path) for path in models]
    wanted = [(subject, batch, *_costed(subject, batch)) for batch in batches for subject in subjects]
    costs = [cost for *_, cost, _ in wanted if cost is not None]
    ceilings: dict[str, Ceilings] = {}
    for arithmetic in sorted({cost.arithmetic for cost in costs} & set(ARITHMETIC)) if backend in BACKENDS else ():
        if progress is not None:
            progress(f"the machine's ceilings in {arithmetic}", 0)
        sizes = sorted({footprint(cost.least_bytes) for cost in costs if cost.arithmetic == arithmetic})
        ceilings[arithmetic] = measure_ceilings(
            backend, device=device, threads=threads, arithmetic=arithmetic, footprints=sizes
        )
    ran_on = next((one.device for one in ceilings.values()), device or "cpu")
    predictions = tuple(
        Prediction(
            model=subject.name,
            file_bytes=subject.file.stat().st_size,
            batch=batch,
            backend=backend,
            device=ran_on,
            threads=threads,
            **({"note": note} if cost is None else _bounded(cost, ceilings.get(cost.arithmetic), backend)),
        )
        for subject, batch, cost, note in wanted
    )
    return Roofline(tuple(ceilings.values()), predictions)


@dataclass(frozen=True)
class _Subject:
    name: str
    """As bench calls it."""
    file: Path
    image: tuple[int, ...]
    """Shape of one image, where a card says it."""
    readable: bool
    """Whether it is an ONNX file; an engine is none."""


def _subject(path: str | os.PathLike[str]) -> _Subject:
    onnx, file = require("onnx", "export"), model_path(path)
    try:
        found = onnx.load(str(file), load_external_data=False)
    except Exception:  # protobuf's own, of whatever kind: an engine, or a broken file, which the bench itself refuses
        return _Subject(model_name(path), file, (), False)
    card = read_card(path, {entry.key: entry.value for entry in found.metadata_props})
    name = card.name if card is not None else model_name(path)
    return _Subject(name, file, () if card is None else card.preprocess.input_shape, True)


def _costed(subject: _Subject, batch: int) -> tuple[Cost | None, str | None]:
    if not subject.readable:
        return None, "it is no ONNX file, whose operators could be counted"
    try:
        return graph_cost(subject.file, batch, subject.image), None
    except UsageError as error:
        return None, str(error)


def _bounded(cost: Cost, ceilings: Ceilings | None, backend: str) -> dict[str, Any]:
    known = {
        "macs": cost.macs,
        "least_bytes": cost.least_bytes,
        "unfused_bytes": cost.unfused_bytes,
        "arithmetic": cost.arithmetic,
        "note": f"not counted: {', '.join(cost.uncounted)}" if cost.uncounted else None,
    }
    if ceilings is None:
        why = f"in {cost.arithmetic}" if backend in BACKENDS else f"of {backend}, which runs no ONNX file"
        return {**known, "note": f"no ceiling is measured {why}"}
    rate = ceilings.bytes_per_s[footprint(cost.least_bytes)]
    bound_ms, limit = bound(cost.macs, cost.least_bytes, ceilings.macs_per_s, rate)
    rates = {"macs_per_s": ceilings.macs_per_s, "bytes_per_s": rate}
    return {**known, **rates, "bound_ms": bound_ms, "limit": limit}


@dataclass(frozen=True)
class Achieved:
    """A prediction beside what was measured."""

    prediction: Prediction
    p50_ms: float | None
    """None where it was not measured."""

    @property
    def share(self) -> float | None:
        """The bound over the measured median: 1 is the roof."""
        bound_ms = self.prediction.bound_ms
        return None if bound_ms is None or self.p50_ms is None else bound_ms / self.p50_ms


def achieved(predictions: Iterable[Prediction], results: Iterable[Result]) -> list[Achieved]:
    """Each prediction with the median of the result that it was made for."""
    medians = {_key(result): result.p50_ms for result in reversed(list(results))}
    return [Achieved(prediction, medians.get(_key(prediction))) for prediction in predictions]


def _key(one: Prediction | Result) -> tuple[Any, ...]:
    return one.model, one.file_bytes, one.batch, one.backend, one.device, one.threads


def _scaled(value: float | None, unit: float) -> str | None:
    return None if value is None else milliseconds(value / unit)  # three digits, whatever the unit


COLUMNS: tuple[Column[Achieved], ...] = (
    Column("Model", lambda a: a.prediction.model, numeric=False),
    Column("Backend", lambda a: f"{a.prediction.backend} {a.prediction.device}", numeric=False, setting=True),
    Column("Threads", lambda a: None if a.prediction.threads is None else str(a.prediction.threads), setting=True),
    Column("Batch", lambda a: str(a.prediction.batch)),
    Column("MACs of a call, M", lambda a: _scaled(a.prediction.macs, 1e6)),
    Column("Moved at least, MB", lambda a: _scaled(a.prediction.least_bytes, 1e6)),
    Column("Moved unfused, MB", lambda a: _scaled(a.prediction.unfused_bytes, 1e6), detail=True),
    Column("Peak, GMAC/s", lambda a: _scaled(a.prediction.macs_per_s, 1e9), detail=True),
    Column("Memory, GB/s", lambda a: _scaled(a.prediction.bytes_per_s, 1e9), detail=True),
    Column("Limit", lambda a: a.prediction.limit, numeric=False),
    Column("Bound, ms", lambda a: _scaled(a.prediction.bound_ms, 1)),
    Column("p50, ms", lambda a: _scaled(a.p50_ms, 1)),
    Column("Bound / p50, %", lambda a: None if a.share is None else f"{100 * a.share:.1f}"),
)


def print_roofline(predictions: Sequence[Prediction], results: Sequence[Result], console: Console) -> None:
    """The table, before a measurement (no results) or after it, and why a bound is missing."""
    console.print(
        "The bound that was predicted, and the median" if results else "Predicted: no call can be faster than"
    )
    tabular.print_table(COLUMNS, achieved(predictions, results), console)
    for note in sorted({f"{one.model}: {one.note}" for one in predictions if one.note}):
        console.print(note, style="yellow")
