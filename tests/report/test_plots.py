"""What is drawn, read back from the figures, against the samples."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkd_deploy.bench.layers import LayerMedian
from rkd_deploy.report import plots
from rkd_deploy.report.accuracy_latency import accuracy_interval, pareto_front
from rkd_deploy.report.sections import verdict_sentences
from rkd_deploy.report.style import THEME, series_colours, short

RED = THEME["fused"][0]


def measured(samples, **facts):
    return SimpleNamespace(samples_ms=samples, p50_ms=float(np.median(samples)), **facts)


def test_the_distribution_ends_at_the_slowest_call_and_is_right_between():
    samples = [float(place) for place in np.random.default_rng(0).permutation(np.arange(1, 1001))]
    (axes,) = plots.distributions({"a": measured(samples)}, {"a": RED}).axes
    xs, ys = axes.lines[0].get_data()
    assert (xs[0], ys[0]) == (1.0, 0.0)
    assert (xs[-1], ys[-1]) == (1000.0, 100.0)
    # Sample k of 1..1000 is the k/10-th percentile, at every step that is drawn.
    assert ys[1:] == pytest.approx(xs[1:] / 10)


@pytest.mark.parametrize("outlier", [1.02, 400.0], ids=["linear", "logarithmic"])
def test_a_histogram_holds_every_sample_the_outlier_too(outlier):
    samples = [1.0, 1.0, 1.01, outlier]
    (axes,) = plots.histograms({"a": measured(samples)}, {"a": RED}).axes
    values, edges, _ = axes.patches[0].get_data()
    assert values.sum() == pytest.approx(100)
    assert values[-1] == pytest.approx(25)
    assert (edges[0], edges[-1]) == (1.0, outlier)


def test_equal_samples_can_be_drawn():
    axes = plots.histograms({"a": measured([2.0, 2.0])}, {"a": RED}).axes[0]
    assert axes.patches[0].get_data().values.sum() == pytest.approx(100)


def test_throughput_is_that_of_the_results():
    points = [SimpleNamespace(batch=batch, throughput_per_s=100.0 + batch) for batch in (1, 8)]
    (axes,) = plots.throughputs({"a": points}, {"a": RED}).axes
    assert axes.lines[0].get_xydata().tolist() == [[1, 101], [8, 108]]


def test_the_bars_of_layers_add_up_to_all_of_them():
    layers = [LayerMedian(f"l{number}", "Conv", number + 1.0) for number in range(30)]
    (axes,) = plots.layer_bars(layers, RED, count=10).axes
    lengths = [bar.get_width() for bar in axes.patches]
    assert lengths[:10] == [30.0 - place for place in range(10)]
    assert sum(lengths) == sum(range(1, 31))


def test_the_roof_is_memory_then_arithmetic():
    (axes,) = plots.roofs([("", 8e9, 2e9)], {"a": [(1.0, 1e9, 1), (16.0, 4e9, 8)]}, {"a": RED}).axes
    xs, ys = axes.lines[0].get_data()
    assert ys == pytest.approx(np.where(xs < 4, 2 * xs, 8.0))
    assert axes.lines[1].get_xydata().tolist() == [[1.0, 1.0], [16.0, 4.0]]


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=12))
def test_the_front_is_what_none_beats(pairs):
    points = [SimpleNamespace(p50_ms=ms, accuracy=accuracy) for ms, accuracy in pairs]

    def beats(a, b):
        better = a.p50_ms < b.p50_ms or a.accuracy > b.accuracy
        return a.p50_ms <= b.p50_ms and a.accuracy >= b.accuracy and better

    expected = [point for point in points if not any(beats(other, point) for other in points)]
    front = pareto_front(points)
    assert sorted(map(id, front)) == sorted(map(id, expected))
    assert [point.p50_ms for point in front] == sorted(point.p50_ms for point in front)


def test_colours_stand_out_and_differ():
    def luminance(colour):
        channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return np.dot([0.2126, 0.7152, 0.0722], linear)

    for place in (0, 1):
        paper = luminance(THEME["paper"][place])
        for name, colours in THEME.items():
            dim, bright = sorted((paper, luminance(colours[place])))
            least = {"paper": 1, "grid": 1, "line": 2.5, "ink": 7, "quiet": 4.5}.get(name, 3)
            assert (bright + 0.05) / (dim + 0.05) >= least, (name, place)
    chosen = series_colours(["fused", "fused", None, "s0", "teacher", None])
    assert (chosen[0], chosen[3]) == (THEME["fused"][0], THEME["s0"][0])
    assert len(set(chosen)) == 6


def test_a_long_name_keeps_both_ends():
    assert short("abc") == "abc"
    cut = short("begin" + 80 * "x" + "end")
    assert len(cut) <= 44
    assert cut.startswith("begin")
    assert cut.endswith("end")


@pytest.mark.parametrize(
    ("accuracy", "images", "ends"),
    [
        (50.0, 100, (40.38, 59.62)),  # Wilson's, as tables of it have them
        (100.0, 10, (72.25, 100.0)),
        (0.0, 10, (0.0, 27.75)),
        (93.0, None, (93.0, 93.0)),
    ],
)
def test_an_accuracy_has_the_interval_of_its_images(accuracy, images, ends):
    result = SimpleNamespace(accuracy=accuracy, accuracy_images=images)
    assert accuracy_interval(result) == pytest.approx(ends, abs=0.01)


def test_a_page_begins_with_s_and_a_beside_the_best_s0_that_ran_alike():
    def result(model, part, p50_ms, accuracy, batch=1):
        run = {"backend": "onnxruntime", "device": "cpu", "batch": batch, "threads": 1}
        return SimpleNamespace(model=model, part=part, p50_ms=p50_ms, accuracy=accuracy, **run)

    s0, better, other_batch = (
        result("S0", "s0", 2.0, 90.0),
        result("S0, DKD", "s0", 4.0, 91.0),
        result("S0", "s0", 9.0, 99.0, 8),
    )
    ours = result("S + A", "fused", 3.0, 92.5)
    (sentence,) = verdict_sentences([s0, better, other_batch, ours])
    assert sentence == "S + A: 0.75 of the median latency of S0, DKD, +1.50 points of accuracy (onnxruntime, batch 1)."
    assert list(verdict_sentences([ours, other_batch])) == []
