"""Searches the widest networks that are no slower than S0, by measurement.

What is measured, and how, is the business of a `Stopwatch` (`rkd_deploy.export.stopwatch`). Here is only the search. It
moves along one number, the fraction of S0's MACs that a candidate may cost, because along it latency rises steadily, if
not exactly: fraction 1 first, then where a line through what was measured meets the target, until the last one that
fits and the first one that does not are neighbours. That is done by short measurements, and among many of these the
best looks faster than it is: what is found is measured anew, longer, and only that counts. So is the next wider one
then, because a short measurement may also have refused too much, until one fails.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import nn

from rkd_deploy.errors import BudgetError
from rkd_deploy.models.staged import Widths

BranchWidths = tuple[Widths, ...]
"""Widths of every network of a candidate: S0's alone, or those of S and of its assistants."""

WIDTH_STEPS = 50
"""Number of steps of the search: candidates cost 1/50, 2/50, .. of S0's MACs, and the result is right to one step."""
MAX_SECONDS = 120.0
"""Seconds after which nothing wider is looked for, as soon as there is a candidate that fits."""
ROUNDING = 0.005
"""How far a ratio may exceed its target: two measurements of one and the same network differ by as much."""
CONFIRMATIONS = 5
"""Number of candidates that may fail the longer measurement before the search gives up."""


@dataclass(frozen=True)
class Reading:
    """Latencies of a candidate and of S0, timed in turn in one run.

    Attributes:
        ratios: The candidate's latency over S0's, by batch size. Where it was to be confirmed, the median over
            sessions, in which both are loaded afresh, of the ratio of their medians; else the ratio of the 10th
            percentiles, because what else runs on a machine only ever adds to a latency.
        candidate_ms: Median latency of the candidate by batch size.
        s0_ms: Median latency of S0 by batch size.
        runs: How many calls of each were timed, by batch size.
        intervals: Where it was to be confirmed: the 95 % confidence interval of each of `ratios` (that of the
            median over the sessions).
    """

    ratios: dict[int, float]
    candidate_ms: dict[int, float]
    s0_ms: dict[int, float]
    runs: dict[int, int]
    intervals: dict[int, tuple[float, float]] = field(default_factory=dict)

    @property
    def worst(self) -> float:
        """The largest ratio over the batch sizes."""
        return max(self.ratios.values())

    def to_record(self) -> dict[str, Any]:
        """The reading as facts.json keeps it, where S0's latency is called `given_ms`."""
        return {
            "ratios": self.ratios,
            "candidate_ms": self.candidate_ms,
            "given_ms": self.s0_ms,
            "runs": self.runs,
            "intervals": self.intervals,
        }


class Stopwatch(Protocol):
    """Times two classifiers against each other, as they would be deployed."""

    def compare(self, candidate: nn.Module, s0: nn.Module, *, level: str, confirm: bool) -> Reading:
        """Time a candidate, fused at a level, and S0 in turn; long enough to decide on it where `confirm` is set."""
        ...

    def describe(self) -> dict[str, Any]:
        """The machine and backend of the measurements, for the record."""
        ...


class Candidate(NamedTuple):
    """Widths of a candidate, and its network, built when it is needed."""

    widths: BranchWidths
    build: Callable[[], nn.Module]
    level: str = "tail"
    """Level of fusion at which the candidate is timed (`rkd_deploy.export.fusion`)."""


class Fitting(NamedTuple):
    """The widths that a search chose, and the record of everything measured on the way."""

    widths: BranchWidths
    record: dict[str, Any]


def fastest_fitting(
    make: Callable[[float], Candidate],
    stopwatch: Stopwatch,
    s0: nn.Module,
    target: float,
    *,
    above: float = 0.0,
    deadline: float | None = None,
) -> Fitting:
    """Find the widest candidate that takes at most `target` times as long as S0, at every batch size.

    Args:
        make: The candidate of a fraction of the MACs, above 0 and at most 1. Raises BudgetError where there is none,
            and then for every smaller fraction too.
        stopwatch: Times a candidate against S0.
        s0: What the candidates are held against.
        target: The ratio of latencies that is allowed, within `ROUNDING`.
        above: Fraction that another search reached already: only those above it are of any use.
        deadline: When the search ends, by `time.monotonic`, if anything was found. Default: in `MAX_SECONDS`.

    Raises:
        BudgetError: No candidate is fast enough; the message has the numbers.
    """
    end = time.monotonic() + MAX_SECONDS if deadline is None else deadline
    return _Search(make, stopwatch, s0, target, above, end).run()


class _Search:
    """One search; candidates have a number n from 1 to WIDTH_STEPS, and cost at most n / WIDTH_STEPS of S0's MACs."""

    def __init__(
        self,
        make: Callable[[float], Candidate],
        stopwatch: Stopwatch,
        s0: nn.Module,
        target: float,
        above: float,
        deadline: float,
    ) -> None:
        self._stopwatch, self._s0, self._target = stopwatch, s0, target
        self._above, self._end = above, deadline
        self._readings: list[dict[str, Any]] = []
        self._ratios: dict[BranchWidths, float] = {}  # the latest, a confirmed one in place of a short one
        self._refused: set[BranchWidths] = set()  # by a confirmation
        # By widths and not by number: neighbouring numbers often come to the same widths, which are measured once.
        self._candidate = functools.cache(lambda number: make(number / WIDTH_STEPS))
        self._networks: dict[BranchWidths, nn.Module] = {}

    def run(self) -> Fitting:
        """Search and confirm; where a confirmation fails, search on below it."""
        narrowest, top = self._narrowest(), WIDTH_STEPS
        for _ in range(CONFIRMATIONS):
            number = self._widest(narrowest, top)
            reading = self._confirm(number)
            if self._fits(reading):
                return self._widened(number, reading)
            # One reading may be far off, and what it refuses too much is looked at again in the end.
            top = max(narrowest, min(number - 1, int(number * max(0.9, self._target / reading.worst))))
        raise BudgetError(
            f"{self._best()}, and no candidate stayed within {self._target:g} when it was measured anew, "
            f"{CONFIRMATIONS} times: this machine is too busy to measure on. Try again when it is not, or set "
            'student.budget = "macs".'
        )

    def _narrowest(self) -> int:
        """Least number that is of use and has a candidate."""
        # By halves: where there is no candidate of a fraction, there is none of any smaller one.
        missing, known = int(self._above * WIDTH_STEPS), WIDTH_STEPS
        if missing == WIDTH_STEPS:
            raise BudgetError(f"Nothing wider than {self._above:.2f} of the MACs is left to try.")
        self._candidate(WIDTH_STEPS)  # raises where there is none at all
        while known - missing > 1:
            middle = (missing + known) // 2
            try:
                self._candidate(middle)
                known = middle
            except BudgetError:
                missing = middle
        return known

    def _widest(self, narrowest: int, top: int) -> int:
        """Largest number up to `top` whose candidate fits by short measurements."""
        low, high, number = narrowest - 1, top + 1, top  # low fits, unless it is below all there is; high does not
        while True:
            low, high = (number, high) if self._ratio(number) <= self._target + ROUNDING else (low, number)
            if high - low == 1 or (time.monotonic() > self._end and (low >= narrowest or self._above)):
                break
            number = self._between(low, high, low >= narrowest)
        if low < narrowest:
            raise BudgetError(
                f"{self._best()}, and nothing narrower is left to try, down to {narrowest / WIDTH_STEPS:.2f} of the "
                "MACs. Lower student.round_to, student.assistant_share or student.assistants, or train S alone."
            )
        return low

    def _between(self, low: int, high: int, low_is_known: bool) -> int:
        """Number at which a line through two readings, or through one and the origin, meets the target."""
        # Latency is a line in the MACs only roughly: the number is held off both ends, so that every step shrinks the
        # interval by a good part, also after a bad reading.
        ratio_high = self._ratio(high)
        if not low_is_known:
            number = int(high * min(0.95, max(0.5, self._target / ratio_high)))
        else:
            ratio_low = self._ratio(low)
            part = (self._target - ratio_low) / (ratio_high - ratio_low) if ratio_high > ratio_low else 0.5
            number = low + int((high - low) * min(0.75, max(0.25, part)))
        return max(low + 1, min(high - 1, number))

    def _widened(self, number: int, reading: Reading) -> Fitting:
        """The confirmed candidate, or the widest neighbour above it that is confirmed as well."""
        while number < WIDTH_STEPS and time.monotonic() < self._end:
            widths = self._candidate(number).widths
            wider = next((n for n in range(number + 1, WIDTH_STEPS + 1) if self._candidate(n).widths != widths), None)
            if wider is None or self._candidate(wider).widths in self._refused:
                break
            longer = self._confirm(wider)
            if not self._fits(longer):
                break
            number, reading = wider, longer
        return Fitting(self._candidate(number).widths, self._record(number / WIDTH_STEPS, reading))

    def _fits(self, reading: Reading) -> bool:
        return reading.worst <= self._target + ROUNDING

    def _ratio(self, number: int) -> float:
        widths = self._candidate(number).widths
        if widths not in self._ratios:
            self._ratios[widths] = self._measure(number, confirm=False).worst
        return self._ratios[widths]

    def _confirm(self, number: int) -> Reading:
        reading = self._measure(number, confirm=True)
        widths = self._candidate(number).widths
        self._ratios[widths] = reading.worst
        if not self._fits(reading):
            self._refused.add(widths)
        return reading

    def _measure(self, number: int, confirm: bool) -> Reading:
        candidate = self._candidate(number)
        if candidate.widths not in self._networks:
            self._networks[candidate.widths] = candidate.build()
        network = self._networks[candidate.widths]
        reading = self._stopwatch.compare(network, self._s0, level=candidate.level, confirm=confirm)
        widths = [list(widths) for widths in candidate.widths]
        self._readings.append(
            {"fraction": number / WIDTH_STEPS, "widths": widths, "confirm": confirm} | reading.to_record()
        )
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
