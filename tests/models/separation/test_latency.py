"""The search by latency, on machines whose latency is a formula and its answer known."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rkd_deploy.errors import BudgetError, UsageError
from rkd_deploy.models.cost import count
from rkd_deploy.models.families.cifar_resnet import CifarResNet
from rkd_deploy.models.residual import ResidualStudent
from rkd_deploy.models.separation import latency
from rkd_deploy.models.separation.latency import (
    CONFIRMATIONS,
    ROUNDING,
    WIDTH_STEPS,
    Candidate,
    Fitting,
    Reading,
    fastest_fitting,
)
from rkd_deploy.models.separation.separate import Separation, separate
from rkd_deploy.models.trunk import parted


class Formula:
    """A machine on which a network takes a + b MACs, times noise; the largest of two batch sizes counts.

    Args:
        overhead: What S + A take beside their MACs, in units of S0's latency; half of that at batch 8.
        noise: Standard deviation of the logarithm of a short reading; that of a long one is a third.
        bias: How much faster the short readings make everything look.
    """

    def __init__(self, overhead: float = 0.0, noise: float = 0.0, seed: int = 0, bias: float = 0.0) -> None:
        self.overhead, self.noise, self.bias = overhead, noise, bias
        self.random = np.random.default_rng(seed)
        self.calls: list[bool] = []

    def compare(self, candidate: nn.Module, s0: nn.Module, *, level: str, confirm: bool) -> Reading:
        self.calls.append(confirm)
        true = {batch: self.true_ratio(candidate, batch, level) for batch in (1, 8)}
        spread = self.noise * (1 / 3 if confirm else 1)
        ratios = {batch: ratio * float(np.exp(self.random.normal(0, spread))) for batch, ratio in true.items()}
        if not confirm:
            ratios = {batch: ratio * (1 - self.bias) for batch, ratio in ratios.items()}
        return Reading(ratios, ratios, dict.fromkeys(ratios, 1.0), dict.fromkeys(ratios, 10))

    def true_ratio(self, candidate: nn.Module, batch: int, level: str) -> float:
        return self.overhead / (1 if batch == 1 else 2) + float(candidate.cost)  # type: ignore[arg-type]

    def describe(self) -> dict[str, Any]:
        return {"backend": "formula"}


def search(stopwatch: Formula, width: int, narrowest: int = 1, target: float = 1.0) -> tuple[int, Fitting]:
    """Candidates whose cost is a multiple of `width` steps, from `narrowest` on; what is found, in steps."""

    def make(fraction: float) -> Candidate:
        steps = round(fraction * WIDTH_STEPS) // width * width
        if steps < narrowest:
            raise BudgetError("too small")

        def build() -> nn.Module:
            network = nn.Module()
            network.cost = steps / WIDTH_STEPS
            return network

        return Candidate(((steps,),), build)

    fitting = fastest_fitting(make, stopwatch, nn.Identity(), target)
    return fitting.widths[0][0], fitting


@settings(max_examples=60, deadline=None)
@given(overhead=st.floats(0, 0.7), width=st.integers(1, 7), target=st.sampled_from([1.0, 0.9]))
def test_without_noise_the_widest_that_fits_is_found_and_its_neighbour_refused(
    overhead: float, width: int, target: float
) -> None:
    fitting = [n for n in range(width, WIDTH_STEPS + 1, width) if overhead + n / WIDTH_STEPS <= target + ROUNDING]
    stopwatch = Formula(overhead)
    if not fitting:
        with pytest.raises(BudgetError, match="nothing narrower is left to try"):
            search(stopwatch, width, narrowest=width, target=target)
        return
    steps, chosen = search(stopwatch, width, narrowest=width, target=target)
    assert steps == fitting[-1]
    assert chosen.record["worst_ratio"] == pytest.approx(overhead + steps / WIDTH_STEPS)
    assert len(stopwatch.calls) <= 12
    confirmed = {
        row["widths"][0][0]: max(row["ratios"].values()) for row in chosen.record["readings"] if row["confirm"]
    }
    assert confirmed[steps] <= target + ROUNDING
    if steps + width <= WIDTH_STEPS:
        assert confirmed[steps + width] > target + ROUNDING
    json.dumps(chosen.record, allow_nan=False)


@settings(max_examples=60, deadline=None)
@given(overhead=st.floats(0, 0.6), width=st.integers(1, 5), seed=st.integers(0, 10_000), bias=st.floats(0, 0.08))
def test_with_noise_nothing_too_slow_is_returned_and_little_is_given_away(
    overhead: float, width: int, seed: int, bias: float
) -> None:
    noise = 0.015
    stopwatch = Formula(overhead, noise, seed, bias)
    steps, fitting = search(stopwatch, width, narrowest=width)
    latest = [row for row in fitting.record["readings"] if row["widths"] == [[steps]] and row["confirm"]][-1]
    assert max(latest["ratios"].values()) == fitting.record["worst_ratio"] <= 1 + ROUNDING
    assert overhead + steps / WIDTH_STEPS <= 1 + ROUNDING + 4 * noise / 3  # a long reading is off by its noise at most
    wider = steps + width
    assert wider > WIDTH_STEPS or overhead + wider / WIDTH_STEPS > 1 - 4 * noise / 3


def test_where_nothing_fits_the_fastest_is_stated_in_numbers() -> None:
    with pytest.raises(BudgetError) as caught:
        search(Formula(overhead=0.9), 1, narrowest=20)
    message = str(caught.value)
    assert "The fastest candidate, with 0.40 of the MACs, took 1.300 at batch 1, 0.850 at batch 8 times" in message
    assert "down to 0.40 of the MACs" in message
    assert "Lower student.round_to" in message


def test_short_readings_that_flatter_too_much_are_not_believed() -> None:
    """Half of the true latency: each confirmation says no, and the search gives up rather than return anything."""
    stopwatch = Formula(overhead=0.9, bias=0.5)
    with pytest.raises(BudgetError, match=rf"measured anew, {CONFIRMATIONS} times: this machine is too busy"):
        search(stopwatch, 1, narrowest=1)
    assert stopwatch.calls.count(True) == CONFIRMATIONS


def test_when_time_is_up_what_fits_is_confirmed_and_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "MAX_SECONDS", 0.0)
    stopwatch = Formula(overhead=0.3)
    steps, fitting = search(stopwatch, 1)
    assert fitting.record["worst_ratio"] <= 1 + ROUNDING
    assert 0.5 * 35 <= steps <= 35
    assert stopwatch.calls.count(True) == 1


# S and A


class BranchFormula(Formula):
    """MACs counted on the networks, and so much more for every branch; layers side by side are one dense network.

    Args:
        s0: The network that is cut.
        per_branch: In units of the latency of S0's MACs.
        merges: Whether branches can be laid side by side at all.
    """

    def __init__(self, s0: CifarResNet, per_branch: float, merges: bool = True) -> None:
        super().__init__()
        self.per_branch, self.s0, self.merges = per_branch, s0, merges
        self.s0_macs = count(s0, 32).macs

    def true_ratio(self, candidate: nn.Module, batch: int, level: str) -> float:
        assert isinstance(candidate, ResidualStudent)
        if level == "wide":
            if not self.merges:
                raise UsageError("these do not merge")
            with torch.device("meta"):
                merged = self.s0.rebuilt(merged_widths(candidate), 10)
            return (self.per_branch + count(merged, 32).macs / self.s0_macs) / (self.per_branch + 1)
        branches, macs = len(candidate.branches()), count(candidate, 32).macs / self.s0_macs
        return (branches * self.per_branch + macs) / (self.per_branch + 1)


def merged_widths(model: ResidualStudent) -> tuple[int, ...]:
    widths = [backbone.widths for backbone, _ in model.branches()]
    return tuple(map(sum, zip(*widths, strict=True)))


def cut_by(stopwatch: BranchFormula, **how: Any) -> Separation:
    settings: dict[str, Any] = {"num_classes": 10, "input_size": 32, "assistant_share": 0.2, "round_to": 8}
    with torch.no_grad():
        return separate(stopwatch.s0, budget="latency", stopwatch=stopwatch, **(settings | how))


@pytest.mark.parametrize("per_branch", [0.05, 0.3, 0.6])
def test_s_and_a_fill_what_their_second_branch_leaves(per_branch: float) -> None:
    cut = cut_by(BranchFormula(CifarResNet(8, (16, 16, 32, 64), 10), per_branch, merges=False))
    assert cut.latency is not None
    assert cut.latency["fused"]["level"] == "tail"
    assert cut.latency["fused"]["refused"] == {"wide": "these do not merge"}
    macs, allowed = cut.cost / cut.budget, 1 - per_branch  # (2 b + m) / (b + 1) <= 1
    allowed += ROUNDING * (per_branch + 1)
    assert macs <= allowed
    assert cut.latency["fused"]["worst_ratio"] == pytest.approx((2 * per_branch + macs) / (per_branch + 1))
    # The steps of S are coarse (8 channels): the next wider one is more than what is allowed.
    full, steps = cut.s0_widths, cut.student.steps(8)
    prices = [
        cut.cost - cut.parts["student"] + count(cut.student.rebuilt(wider, None), 32).macs
        for wider in (
            (*cut.student.widths[:i], w + step, *cut.student.widths[i + 1 :])
            for i, (w, step) in enumerate(zip(cut.student.widths, steps, strict=True))
        )
        if all(w <= width_of_s0 for w, width_of_s0 in zip(wider, full, strict=True))
    ]
    assert min(prices) / cut.budget > allowed - 2 / WIDTH_STEPS
    assistant = cut.parts["assistant"] + cut.parts["assistant_adapter"]
    assert assistant <= 0.2 * cut.budget
    narrowest = cut.assistant.widths == (8, 8, 8, 8)
    assert cut.latency["fused"]["assistant_is_narrowest"] is narrowest
    assert narrowest or assistant <= 0.2 * cut.latency["fused"]["fraction_of_macs"] * cut.budget


@pytest.mark.parametrize("assistants", [1, 2])
def test_where_a_branch_costs_much_the_layers_stand_side_by_side_and_are_as_many_channels_as_S0_has(
    assistants: int,
) -> None:
    stopwatch = BranchFormula(CifarResNet(8, (32, 32, 64, 128), 10), per_branch=0.6)
    cut = cut_by(stopwatch, assistants=assistants)
    assert cut.latency is not None
    fused = cut.latency["fused"]
    assert fused["level"] == "wide"
    assert tuple(s + assistants * a for s, a in zip(cut.student.widths, cut.assistant.widths, strict=True)) == (
        cut.s0_widths
    )
    assert fused["worst_ratio"] == pytest.approx(1.0)
    assert cut.cost < cut.budget
    assert cut.parts["assistant"] + cut.parts["assistant_adapter"] <= 0.2 * cut.budget
    assert "wider than" in fused["refused"]["tail"] or "nothing narrower" in fused["refused"]["tail"]


def test_two_branches_are_taken_where_they_cost_little_and_may_be_wider_than_layers_side_by_side() -> None:
    cut = cut_by(BranchFormula(CifarResNet(8, (32, 32, 64, 128), 10), per_branch=0.05))
    assert cut.latency is not None
    fused = cut.latency["fused"]
    assert fused["level"] == "tail"
    side_by_side = fused["other_levels"]["wide"]
    assert side_by_side["worst_ratio"] == pytest.approx(1.0)
    assert cut.cost / cut.budget > 0.9


def test_where_S0_has_no_room_for_two_the_merged_layers_are_held_against_it_all_the_same() -> None:
    """8 channels before the first stage: S and A need 8 each, and the wider ones are narrowed until both fit."""
    stopwatch = BranchFormula(CifarResNet(8, (8, 16, 32, 64), 10), per_branch=0.6)
    cut = cut_by(stopwatch)
    assert cut.latency is not None
    assert cut.student.widths[0] == cut.assistant.widths[0] == 8
    assert cut.parts["assistant"] + cut.parts["assistant_adapter"] <= 0.2 * cut.budget
    assert cut.latency["fused"]["worst_ratio"] <= 1 + ROUNDING


def test_an_assistant_whose_narrowest_form_takes_more_than_its_share_is_refused_side_by_side_too() -> None:
    with pytest.raises(BudgetError, match="too small for the assistant alone"):
        cut_by(BranchFormula(CifarResNet(8, (8, 16, 32, 64), 10), per_branch=0.0), assistant_share=0.01)


@pytest.mark.parametrize("per_branch", [0.0, 0.3])
def test_on_a_trunk_S_and_A_are_the_widest_that_are_no_slower(per_branch: float) -> None:
    stopwatch = BranchFormula(CifarResNet(8, (32, 32, 64, 128), 10), per_branch, merges=False)
    cut = cut_by(stopwatch, layout="trunk")
    assert cut.latency is not None
    assert cut.shared_stages == 2
    assert cut.student.widths[:3] == cut.assistant.widths[:3]
    assert sum(cut.parts.values()) == cut.cost <= cut.budget
    # S and A anew, as they ship, by the same formula: no slower than S0, and one step of the search wider is.
    shipped = parted(cut.student, cut.assistants, 2, 128, 10)
    assert stopwatch.true_ratio(shipped, 1, "tail") == pytest.approx(cut.latency["fused"]["worst_ratio"])
    assert cut.latency["fused"]["worst_ratio"] <= 1 + ROUNDING
    assert (cut.latency["fused"]["fraction_of_macs"] == 1) is (per_branch == 0)


def test_a_trunk_of_one_stage_is_searched_too() -> None:
    stopwatch = BranchFormula(CifarResNet(8, (32, 32, 64, 128), 10), 0.1, merges=False)
    cut = cut_by(stopwatch, layout="trunk", shared_stages=1)
    assert cut.shared_stages == 1
    assert cut.student.widths[:2] == cut.assistant.widths[:2]
    assert cut.student.widths[2] != cut.assistant.widths[2]
