"""A bench on disk: what it holds when it ends well, by an error, or by a real signal."""

from __future__ import annotations

import hashlib
import json
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rkd_deploy.backends.tensorrt.record import read_engine
from rkd_deploy.bench import records
from rkd_deploy.bench.reading import read_bench
from rkd_deploy.bench.records import record_bench
from rkd_deploy.errors import BackendError, InterruptedBench, ModelFileError, UsageError
from rkd_deploy.report.writing import bench_markdown
from tests.support.benching import bench_settings

SHORT = {"min_seconds": 0.01, "min_runs": 5, "warmup_seconds": 0.0}
FIXED_NAMES = {"backend", "batch", "precision", "p50_ms", "p90_ms", "p99_ms", "throughput_per_s"}


def test_a_record_holds_both_figures_every_sample_and_the_machine(bundle, tmp_path):
    settings = {"batches": [1, 2], "transfers": None, "streams": [1, 2], "threads": [1], **SHORT}
    done = record_bench([bundle], bench_settings(**settings), tmp_path / "out")
    record = json.loads((tmp_path / "out/bench.json").read_text())
    assert record["partial"] is False
    assert [(row["streams"], row["batch"]) for row in record["results"]] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    for row in record["results"]:
        assert row.keys() >= FIXED_NAMES
        for figures in (row, row["device_only"]):
            assert len(figures["samples_ms"]) == figures["runs"] >= 5
            assert figures["p50_ms"] == sorted(figures["samples_ms"])[-(-figures["runs"] // 2) - 1]
            assert figures["p95_ms"] <= figures["p99_ms"] <= figures["p99_9_ms"] <= max(figures["samples_ms"])
        assert (row["transfers"], row["device_only"]["transfers"]) == (True, False)
        assert row["file_sha256"] == hashlib.sha256((bundle / "model.onnx").read_bytes()).hexdigest()
        assert row["load_seconds"] > 0
        assert row["resident_peak_bytes"] > row["resident_growth_bytes"]
        assert row["complete"]
    assert record["conditions"]["before"].keys() == record["conditions"]["after"].keys()
    page = bench_markdown(read_bench(done.path))
    for word in ("p99.9, ms", "CV, %", "end to end", "device only", "Warm-up runs", "Resident peak, MB", "- CPU: "):
        assert word in page


def test_several_backends_and_thread_counts_in_one_call(bundle, zoo, tmp_path):
    bare = zoo.build(tmp_path / "bare.onnx")
    settings = {"backend": ["onnxruntime", "openvino"], "threads": [1, 2], "batches": [3], **SHORT}
    results = record_bench([bundle, bare], bench_settings(**settings), tmp_path / "out").results
    assert [(result.backend, result.threads, result.model) for result in results] == [
        (backend, threads, model)
        for backend in ("onnxruntime", "openvino")
        for threads in (1, 2)
        for model in ("sums", "bare")
    ]
    assert results[0].cuda_graph is None


def test_a_backend_without_threads_is_measured_once_beside_others(bundle, gpu, tmp_path):
    settings = {"backend": ["onnxruntime", "tensorrt"], "threads": [1, 2], "batches": [1], **SHORT}
    results = record_bench([bundle], bench_settings(**settings), tmp_path / "out").results
    assert [(result.backend, result.threads, result.cuda_graph) for result in results] == [
        ("onnxruntime", 1, None),
        ("onnxruntime", 2, None),
        ("tensorrt", None, True),
    ]


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt-rtx"])
def test_an_engine_is_built_once_and_kept_by_file_device_version_and_settings(flavour, zoo, gpu, tmp_path):
    model = zoo.build(tmp_path / "m.onnx", card=zoo.card())
    options = {"backend": flavour, "batches": [2], "transfers": None, **SHORT}

    def run():
        (result,) = record_bench([model], bench_settings(**options), tmp_path / "out").results
        return result

    first = run()
    assert " s, and kept |" in bench_markdown(read_bench(tmp_path / "out/bench.json"))
    again = run()
    assert "| from the cache |" in bench_markdown(read_bench(tmp_path / "out/bench.json"))
    assert first.build_seconds > 0
    assert again.build_seconds is None
    assert first.engine_kept == again.engine_kept
    engine = tmp_path / "cache/engines" / first.engine_kept / "model.engine"
    assert first.file_sha256 == hashlib.sha256(engine.read_bytes()).hexdigest()
    assert first.load_seconds >= 0
    assert read_engine(engine)[1].onnx_sha256 == hashlib.sha256(model.read_bytes()).hexdigest()
    by_name = record_bench([engine], bench_settings(**options), tmp_path / "out").results[
        0
    ]  # an engine as it lies is taken, too
    assert (by_name.model, by_name.build_seconds) == ("sums", None)
    gpu.device.name = "Another GPU"
    assert run().build_seconds > 0
    gpu.install(version="11.5.0", rtx_version="1.8.0")
    assert run().build_seconds > 0
    zoo.build(model, card=zoo.card(), scale=0.5)
    assert run().build_seconds > 0


def test_accuracy_is_that_of_the_measured_file_on_the_measured_backend(bundle, tmp_path):
    colours = {"red": (200, 10, 10), "green": (10, 200, 10), "blue": (10, 10, 200)}
    shown = {"red": ["red", "red", "blue"], "blue": ["blue", "green"]}  # 3 of 5 lie where they belong
    for folder, colour_names in shown.items():
        (tmp_path / "data" / folder / "deeper").mkdir(parents=True)
        for number, name in enumerate(colour_names):
            pixels = np.full((9, 6, 3), colours[name], np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / folder / "deeper" / f"{number}.png")
    (tmp_path / "data/red/notes.txt").write_text("no image")
    settings = {"backend": ["onnxruntime", "openvino"], "batches": [1], "data": tmp_path / "data", **SHORT}
    results = record_bench([bundle], bench_settings(**settings), tmp_path / "out").results
    assert [(result.accuracy, result.accuracy_images, result.accuracy_source) for result in results] == [
        (60.0, 5, "measured")
    ] * 2
    record = (tmp_path / "out/bench.json").read_text()
    assert json.loads(record)["settings"]["data"] == "data"
    assert str(tmp_path) not in record


def test_an_error_leaves_what_was_measured_before(bundle, zoo, tmp_path):
    settings = {"backend": ["onnxruntime", "pytorch"], "batches": [1], **SHORT}
    (tmp_path / "bare.pt2").write_bytes(b"no program")
    done = record_bench([zoo.build(tmp_path / "bare.onnx")], bench_settings(**settings), tmp_path / "out")
    assert isinstance(done.error, ModelFileError)
    assert "no PyTorch archive" in str(done.error)
    assert "marked as partial" in done.error.__notes__[0]
    record = json.loads((tmp_path / "out/bench.json").read_text())
    assert record["partial"] is True
    assert [row["backend"] for row in record["results"]] == ["onnxruntime"]
    with pytest.raises(ModelFileError):
        record_bench(
            [tmp_path / "bare.onnx"], bench_settings(**settings | {"backend": "pytorch"}), tmp_path / "nothing"
        )
    assert not (tmp_path / "nothing").exists()


def test_the_files_of_every_backend_are_looked_for_before_anything_is_measured(zoo, tmp_path):
    """The last backend of a bench failed for lack of its file, after 28 s of the others."""
    bare, engine = zoo.build(tmp_path / "bare.onnx"), tmp_path / "m.engine"
    engine.write_bytes(b"x")
    settings = bench_settings(["onnxruntime", "openvino", "pytorch"], min_seconds=600)
    with pytest.raises(BackendError, match=r"no .*bare\.pt2.*--with-pytorch"):
        record_bench([bare], settings, tmp_path / "out")
    with pytest.raises(UsageError, match=r"m\.engine is an engine.*openvino was asked for"):
        record_bench([bare, engine], bench_settings("openvino", min_seconds=600), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ctrl_c_leaves_what_was_measured_marked_as_partial(zoo, tmp_path, interrupted, cpu_seconds):
    """After 3 s of CPU time it is past its start and in its first long measurement."""
    options = ("--json", "--seconds", 600, "--warmup", 0.1, "--batch", "1,8")
    out, _, record = interrupted(lambda pid: cpu_seconds(pid) > 3, zoo.build(tmp_path / "m.onnx"), *options)
    assert json.loads(out.splitlines()[-1])["exit_code"] == 130
    (row,) = record["results"]  # of batch 1; batch 8 was never begun
    assert row["batch"] == 1
    assert row["complete"] is False
    assert len(row["samples_ms"]) == row["runs"] > 0
    assert row["device_only"]["complete"] is False
    page = (tmp_path / "out/bench.md").read_text()
    assert page.startswith("Partial: ")
    assert "| interrupted |" in page


def test_sigterm_does_what_ctrl_c_does(zoo, tmp_path):
    model, handler = zoo.build(tmp_path / "m.onnx"), signal.getsignal(signal.SIGTERM)

    def stop(name, share):
        if share > 0:  # the first turn is over; Ctrl-C's test sends a real signal, to a process of its own
            signal.getsignal(signal.SIGTERM)(signal.SIGTERM, None)

    done = record_bench(
        [model],
        bench_settings(batches=[1, 8], threads=1, min_seconds=600, min_runs=1, warmup_seconds=0),
        tmp_path / "out",
        stop,
    )
    assert isinstance(done.error, InterruptedBench)
    assert "marked as partial" in str(done.error)
    assert done.error.exit_code == 130
    assert signal.getsignal(signal.SIGTERM) is handler
    record = json.loads((tmp_path / "out/bench.json").read_text())
    (row,) = record["results"]
    assert (record["partial"], row["batch"], row["complete"]) == (True, 1, False)
    assert len(row["samples_ms"]) == row["runs"] > 0


def test_ctrl_c_before_anything_was_measured_writes_nothing(bundle, tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(records, "bench", interrupted)
    with pytest.raises(KeyboardInterrupt) as stop:
        record_bench([bundle], bench_settings(**SHORT), tmp_path / "out")
    assert not isinstance(stop.value, InterruptedBench)
    assert not (tmp_path / "out").exists()


def test_what_was_measured_is_kept_when_the_study_after_it_fails(bundle, tmp_path):
    def analyse(results):
        assert [result.batch for result in results] == [1, 2]
        raise BackendError("no profile")

    done = record_bench(
        [bundle],
        bench_settings(batches=[1, 2], threads=1, min_seconds=0, min_runs=3, warmup_seconds=0),
        tmp_path / "out",
        analyse=analyse,
    )
    assert isinstance(done.error, BackendError)
    record = json.loads((tmp_path / "out/bench.json").read_text())
    assert (record["partial"], len(record["results"])) == (True, 2)


def test_the_settings_of_a_record_are_what_was_asked_for():
    """What the command wrote before places to run were values of their own; old records and new ones read alike."""
    settings = bench_settings(["onnxruntime", "tensorrt"], [1, 2], [1, 4], batches=None, data=Path("far/away"), **SHORT)
    assert json.dumps(settings.to_record()) == (
        '{"backend": ["onnxruntime", "tensorrt"], "device": null, "batches": null, "threads": [1, 2], '
        '"streams": [1, 4], "memory_limit": null, "cuda_graph": true, "shape": null, "min_seconds": 0.01, '
        '"min_runs": 5, "warmup_seconds": 0.0, "transfers": true, "data": "away"}'
    )
