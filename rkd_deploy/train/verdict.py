"""Whether S + A is more accurate than the best control, with an interval. Needs no torch.

One seed: both networks answered the same n test images, b of them right by S + A alone and c by the control alone. The
interval is that of the difference of two proportions of pairs (`bench.statistics.paired_interval`). It says what other
test images might give, of these two networks. Several seeds: Student's t interval of the differences seed by seed,
which says what other trainings might give. Two networks of different runs and one seed are compared as if they had
answered different images, which is the wider interval.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rkd_deploy.bench.statistics import Z_95, paired_interval
from rkd_deploy.train.facts import Pairs, RunMetrics

CONTROLS = ("s0", "control", "student")
"""Parts that S + A must beat to be worth shipping: S0 with its own head, S0 with the same losses, S alone."""

_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""97.5 % quantile of Student's t for 1, 2, .. degrees of freedom; beyond them the next lower one is a little wide."""


@dataclass(frozen=True, kw_only=True)
class Gain:
    """A difference of two accuracies and its 95 % interval, in points.

    Attributes:
        points: Estimate, S + A less the control.
        low: Lower end.
        high: Upper end.
        seeds: Trainings behind it.
    """

    points: float
    low: float
    high: float
    seeds: int


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a comparison of S + A with its best control says.

    Attributes:
        network: Name of S + A's row.
        control: Part of the control.
        control_name: Name of the control for people.
        gain: Accuracy of S + A less the control's.
        cost_ratio: MACs of S + A over the control's.
        time_ratio: Median latency likewise, where it was measured.
    """

    network: str
    control: str
    control_name: str
    gain: Gain
    cost_ratio: float
    time_ratio: float | None = None

    @property
    def outcome(self) -> str:
        """better, worse, or open: the interval lies above 0, below it, or holds it."""
        return "better" if self.gain.low > 0 else "worse" if self.gain.high < 0 else "open"

    def sentence(self) -> str:
        """The verdict as one sentence."""
        gain = self.gain
        basis = "1 seed" if gain.seeds == 1 else f"{gain.seeds} seeds"
        cost = f"{self.cost_ratio:.2f} of its MACs"
        if self.time_ratio is not None:
            cost = f"{self.time_ratio:.2f} of its time"
        end = {
            "better": "better",
            "open": "not shown better",
            "worse": f"worse: ship {self.control_name} (export --part {self.control})",
        }[self.outcome]
        return (
            f"{self.network} against {self.control_name}: {gain.points:+.2f} points (95 % interval {gain.low:+.2f} to "
            f"{gain.high:+.2f}, {basis}), {cost}: {end}."
        )


def pairs_of(ours: Sequence[bool], others: Sequence[bool]) -> Pairs:
    """Count the test images that only one of two networks classifies right.

    Args:
        ours: For each image, whether S + A is right.
        others: For each image, whether the control is.
    """
    return Pairs(
        gained=sum(mine and not other for mine, other in zip(ours, others, strict=True)),
        lost=sum(other and not mine for mine, other in zip(ours, others, strict=True)),
    )


def gain_of_pairs(gained: int, lost: int, images: int) -> Gain:
    """The gain of one seed, from the test images that only one of the two networks classifies right.

    Args:
        gained: b.
        lost: c.
        images: n.
    """
    low, high = paired_interval(gained, lost, images)
    return Gain(points=100 * (gained - lost) / images, low=low, high=high, seeds=1)


def gain_of_seeds(ours: Sequence[float], others: Sequence[float]) -> Gain:
    """The gain of several seeds, from accuracies in %, in the same order of seeds.

    Args:
        ours: Accuracies of S + A.
        others: Accuracies of the control.
    """
    differences = [mine - other for mine, other in zip(ours, others, strict=True)]
    count = len(differences)
    half = _T[min(count - 1, len(_T)) - 1] * statistics.stdev(differences) / math.sqrt(count)
    points = statistics.fmean(differences)
    return Gain(points=points, low=points - half, high=points + half, seeds=count)


def gain_of_samples(ours: float, others: float, images: int) -> Gain:
    """The gain between two runs of one seed each, as if they had answered different test images.

    Args:
        ours: Accuracy of S + A in %.
        others: Accuracy of the control in %.
        images: n.
    """
    half = Z_95 * math.sqrt(sum(p * (100 - p) / images for p in (ours, others)))
    return Gain(points=ours - others, low=ours - others - half, high=ours - others + half, seeds=1)


def of_metrics(metrics: RunMetrics, names: Mapping[str, str]) -> Verdict | None:
    """The verdict on one run, from its results; None where there is no S + A, or no control to hold it against.

    Args:
        metrics: Results of the run.
        names: Names of the parts for people.
    """
    parts, pairs = metrics.parts, metrics.pairs
    if not pairs:
        return None
    # The best by the very images that are judged on: a choice that can only work against S + A.
    control = max(pairs, key=lambda part: (parts[part].test_top1, part))
    return Verdict(
        network=names["fused"],
        control=control,
        control_name=names[control],
        gain=gain_of_pairs(pairs[control].gained, pairs[control].lost, parts["fused"].test_images),
        cost_ratio=parts["fused"].macs / parts[control].macs,
    )


def of_series(parts: Mapping[str, Mapping[str, Any]], names: Mapping[str, str]) -> Verdict | None:
    """The verdict on a series of seeds, from the parts of its summary; None as for one run.

    Args:
        parts: Each with `test_top1`, a list with one accuracy for each seed, `mean` and `macs`.
        names: Names of the parts for people.
    """
    controls = [part for part in CONTROLS if part in parts]
    if "fused" not in parts or not controls:
        return None
    control = max(controls, key=lambda part: parts[part]["mean"])
    return Verdict(
        network=names["fused"],
        control=control,
        control_name=names[control],
        gain=gain_of_seeds(parts["fused"]["test_top1"], parts[control]["test_top1"]),
        cost_ratio=parts["fused"]["macs"] / parts[control]["macs"],
    )


def verdict_json(verdict: Verdict | None) -> dict[str, Any]:
    """A verdict for JSON, under its key; nothing where there is none."""
    return {} if verdict is None else {"verdict": {**asdict(verdict), "outcome": verdict.outcome}}
