"""Predicts how fast a model could be on this machine, before it is measured.

With W_k multiply-adds in arithmetic k, Q bytes that have to be moved at the least, and the machine's ceilings pi_k
(MAC/s) and beta (bytes/s), no run takes less than

    t >= max(sum over k of W_k / pi_k, Q / beta),

which for one k is Williams, Waterman and Patterson's roofline (CACM 52(4), 2009) read as time: at W / Q MACs per byte
the roof is min(pi, beta W / Q). The measured median is then told as the share t / p50 of it. `graph_cost` counts W and
Q, `ceilings` measures pi and beta through the backend itself.

Not covered: what starting operators costs (for small networks at batch 1 most of the time), operators that are no
product, activations that do not stay in a cache. So a small share says that there is room, not that it can be had.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rkd_deploy.backends import ENGINE_BACKENDS, RunOn
from rkd_deploy.backends.files import model_name, model_path, read_card
from rkd_deploy.bench.ceilings import ARITHMETIC, CEILING_BACKENDS, Ceilings, footprint, measure_ceilings
from rkd_deploy.bench.graph_cost import GraphCost, graph_cost
from rkd_deploy.bench.layers import LayerTimes, layer_times
from rkd_deploy.bench.loading import Case
from rkd_deploy.bench.results import Result
from rkd_deploy.bench.settings import USUAL_BATCHES
from rkd_deploy.bench.timing import Progress
from rkd_deploy.errors import BackendError, UsageError, require


@dataclass(frozen=True, kw_only=True)
class LatencyBound(Case):
    """Prediction for one case; None where something cannot be told, and `note` says why."""

    macs: int | None = None
    """Multiply-adds of one call."""
    least_bytes: int | None = None
    """Bytes of weights, input and outputs, each moved once."""
    unfused_bytes: int | None = None
    """Bytes of all operators' inputs and outputs."""
    arithmetic: str | None = None
    """Type that the multiply-adds are done in; of several types their shares."""
    macs_per_s: float | None = None
    """The machine's ceiling of multiply-adds; of several types that of their mixture."""
    bytes_per_s: float | None = None
    """The machine's ceiling of bytes for a working set of this size."""
    bound_ms: float | None = None
    """Time in ms that no call can fall below."""
    limit: str | None = None
    """Ceiling that the bound comes from: "compute" or "memory"."""
    note: str | None = None


@dataclass(frozen=True)
class Roofline:
    """Predictions, and the ceilings that they follow from."""

    ceilings: tuple[Ceilings, ...] = ()
    predictions: tuple[LatencyBound, ...] = ()

    def to_record(self) -> dict[str, Any]:
        """The roofline for JSON."""
        return asdict(self)


def bound(macs: int, least_bytes: int, macs_per_s: float, bytes_per_s: float) -> tuple[float, str]:
    """The roofline's bound as the time of one call.

    Returns:
        Milliseconds, and which ceiling they come from: "compute" or "memory".
    """
    compute, memory = 1000 * macs / macs_per_s, 1000 * least_bytes / bytes_per_s
    return (compute, "compute") if compute >= memory else (memory, "memory")


def predict_roofline(
    models: Sequence[str | os.PathLike[str]],
    run_on: RunOn,
    *,
    batches: Sequence[int] = (1, 8, 32),
    shape: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> Roofline:
    """Predict the least time of a call of each model, from what it has to do and what the machine can do.

    Args:
        models: Bundle folders or ONNX files; of others the prediction says that nothing is known.
        run_on: Where; its streams are of no effect: the bound is one caller's.
        batches: Numbers of images in one call.
        shape: Shape of one input, for models that leave it open and have no card.
        progress: Called with what is being measured.

    Returns:
        A prediction for each batch size and model, in that order.

    Raises:
        MissingDependencyError: onnx is not installed.
        ModelFileError: A model is missing.
        BackendError: The backend cannot run here.
    """
    subjects = [_subject(path, shape) for path in models]
    cases = [(subject, batch, *_costed(subject, batch)) for batch in batches for subject in subjects]
    costs = [cost for *_, cost, _ in cases if cost is not None]
    ceilings = _ceilings(run_on, costs, progress) if costs and run_on.backend in CEILING_BACKENDS else {}
    ran_on = next((measured.device for measured in ceilings.values()), run_on.where)
    predictions = tuple(
        LatencyBound(
            model=subject.name,
            file_bytes=subject.file.stat().st_size,
            batch=batch,
            backend=run_on.backend,
            device=ran_on,
            threads=run_on.threads,
            **({"note": note} if cost is None else _bounded(cost, ceilings, run_on.backend)),
        )
        for subject, batch, cost, note in cases
    )
    return Roofline(tuple(ceilings.values()), predictions)


def _ceilings(run_on: RunOn, costs: Sequence[GraphCost], progress: Progress | None) -> dict[str, Ceilings]:
    """Ceilings by arithmetic; float32's too where those of another type cannot be measured."""
    # A rate for each size: what fits a cache moves faster than what does not, and one rate would flatter large models
    # or blame small ones.
    sizes = sorted({footprint(cost.least_bytes) for cost in costs})
    ceilings: dict[str, Ceilings] = {}

    def measure(arithmetic: str) -> None:
        if progress is not None:
            progress(f"the machine's ceilings on {run_on} in {arithmetic}", 0)
        ceilings[arithmetic] = measure_ceilings(run_on, arithmetic=arithmetic, footprints=sizes)

    wanted = {kind for cost in costs for kind in cost.macs_in}
    for kind in sorted(wanted & {*ARITHMETIC} - {"float32"}):
        with suppress(BackendError):  # of a runtime without such kernels; float32 below tells what is wrong otherwise
            measure(kind)
    if not wanted or not wanted <= {*ceilings}:
        measure("float32")
    return ceilings


@dataclass(frozen=True)
class _Subject:
    name: str
    """Name of the model, as bench calls it."""
    file: Path
    image: tuple[int, ...]
    """Shape of one image, where a card says it."""
    readable: bool
    """Whether the file is an ONNX file; an engine is none."""


def _subject(path: str | os.PathLike[str], shape: Sequence[int] | None) -> _Subject:
    onnx, file = require("onnx", "export"), model_path(path)
    try:
        model = onnx.load(str(file), load_external_data=False)
    except Exception:  # protobuf's own, of whatever kind: an engine, or a broken file, which the bench itself refuses
        return _Subject(model_name(path), file, (), False)
    card = read_card(path, {entry.key: entry.value for entry in model.metadata_props})
    name = card.name if card is not None else model_name(path)
    image = shape or (() if card is None else card.preprocess.input_shape)
    return _Subject(name, file, tuple(image), True)


def _costed(subject: _Subject, batch: int) -> tuple[GraphCost | None, str | None]:
    if not subject.readable:
        return None, "it is no ONNX file, whose operators could be counted"
    try:
        return graph_cost(subject.file, batch, subject.image), None
    except UsageError as error:
        return None, str(error)


def _bounded(cost: GraphCost, ceilings: Mapping[str, Ceilings], backend: str) -> dict[str, Any]:
    notes = [f"not counted: {', '.join(cost.uncounted)}"] if cost.uncounted else []
    known = {
        "macs": cost.macs,
        "least_bytes": cost.least_bytes,
        "unfused_bytes": cost.unfused_bytes,
        "arithmetic": _shares(cost),
    }
    if not ceilings:
        return {**known, "note": f"no ceiling is measured of {backend}, which runs no ONNX file"}
    seconds = 0.0  # the types of arithmetic one after the other: units for several types are not promised to overlap
    for kind, macs in cost.macs_in.items():
        if kind not in ceilings:
            notes.append(
                f"{kind} is bounded by the peak of float32, which it may exceed: its own could not be measured"
            )
        seconds += macs / ceilings.get(kind, ceilings.get("float32", next(iter(ceilings.values())))).macs_per_s
    # The best of all types: bytes are moved alike whatever they mean, and one of the measurements may have been
    # disturbed.
    rate = max(measured.bytes_per_s[footprint(cost.least_bytes)] for measured in ceilings.values())
    peak = cost.macs / seconds if seconds else max(measured.macs_per_s for measured in ceilings.values())
    bound_ms, limit = bound(cost.macs, cost.least_bytes, peak, rate)
    roof = {"macs_per_s": peak, "bytes_per_s": rate, "bound_ms": bound_ms, "limit": limit}
    return {**known, **roof, "note": "; ".join(notes) or None}


def _shares(cost: GraphCost) -> str:
    if len(cost.macs_in) < 2:
        return cost.arithmetic
    ordered = sorted(cost.macs_in.items(), key=lambda item: -item[1])
    return ", ".join(f"{kind} {100 * macs / cost.macs:.0f} %" for kind, macs in ordered)


@dataclass(frozen=True)
class Achieved:
    """A prediction beside the latency that was measured."""

    prediction: LatencyBound
    p50_ms: float | None
    """Median latency in ms; None where it was not measured."""

    @property
    def share(self) -> float | None:
        """The bound over the measured median: 1 is the roof."""
        bound_ms = self.prediction.bound_ms
        return None if bound_ms is None or self.p50_ms is None else bound_ms / self.p50_ms


def achieved(predictions: Iterable[LatencyBound], results: Iterable[Result]) -> list[Achieved]:
    """Pair each prediction with the median of the result that it was made for."""
    # Reversed, so that of several results of one case (numbers of streams, say) the first is the one that stays.
    medians = {_case(result): result.p50_ms for result in reversed(list(results))}
    return [Achieved(prediction, medians.get(_case(prediction))) for prediction in predictions]


def _case(source: LatencyBound | Result) -> Case:
    case = Case.of(source)
    # What is predicted is the ONNX file, and what runs the engine that was built of it.
    return replace(case, file_bytes=0) if case.backend in ENGINE_BACKENDS else case


class Analysis:
    """Rooflines and layer times of some models at all places of one bench, apart from the timed runs."""

    def __init__(
        self,
        models: Sequence[str | os.PathLike[str]],
        run_on: Sequence[RunOn],
        batches: Sequence[int] | None = None,
        *,
        shape: Sequence[int] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        """Take what is measured.

        Args:
            models: As for `bench`.
            run_on: Where. Places that differ in what changes neither bound nor layers are studied once.
            batches: As for `bench`.
            shape: As for `bench`.
            names: To call the models by, where their own are not those of the results.
        """
        self._models, self._names, self._shape = list(models), names, shape
        self._engine_batches = None if batches is None else list(batches)
        self._batches = self._engine_batches or list(USUAL_BATCHES)
        self._run_on = list(dict.fromkeys(replace(place, streams=1, cuda_graph=True) for place in run_on))
        self.roofline: Roofline | None = None
        self.layers: list[LayerTimes] | None = None

    def predict(self, progress: Progress | None = None) -> None:
        """Predict at each place, before the measurement; errors as for `predict_roofline`."""
        rooflines = [
            predict_roofline(
                self._models,
                place,
                batches=self._batches,
                shape=self._shape,
                progress=self._counted(progress, number),
            )
            for number, place in enumerate(self._run_on)
        ]
        predictions = [prediction for roofline in rooflines for prediction in roofline.predictions]
        if self._names is not None:
            names = list(self._names) * (len(predictions) // len(self._names))
            predictions = [replace(prediction, model=name) for prediction, name in zip(predictions, names, strict=True)]
        ceilings = tuple(measured for roofline in rooflines for measured in roofline.ceilings)
        self.roofline = Roofline(ceilings, tuple(predictions))

    def profile(self, progress: Progress | None = None, *, batch: int | None = None) -> None:
        """Time the layers at each place, after the measurement; errors as for `layers.layer_times`.

        Args:
            progress: Called with what is being profiled, and the share that is done.
            batch: Images in one call. Default: the smallest batch of the bench.
        """
        self.layers = []
        for number, place in enumerate(self._run_on):
            profiles = layer_times(
                self._models,
                place,
                batch=batch or min(self._batches),
                batches=self._engine_batches,
                shape=self._shape,
                progress=self._counted(progress, number),
            )
            if self._names is not None and profiles:
                profiles = [replace(times, model=name) for times, name in zip(profiles, self._names, strict=True)]
            self.layers += profiles

    def to_record(self) -> dict[str, Any]:
        """Rooflines and layer times for the record of the bench; what was not asked for is left out."""
        record: dict[str, Any] = {}
        if self.roofline is not None:
            record["roofline"] = self.roofline.to_record()
        if self.layers is not None:
            record["layers"] = [times.to_record() for times in self.layers]
        return record

    def _counted(self, progress: Progress | None, number: int) -> Progress | None:
        """A progress that takes shares of one place, and reports them as shares of all places."""
        return None if progress is None else lambda name, share: progress(name, (number + share) / len(self._run_on))
