"""The roofline by its closed form, ceilings against NumPy, predictions beside measurements."""

from __future__ import annotations

import io
import time
from dataclasses import replace

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

from rkd_deploy.backends import RunOn
from rkd_deploy.bench import bench
from rkd_deploy.bench.ceilings import LARGEST, SMALLEST, Ceilings, footprint, measure_ceilings
from rkd_deploy.bench.graph_cost import GraphCost
from rkd_deploy.bench.roofline import Analysis, LatencyBound, _bounded, achieved, bound, predict_roofline
from rkd_deploy.errors import BackendError
from rkd_deploy.report.columns import print_roofline
from tests.support.benching import bench_settings


@pytest.fixture(scope="module")
def convolution(zoo, tmp_path_factory):
    """64 -> 64 channels, 3x3, on 56x56: enough to do that a call is nothing but arithmetic."""
    weight = np.random.default_rng(0).standard_normal((64, 64, 3, 3), np.float32)
    shape = ["batch", 64, 56, 56]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y")]
    node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], [numpy_helper.from_array(weight, "w")])
    file = tmp_path_factory.mktemp("roofline") / "conv.onnx"
    zoo.save(file, graph)
    return file


@pytest.fixture(scope="module")
def predicted(convolution):
    return predict_roofline([convolution], RunOn(threads=1), batches=(1, 2))


def test_the_bound_is_the_larger_of_two_times():
    assert bound(2_000_000, 1_000, 1e9, 1e9) == (2.0, "compute")
    assert bound(1_000, 5_000_000, 1e9, 1e9) == (5.0, "memory")
    # At the ridge, where pi W^-1 = beta Q^-1, both say the same.
    assert bound(8_000, 1_000, 8e9, 1e9)[0] == pytest.approx(1e-3)


def test_a_copy_is_the_next_power_of_two_within_limits():
    assert [footprint(size) for size in (0, SMALLEST, SMALLEST + 1, 3 << 23, 1 << 40)] == [
        SMALLEST,
        SMALLEST,
        2 * SMALLEST,
        1 << 25,
        LARGEST,
    ]


def test_ceilings_are_of_the_size_of_numpys_own(predicted):
    (measured,) = predicted.ceilings
    a = np.random.default_rng(0).standard_normal((1024, 1024), np.float32)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    rate = 1024**3 / min(times)
    assert rate / 20 < measured.macs_per_s < 20 * rate
    assert measured.macs_per_s == max(measured.kernels.values())
    assert all(1e8 < speed < 1e13 for speed in measured.bytes_per_s.values())


def test_a_prediction_says_what_has_to_be_done(predicted):
    single, two = predicted.predictions
    assert single.macs == 64 * 64 * 9 * 56 * 56
    assert two.macs == 2 * single.macs
    assert single.least_bytes == 4 * (64 * 64 * 9 + 2 * 64 * 56 * 56)
    assert single.bound_ms == pytest.approx(1000 * single.macs / single.macs_per_s)
    assert single.limit == "compute"


def test_a_measurement_is_a_share_of_its_bound(predicted, convolution):
    results = bench(
        [convolution], bench_settings(batches=(1, 2), threads=1, min_seconds=0.05, min_runs=5, warmup_seconds=0)
    )
    pairs = achieved(predicted.predictions, results)
    for pair, result in zip(pairs, results, strict=True):
        assert pair.p50_ms == result.p50_ms
        assert pair.share == pytest.approx(pair.prediction.bound_ms / result.p50_ms)
        assert 0.01 < pair.share < 2  # of a plain convolution; above 1 only by noise
    stream = io.StringIO()
    print_roofline(predicted.predictions, results, Console(file=stream, width=200))
    assert "Bound / p50" in stream.getvalue().replace("\n", " ")
    assert achieved(predicted.predictions, [])[0].share is None


def test_what_is_no_onnx_file_gets_no_bound_and_a_reason(tmp_path):
    (tmp_path / "model.plan").write_bytes(b"ftrt an engine")
    (prediction,) = predict_roofline([tmp_path / "model.plan"], RunOn("tensorrt"), batches=(1,)).predictions
    assert prediction.bound_ms is None
    assert "no ONNX file" in prediction.note


def test_a_backend_without_onnx_files_gets_the_counts_alone(convolution):
    (prediction,) = predict_roofline([convolution], RunOn("pytorch"), batches=(1,)).predictions
    assert prediction.macs > 0
    assert prediction.bound_ms is None
    assert "of pytorch" in prediction.note


def test_a_backend_that_cannot_run_is_an_error_with_its_reason():
    with pytest.raises(BackendError, match=r"ceilings of openvino.*runs on device='cpu' only"):
        measure_ceilings(RunOn("openvino", device="cuda"), footprints=[SMALLEST])


def test_the_same_name_on_another_file_is_not_taken_for_it():
    prediction = LatencyBound(model="m", file_bytes=1, backend="b", device="cpu", threads=None, batch=1, bound_ms=1.0)

    class Found:
        model, file_bytes, backend, device, threads, batch, p50_ms = "m", 2, "b", "cpu", None, 1, 4.0

    assert achieved([prediction], [Found()])[0].p50_ms is None
    Found.file_bytes = 1
    assert achieved([prediction], [Found()])[0].share == 0.25
    Found.file_bytes, Found.backend = 2, "tensorrt"  # of an engine, whose size is another one than its ONNX file's
    assert achieved([replace(prediction, backend="tensorrt")], [Found()])[0].share == 0.25


def ceilings(arithmetic, macs_per_s, bytes_per_s=1e12):
    return Ceilings("b", "cpu", 1, arithmetic, macs_per_s, {}, {SMALLEST: bytes_per_s})


def test_a_graph_of_several_precisions_takes_the_time_of_each():
    cost = GraphCost({"int8": 8_000_000, "float32": 1_000_000}, 100, 100, 100, 1000, ())
    peaks = {"int8": ceilings("int8", 4e9), "float32": ceilings("float32", 1e9)}
    bounds = _bounded(cost, peaks, "onnxruntime")
    assert bounds["bound_ms"] == pytest.approx(2 + 1)
    assert bounds["macs_per_s"] == pytest.approx(3e9)  # 9 million in 3 ms
    assert (bounds["arithmetic"], bounds["limit"], bounds["note"]) == ("int8 89 %, float32 11 %", "compute", None)


def test_a_precision_without_a_ceiling_of_its_own_is_bounded_by_float32s_and_says_so():
    cost = GraphCost({"bfloat16": 2_000_000}, 100, 100, 100, 1000, ())
    bounds = _bounded(cost, {"float32": ceilings("float32", 1e9)}, "onnxruntime")
    assert bounds["bound_ms"] == pytest.approx(2)
    assert "bfloat16 is bounded by the peak of float32, which it may exceed" in bounds["note"]


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_int8_has_a_ceiling_of_its_own(backend):
    measured = measure_ceilings(RunOn(backend, threads=1), arithmetic="int8", footprints=[SMALLEST])
    assert measured.arithmetic == "int8"
    assert all(1e8 < rate < 1e15 for rate in measured.kernels.values())


def test_a_study_covers_every_setting_and_each_once(convolution, monkeypatch):
    places = []

    def measured(run_on, *, arithmetic, footprints):
        backend, threads = run_on.backend, run_on.threads
        places.append((backend, threads, arithmetic))
        return Ceilings(backend, "cpu", threads, arithmetic, 1e9 * threads, {}, dict.fromkeys(footprints, 1e9))

    monkeypatch.setattr("rkd_deploy.bench.roofline.measure_ceilings", measured)
    settings = [
        RunOn(backend, threads=threads, streams=streams)
        for backend in ("onnxruntime", "openvino")
        for threads in (1, 2)
        for streams in (1, 2)
    ]
    reports = []
    analysis = Analysis([convolution], settings, [1, 4], names=["mine"])
    analysis.predict(lambda name, share: reports.append(share))
    assert places == [(backend, threads, "float32") for backend in ("onnxruntime", "openvino") for threads in (1, 2)]
    assert reports == [0, 0.25, 0.5, 0.75]
    predictions = analysis.roofline.predictions
    assert [(prediction.backend, prediction.threads, prediction.batch) for prediction in predictions] == [
        (b, t, n) for b, t, _ in places for n in (1, 4)
    ]
    assert {prediction.model for prediction in predictions} == {"mine"}
    assert predictions[2].bound_ms == predictions[0].bound_ms / 2  # with two threads
    analysis.profile()
    assert [(prediction.backend, prediction.threads, prediction.batch) for prediction in analysis.layers] == [
        (b, t, 1) for b, t, _ in places
    ]
    assert all(prediction.layers for prediction in analysis.layers)
