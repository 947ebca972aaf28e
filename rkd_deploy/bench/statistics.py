"""Percentiles, intervals, and the judge of what is slower.

No sample is thrown away, and nothing here assumes a distribution.
Percentiles are nearest rank: the q-th is the ceil(q/100 * n)-th smallest sample, always one that was measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median_low

import numpy as np

from rkd_deploy.errors import UsageError

Z_95 = 1.959964
"""97.5 % quantile of the normal distribution, for two-sided intervals of 95 %."""


@dataclass(frozen=True)
class Timing:
    """The samples of one model at one batch size, and what follows from them; durations in ms."""

    samples_ms: tuple[float, ...]
    """Samples in the order they were measured; with several streams, stream after stream within a turn."""
    batch: int
    transfers: bool
    """Whether calls went host to host; False: input and output stayed on the device."""
    first_run_ms: float
    warmup_runs: int
    """Number of untimed calls, those after each change of model included."""
    warmup_seconds: float
    rounds: tuple[int, ...] = ()
    """Number of samples in each turn of 0.1 s, in order: drift is small within turns, and not between them."""
    streams: int = 1
    """Number of callers at once."""
    paces_ms: tuple[float, ...] = ()
    """The machine's pace (`pace.Pace`) just before each turn; empty where it was not taken."""
    complete: bool = True
    """Whether the limits were reached; False after an interruption."""

    @cached_property
    def round_medians_ms(self) -> tuple[float, ...]:
        """Median (nearest rank) of the samples of each turn, in order."""
        ends = np.cumsum(self.rounds).tolist()
        turns = [sorted(self.samples_ms[end - count : end]) for end, count in zip(ends, self.rounds, strict=True)]
        return tuple(turn[_rank(50, len(turn)) - 1] for turn in turns)

    @cached_property
    def _sorted(self) -> tuple[float, ...]:
        return tuple(sorted(self.samples_ms))

    def percentile(self, q: float) -> float:
        """The q-th percentile by nearest rank: the smallest sample with at least q percent of all at or below it.

        Raises:
            UsageError: `q` is not above 0 and at most 100.
        """
        _check_percentile(q)
        return self._sorted[_rank(q, len(self._sorted)) - 1]

    @property
    def p50(self) -> float:
        """Median of the samples, nearest rank."""
        return self.percentile(50)

    @property
    def mean(self) -> float:
        """Arithmetic mean of the samples."""
        return math.fsum(self.samples_ms) / len(self.samples_ms)

    @property
    def cv(self) -> float:
        """Coefficient of variation: sample standard deviation over mean, no unit; 0 for a single sample."""
        return float(np.std(self.samples_ms, ddof=1)) / self.mean if len(self.samples_ms) > 1 else 0.0

    @property
    def throughput_per_s(self) -> float:
        """Images per second of callers that never wait: streams * batch * calls / time in calls."""
        return 1000 * self.streams * self.batch * len(self.samples_ms) / math.fsum(self.samples_ms)

    def interval(self, q: float, confidence: float = 0.95) -> tuple[float, float]:
        """Distribution-free confidence interval of a percentile, from binomial order statistics.

        The number of samples below the true percentile is binomial, B ~ Bin(n, q/100), whatever the distribution, so
        P(X_(l) <= percentile <= X_(u)) >= P(l <= B <= u - 1). With a = (1 - confidence) / 2, l is the largest rank with
        P(B <= l - 1) <= a, and u the smallest with P(B <= u - 1) >= 1 - a.
        Conover, Practical Nonparametric Statistics, 3rd ed. 1999, section 3.2; David and Nagaraja, Order Statistics,
        3rd ed. 2003, section 7.1.

        That n holds for independent samples. Those of one turn share a clock and neighbours, so n is divided by the
        `design_effect` of the turns, and the ranks are stretched to the samples there are.

        Returns:
            Low and high end in ms; -inf or inf where so few samples bound it on no side.

        Raises:
            UsageError: `q` or `confidence` lies outside its range.
        """
        _check_percentile(q)
        if not 0 < confidence < 1:
            raise UsageError(f"confidence is {confidence}; it must lie between 0 and 1, for example 0.95.")
        count = len(self._sorted)
        # Rounded down, and the ranks stretched outward below: on doubt the interval is the wider one.
        effective = max(1, math.floor(count / self.design_effect(q)))
        low, high = interval_ranks(effective, q / 100, confidence)
        return (
            -math.inf if low is None else self._sorted[max(1, low * count // effective) - 1],
            math.inf if high is None else self._sorted[-(-high * count // effective) - 1],
        )

    def design_effect(self, q: float) -> float:
        """Variance of the share of samples below a percentile, over what it would be for independent samples.

        With n_j samples in turn j, y_j of them at or below the q-th percentile, p their share over all m turns:
        Var(p) = m / (m - 1) * sum_j (y_j - p n_j)^2 / n^2, and the effect is Var(p) / (p (1 - p) / n), at least 1;
        times (t / z)^2, because m is small. Inverting a clustered share like this is Woodruff's interval: Confidence
        intervals for medians and other position measures, JASA 47 (1952) 635; Kish, Survey Sampling, 1965, chapter 8.
        """
        m, n = len(self.rounds), len(self.samples_ms)
        below = np.asarray(self.samples_ms) <= self.percentile(q)
        p = float(below.mean())
        if m < 2 or p == 1:
            return 1.0
        counts = np.asarray(self.rounds)
        # At least 1: turns that differ less than chance would have it are luck, and must not narrow the interval.
        y = np.add.reduceat(below, np.cumsum(counts) - counts, dtype=np.int64)
        variance = m / (m - 1) * float(np.sum((y - p * counts) ** 2)) / n**2
        return max(1.0, variance * n / (p * (1 - p)) * _small_sample_factor(m - 1))


@dataclass(frozen=True)
class Judgement:
    """Ratio of two latencies over repeated sessions, and whether it shows one to be slower.

    Attributes:
        ratio: Median over the sessions of the first latency over the second; below 1, the first is faster.
        low: Lower end of the median's confidence interval, 0 where there are too few sessions for one.
        high: Upper end, infinite where there are too few sessions for one.
    """

    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """``"faster"`` or ``"slower"`` where the interval excludes 1, else ``"not shown"``."""
        return "faster" if self.high < 1 else "slower" if self.low > 1 else "not shown"


def judge(ratios: Sequence[float], confidence: float = 0.95) -> Judgement:
    """Judge whether one model is slower than another, both measured side by side in repeated sessions.

    What slows a machine down for longer than a session slows both sides alike and cancels out in the session's ratio;
    what hits one side alone is an outlier, which a median leaves out. The interval is that of the sign test.

    Args:
        ratios: First latency over the second in each session (`sessions.measure_in_sessions`).
        confidence: Above 0 and below 1.
    """
    ordered = sorted(ratios)
    # A value that was measured, and not the mean of two: with an even number of sessions the median stays one of them.
    return Judgement(median_low(ordered), *median_interval(ordered, confidence))


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Confidence interval of the median of positive values; 0 and infinity where too few bound it on a side."""
    ordered = sorted(values)
    low, high = interval_ranks(len(ordered), 0.5, confidence)
    return 0.0 if low is None else ordered[low - 1], math.inf if high is None else ordered[high - 1]


def interval_ranks(count: int, share: float, confidence: float) -> tuple[int | None, int | None]:
    """Ranks, from 1, of the two order statistics of `Timing.interval`; None where no rank is extreme enough.

    Args:
        count: Number of samples.
        share: The percentile as a share, above 0 and at most 1.
        confidence: Above 0 and below 1.
    """
    if share == 1:  # nothing measured bounds the largest value that could come up
        return count, None
    # In logarithms: binomial coefficients of a few thousand samples are beyond any float.
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, count + 1)))])
    k = np.arange(count + 1)
    log_choose = log_factorial[count] - log_factorial[k] - log_factorial[count - k]
    cdf = np.cumsum(np.exp(log_choose + k * math.log(share) + (count - k) * math.log1p(-share)))
    tail = (1 - confidence) / 2
    # cdf[k] is P(B <= k): the first rank that exceeds the tail is the number of ranks that do not, counted from 1.
    low = int(np.searchsorted(cdf, tail, side="right"))
    high = int(np.searchsorted(cdf, 1 - tail, side="left")) + 1
    return low or None, high if high <= count else None


def paired_interval(first: int, second: int, images: int) -> tuple[float, float]:
    """95 % interval of the difference of two accuracies on the same images, in points.

    Wald's interval for matched proportions with half an image added to each of the four cells, which keeps its coverage
    where few images differ (Agresti and Min, Statistics in Medicine 24, 2005, "Simple improved confidence intervals for
    comparing matched proportions"). With b and c the images that one network alone has right, of n:

        d = (b' - c') / n'      sd = sqrt((b' + c') / n' - d^2) / sqrt(n')      b' = b + 1/2, c' = c + 1/2, n' = n + 2

    Args:
        first: b, images that the first network alone classifies right.
        second: c, images that the second network alone classifies right.
        images: n.
    """
    b, c, n = first + 0.5, second + 0.5, images + 2
    difference = (b - c) / n
    half = Z_95 * math.sqrt((b + c) / n - difference**2) / math.sqrt(n)
    return 100 * (difference - half), 100 * (difference + half)


def _small_sample_factor(freedom: int) -> float:
    """(t / z)^2 at 97.5 %: Cornish and Fisher's expansion of Student's t (Abramowitz and Stegun 26.7.5)."""
    z = Z_95
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return float(((z + first / freedom + second / freedom**2) / z) ** 2)


def _rank(q: float, count: int) -> int:
    # In whole numbers where q is one: 0.9 * 10 is 9.000000000000002 in floats, and its ceiling 10.
    return max(1, math.ceil(q * count / 100))


def _check_percentile(q: float) -> None:
    if not 0 < q <= 100:
        raise UsageError(f"Percentile {q} was asked for; it must be above 0 and at most 100.")
