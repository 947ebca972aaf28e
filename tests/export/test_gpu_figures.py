"""What is chosen by measurement on a GPU: fed with the figures of an H100, the layout and level are those they say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from torch import nn

from rkd_deploy.backends import RunOn
from rkd_deploy.bench.sessions import SESSIONS
from rkd_deploy.card import Preprocess
from rkd_deploy.errors import BudgetError
from rkd_deploy.export.graph import ExportGraph, to_onnx
from rkd_deploy.export.levels import Target, choose_level, fastest_level, judge_levels
from rkd_deploy.export.stopwatch import ExportStopwatch
from rkd_deploy.models.cost import count
from rkd_deploy.models.families.cifar_resnet import CifarResNet
from rkd_deploy.models.residual import ResidualStudent
from rkd_deploy.models.separation.latency import Reading
from rkd_deploy.models.separation.separate import separate

# Latency of S0 in ms at batch 1 and 32, and over it those of two branches (level tail), of both merged (level wide),
# and of S and A side by side: NVIDIA H100, 2026-11-26.
FIGURES = {
    "ResNet-20, onnxruntime, fp32": ((0.360, 0.424), (1.83, 1.64), (1.21, 1.14), (1.10, 1.01)),
    "ResNet-20, onnxruntime, fp16": ((0.522, 0.589), (2.10, 1.69), (1.19, 0.99), (0.98, 1.01)),
    "ResNet-20, pytorch, fp32": ((0.416, 0.585), (1.69, 1.46), (1.15, 1.18), (0.99, 0.99)),
    "ResNet-20, pytorch, fp16": ((0.236, 0.372), (1.89, 1.60), (1.18, 1.17), (1.02, 0.98)),
    "ResNet-18, onnxruntime, fp32": ((1.249, 4.557), (1.46, 1.09), (1.27, 1.50), (0.99, 1.00)),
    "ResNet-18, onnxruntime, fp16": ((0.927, 1.979), (2.11, 1.71), (1.73, 2.04), (1.03, 1.02)),
    "ResNet-18, pytorch, fp32": ((1.226, 5.348), (1.45, 1.15), (1.38, 1.80), (0.99, 1.00)),
    "ResNet-18, pytorch, fp16": ((0.336, 1.110), (1.89, 1.39), (1.28, 1.52), (1.00, 0.98)),
}
# What they say, by batch sizes. None: nothing that was measured takes S0's time. At batch 1, two branches never do.
TAKEN = [
    ("ResNet-20, onnxruntime, fp32", (1,), None),
    ("ResNet-20, onnxruntime, fp16", (1, 32), "side by side"),
    ("ResNet-20, pytorch, fp32", (1, 32), "side by side"),
    ("ResNet-20, pytorch, fp16", (32,), "side by side"),
    ("ResNet-18, onnxruntime, fp32", (1, 32), "side by side"),
    ("ResNet-18, onnxruntime, fp32", (32,), "branches"),
    ("ResNet-18, onnxruntime, fp16", (32,), "side by side"),
    ("ResNet-18, pytorch, fp32", (32,), "branches"),
    ("ResNet-18, pytorch, fp16", (1, 32), "side by side"),
    ("ResNet-18, pytorch, fp16", (32,), "branches"),
]
LAYOUTS = {"side by side": "wide", "branches": "tail"}
"""The level of fusion of each."""
PLACE = {1: 0, 32: 1}


@dataclass
class Simulated:
    """A stopwatch that knows the figures, and reads a network's MACs.

    What does not grow with the batch is launches; the rest is arithmetic, and in proportion to the MACs.
    """

    figures: tuple[tuple[float, float], ...]
    batches: tuple[int, ...]

    def launches(self, batch: int) -> float:
        """Share of a run that no narrower network saves."""
        first, last = self.figures[0]
        slope = (last - first) / 31
        return (first - slope) / self.figures[0][PLACE[batch]]

    def compare(self, candidate: nn.Module, s0: nn.Module, *, level: str, confirm: bool) -> Reading:
        share = count(candidate, (32, 32)).macs / count(s0, (32, 32)).macs
        if level == "wide":  # half of what is computed side by side are zeros, and take their time
            share = min(1.0, 2 * share)
        of_level = self.figures[3 if level == "wide" else 1]
        ratios = {
            batch: of_level[PLACE[batch]] * (self.launches(batch) + (1 - self.launches(batch)) * share)
            for batch in self.batches
        }
        return Reading(ratios=ratios, candidate_ms=ratios, s0_ms=dict.fromkeys(ratios, 1.0), runs={})

    def describe(self) -> dict[str, Any]:
        return {"device": "cuda"}


@pytest.mark.parametrize(("name", "batches", "layout"), TAKEN)
def test_a_budget_of_latency_takes_the_layout_that_the_figures_say(
    name: str, batches: tuple[int, ...], layout: str | None
) -> None:
    def cut() -> str:
        watch = Simulated(FIGURES[name], batches)
        return separate("resnet8", num_classes=10, input_size=32, budget="latency", stopwatch=watch).level

    if layout is None:
        with pytest.raises(BudgetError, match="times as long as S0"):
            cut()
    else:
        assert cut() == LAYOUTS[layout]


def test_a_trunk_with_ends_side_by_side_takes_s0s_time_and_leaves_more_than_two_networks_side_by_side() -> None:
    figures = FIGURES["ResNet-20, pytorch, fp32"]
    cuts = {
        layout: separate(
            "resnet20",
            num_classes=100,
            input_size=32,
            budget="latency",
            layout=layout,
            stopwatch=Simulated(figures, (1, 32)),
        )
        for layout in ("side_by_side", "trunk")
    }
    trunk = cuts["trunk"]
    assert (trunk.level, trunk.shared_stages) == ("wide", 2)
    S, A = trunk.student.widths, trunk.assistant.widths
    assert S[:3] == A[:3] == trunk.s0_widths[:3]
    assert S[3] + A[3] == trunk.s0_widths[3]
    assert cuts["side_by_side"].cost < trunk.cost <= trunk.budget


def branches() -> ResidualStudent:
    S, A = CifarResNet(8, (8, 8, 8, 8), None), CifarResNet(8, (4, 4, 4, 4), None)
    return ResidualStudent(S, [A], 8, 4).eval()


def proto_of(network: nn.Module) -> Any:
    preprocess = Preprocess(height=8, width=8, mean=(0.5,) * 3, std=(0.5,) * 3)
    return to_onnx(ExportGraph(network, preprocess), preprocess)


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("batch", [1, 32])
def test_auto_takes_the_level_that_the_figures_say(name: str, batch: int) -> None:
    (s0_ms, tail, wide, *_), at = FIGURES[name], PLACE[batch]
    drift = [1 + 0.01 * number for number in range(SESSIONS)]  # a slower machine from session to session, for all alike
    p50_ms = {
        level: [{batch: ratios[at] * s0_ms[at] * slower} for slower in drift]
        for level, ratios in (("tail", tail), ("wide", wide))
    }
    assert fastest_level(judge_levels(p50_ms)) == ("wide" if wide[at] < tail[at] else "tail")


def test_auto_and_the_stopwatch_measure_where_they_are_asked_to(ort_gpu: list[Any]) -> None:
    """Every candidate, on the simulated device."""
    backend = "onnxruntime:cuda-graphs"
    run_on = RunOn(backend, device="cuda")
    search = choose_level(branches(), proto_of, Target(run_on, (2,), min_seconds=0.01)).search
    assert search is not None
    assert search.device == "cuda:0"
    assert {"tail", "wide"} <= {*search.sessions}
    assert all(result.backend == backend for results in search.sessions["wide"] for result in results)
    before = len(ort_gpu)
    with ExportStopwatch(run_on, (1,), input_size=(8, 8)) as stopwatch:
        model = branches()
        reading = stopwatch.compare(model, CifarResNet(8, (8, 8, 8, 8), 4).eval(), level="tail", confirm=False)
        assert stopwatch.describe()["device"] == "cuda"
    assert set(reading.ratios) == {1}
    assert len(ort_gpu) > before >= 2
    assert all(session.provider[0] == "CUDAExecutionProvider" for session in ort_gpu)
