"""The widest networks that are no slower than a given one: a search by measurement.

What is measured, and how, is the business of a `Stopwatch` (`rkd_deploy.export.latency`). Here is only the search. It
moves along one number, the fraction of S0's MACs that a candidate may cost, because along it latency rises steadily, if
not exactly: fraction 1 first, then where a line through what was measured meets the target. What is found is measured
anew, longer, and only that counts: among many short measurements of equally slow networks the best looks faster than it
is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

from torch import nn

from rkd_deploy.errors import BudgetError

RESOLUTION = 0.02
"""The search ends when the largest fraction that fits is known to this."""
MAX_SECONDS = 120.0
"""It ends after this time too, as soon as it has a candidate that fits."""
CONFIRMATIONS = 5


@dataclass(frozen=True)
class Reading:
    """A candidate and S0, timed in turn in one run.

    Attributes:
        ratios: By batch size: the candidate's latency over S0's: of the medians where it was to be confirmed, else of
            the 10th percentiles, because what else runs on a machine only ever adds to a latency.
        candidate_ms: Its median latency by batch size.
        given_ms: That of S0.
        runs: How many calls of each were timed, by batch size.
    """

    ratios: dict[int, float]
    candidate_ms: dict[int, float]
    given_ms: dict[int, float]
    runs: dict[int, int]

    @property
    def worst(self) -> float:
        """The largest ratio."""
        return max(self.ratios.values())


class Stopwatch(Protocol):
    """Times two classifiers against each other, as they would be deployed."""

    def compare(self, candidate: nn.Module, given: nn.Module, *, confirm: bool) -> Reading:
        """Time both in turn; long enough to decide where `confirm` is set."""
        ...

    def describe(self) -> dict[str, Any]:
        """On what is measured, for the record."""
        ...


class Candidate(NamedTuple):
    """Widths, and the network that has them, built when it is needed."""

    widths: tuple[tuple[int, ...], ...]
    build: Callable[[], nn.Module]


class Fitting(NamedTuple):
    """What was found, and everything that was measured on the way."""

    widths: tuple[tuple[int, ...], ...]
    record: dict[str, Any]


def fastest_fitting(
    make: Callable[[float], Candidate], stopwatch: Stopwatch, given: nn.Module, target: float
) -> Fitting:
    """The widest candidate that takes at most `target` times as long as a given network, at every batch size.

    Args:
        make: The candidate of a fraction of the MACs, above 0 and at most 1. Raises BudgetError where there is none.
        stopwatch: Measures.
        given: What the candidates are held against.
        target: The ratio of latencies that is allowed.

    Raises:
        BudgetError: No candidate is fast enough; the message has the numbers.
    """
    return _Search(make, stopwatch, given, target).run()


class _Search:
    def __init__(
        self, make: Callable[[float], Candidate], stopwatch: Stopwatch, given: nn.Module, target: float
    ) -> None:
        self._make, self._stopwatch, self._given, self._target = make, stopwatch, given, target
        self._readings: list[dict[str, Any]] = []
        self._ratios: dict[tuple[tuple[int, ...], ...], float] = {}
        self._end = time.monotonic() + MAX_SECONDS

    def run(self) -> Fitting:
        """Search, confirm; where that fails, search on below."""
        fraction = 1.0
        for _ in range(CONFIRMATIONS):
            fraction = self._widest_below(fraction)
            candidate = self._candidate(fraction)
            reading = self._measure(fraction, candidate, confirm=True)
            if reading.worst <= self._target:
                return Fitting(candidate.widths, self._record(fraction, reading))
            fraction *= max(0.9, 0.99 * self._target / reading.worst)  # one reading may be far off
        raise BudgetError(
            f"{self._best()}, and no candidate stayed within {self._target:g} when it was measured anew, "
            f"{CONFIRMATIONS} times: this machine is too busy to measure on. Try again when it is not, or set "
            'student.budget = "macs".'
        )

    def _widest_below(self, fraction: float) -> float:
        """The largest fraction that fits by short measurements, at most the one given."""
        low = high = None
        while True:
            point = (fraction, self._ratio(fraction))
            low, high = (point, high) if point[1] <= self._target else (low, point)
            if high is None:
                return fraction
            if low is not None and (high[0] - low[0] <= RESOLUTION * high[0] or time.monotonic() > self._end):
                return low[0]
            fraction = self._between(low, high)

    def _between(self, low: tuple[float, float] | None, high: tuple[float, float]) -> float:
        """Where a line through two points, or through one and the origin, meets the target."""
        if low is None:
            return high[0] * min(0.95, max(0.5, self._target / high[1]))
        part = (self._target - low[1]) / (high[1] - low[1])
        return low[0] + (high[0] - low[0]) * min(0.75, max(0.25, part))

    def _ratio(self, fraction: float) -> float:
        candidate = self._candidate(fraction)
        if candidate.widths not in self._ratios:
            self._ratios[candidate.widths] = self._measure(fraction, candidate, confirm=False).worst
        return self._ratios[candidate.widths]

    def _candidate(self, fraction: float) -> Candidate:
        try:
            return self._make(fraction)
        except BudgetError as error:
            raise BudgetError(
                f"{self._best()}, and nothing narrower is affordable: {error} Lower student.assistant_share or "
                "student.assistants, or train S alone."
            ) from error

    def _measure(self, fraction: float, candidate: Candidate, confirm: bool) -> Reading:
        reading = self._stopwatch.compare(candidate.build(), self._given, confirm=confirm)
        row = {"fraction": fraction, "widths": [list(widths) for widths in candidate.widths], "confirm": confirm}
        self._readings.append(row | asdict(reading))
        return reading

    def _record(self, fraction: float, reading: Reading) -> dict[str, Any]:
        return {
            "target": self._target,
            "fraction_of_macs": fraction,
            "worst_ratio": reading.worst,
            "measured_on": self._stopwatch.describe(),
            "readings": self._readings,
        }

    def _best(self) -> str:
        if not self._readings:
            return "No S and A are as fast as asked for"
        best = min(self._readings, key=lambda row: max(row["ratios"].values()))
        ratios = ", ".join(f"{ratio:.3f} at batch {batch}" for batch, ratio in best["ratios"].items())
        return f"The fastest candidate, with {best['fraction']:.2f} of the MACs, took {ratios} times as long as S0"
