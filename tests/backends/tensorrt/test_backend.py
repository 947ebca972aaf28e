"""The TensorRT backend on a simulated device: order of calls, graphs, memory, refusals."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from onnx import TensorProto

from rkd_deploy.backends import RunOn, available, infer_many, load_backend
from rkd_deploy.backends.tensorrt import TensorRtBackend
from rkd_deploy.backends.tensorrt.settings import EngineSettings, Profile, load_library
from rkd_deploy.bench.reading import read_bench
from rkd_deploy.bench.records import record_bench
from rkd_deploy.errors import BackendError, MissingDependencyError, UsageError
from rkd_deploy.report.writing import bench_markdown
from tests.support.benching import bench_settings
from tests.support.engine_backends import FLAVOURS, calls


def test_a_new_shape_runs_once_and_is_captured_then_one_launch_is_a_run(gpu, flavour, model, zoo):
    with load_backend(flavour, model) as backend:
        calls(gpu.device)
        backend.infer(zoo.pixels(3))
        assert calls(gpu.device) == [
            "set_input_shape",
            *["Malloc", "HostAlloc"] * 2,
            *["set_tensor_address"] * 2,
            *["MemcpyAsync", "execute_async_v3", "MemcpyAsync", "StreamSynchronize"],
            *["StreamBeginCapture", "MemcpyAsync", "execute_async_v3", "MemcpyAsync", "StreamEndCapture"],
            *["GraphInstantiate", "GraphDestroy"],
            *["GraphLaunch", "StreamSynchronize"],
        ]
        backend.infer(zoo.pixels(3, seed=5))
        assert calls(gpu.device) == ["GraphLaunch", "StreamSynchronize"]
        assert backend.info.cuda_graph


def test_another_shape_is_captured_anew_and_the_old_memory_goes_back(gpu, flavour, model, zoo):
    with load_backend(flavour, model) as backend:
        backend.infer(zoo.pixels(3))
        taken = len(gpu.device.memory)
        calls(gpu.device)
        for batch in (5, 3):
            x = zoo.pixels(batch, seed=batch)
            np.testing.assert_array_equal(backend.infer(x), zoo.answer(x))
            log = calls(gpu.device)
            assert log[:6] == ["StreamSynchronize", "GraphExecDestroy", *["Free", "FreeHost"] * 2]
            assert log.count("StreamBeginCapture") == 1
            assert len(gpu.device.memory) == taken


def test_without_a_graph_every_run_is_enqueued(gpu, flavour, model, zoo):
    with FLAVOURS[flavour](model, RunOn(flavour, cuda_graph=False)) as backend:
        backend.infer(zoo.pixels(1))
        calls(gpu.device)
        x = zoo.pixels(1, seed=1)
        np.testing.assert_array_equal(backend.infer(x), zoo.answer(x))
        assert calls(gpu.device) == ["MemcpyAsync", "execute_async_v3", "MemcpyAsync", "StreamSynchronize"]
        assert not backend.info.cuda_graph


def test_rtx_captures_only_what_it_says_can_be(gpu, model, zoo):
    gpu.device.failing.add("is_stream_capturable")
    with load_backend("tensorrt-rtx", model) as backend:
        x = zoo.pixels(2)
        np.testing.assert_array_equal(backend.infer(x), zoo.answer(x))
        assert not backend.info.cuda_graph


def test_a_prepared_run_copies_once_and_lives_beside_other_shapes(gpu, flavour, model, zoo):
    with load_backend(flavour, model) as backend:
        x = zoo.pixels(2)
        run = backend.prepare(x)
        prepared = backend._runs[-1]
        x[...] = 0
        backend.infer(zoo.pixels(4))
        calls(gpu.device)
        run()
        backend.synchronize()
        assert calls(gpu.device) == ["GraphLaunch", "StreamSynchronize"]
        prepared._buffers["logits"].download(backend._stream)
        backend.synchronize()
        np.testing.assert_array_equal(prepared.output_host("logits"), zoo.answer(zoo.pixels(2)))


def test_logits_are_found_by_name(gpu, zoo, tmp_path):
    x = zoo.pixels(2)
    with load_backend("tensorrt", zoo.build(tmp_path / "m.onnx", extra=True)) as backend:
        assert backend.info.outputs == ("logits", "sums")
        np.testing.assert_array_equal(backend.infer(x), zoo.answer(x))


def test_threads_take_turns(gpu, model, zoo):
    with load_backend("tensorrt", model) as backend, ThreadPoolExecutor(4) as pool:
        inputs = [zoo.pixels(1 + seed % 3, seed=seed) for seed in range(40)]
        for x, answer in zip(inputs, pool.map(backend.infer, inputs), strict=True):
            np.testing.assert_array_equal(answer, zoo.answer(x))


def test_profiles_are_chosen_by_the_batch_and_only_changed_when_it_must_be(gpu, flavour, model, zoo):
    settings = EngineSettings(profiles=(Profile(1, 1, 1), Profile(2, 8, 8)))
    with FLAVOURS[flavour](model, settings=settings) as backend:
        assert backend.info.max_batch == 8
        gpu.device.log.clear()
        for batch in (1, 4, 8, 1):
            x = zoo.pixels(batch)
            np.testing.assert_array_equal(backend.infer(x), zoo.answer(x))
        changes = [entry for entry in gpu.device.log if entry[0] == "set_optimization_profile_async"]
        assert changes == [("set_optimization_profile_async", 1), ("set_optimization_profile_async", 0)]
        with pytest.raises(UsageError, match=r"batch of 9.*1:1:1, 2:8:8.*--profile"):
            backend.infer(zoo.pixels(9))
        np.testing.assert_array_equal(backend.infer(zoo.pixels(2)), zoo.answer(zoo.pixels(2)))


def test_many_inputs_run_in_chunks_that_the_engine_takes(gpu, zoo, model, tmp_path):
    x = zoo.pixels(70)
    with load_backend("tensorrt", model) as backend:
        assert backend.info.input_shape == (None, 4, 4, 3)
        np.testing.assert_array_equal(infer_many(backend, x), zoo.answer(x))
    for settings, file in (
        (EngineSettings(profiles=(Profile(8, 8, 8),)), model),
        (EngineSettings(), zoo.build(tmp_path / "static.onnx", batch=8)),
    ):
        with TensorRtBackend(file, settings=settings) as backend:
            assert backend.info.input_shape[0] == 8
            np.testing.assert_array_equal(infer_many(backend, x), zoo.answer(x))


def test_a_bench_without_cuda_graphs_launches_none_and_says_so(gpu, flavour, model, tmp_path):
    settings = {"min_seconds": 0.0, "min_runs": 3, "warmup_seconds": 0.0, "transfers": None, "batches": [2]}
    for cuda_graph in (True, False):
        gpu.device.log.clear()
        done = record_bench(
            [model], bench_settings(**{**settings, "backend": flavour, "cuda_graph": cuda_graph}), tmp_path / "out"
        )
        assert ("GraphLaunch" in calls(gpu.device)) == cuda_graph
        assert done.results[0].cuda_graph is cuda_graph
        record = json.loads(done.path.read_text())
        assert (record["results"][0]["cuda_graph"], record["settings"]["cuda_graph"]) == (cuda_graph, cuda_graph)
        assert ("| off |" in bench_markdown(read_bench(done.path))) != cuda_graph


def test_errors_on_the_way_give_everything_back(gpu, flavour, model, zoo):
    """The fixture checks that memory, streams and graphs are back; here every step fails once."""
    for step in ("create_execution_context", "cudaStreamCreateWithFlags"):
        gpu.device.failing = {step}
        with pytest.raises(BackendError):
            load_backend(flavour, model)
    gpu.device.failing = set()
    backend = load_backend(flavour, model)
    for step in ("cudaHostAlloc", "execute_async_v3", "cudaMemcpyAsync", "cudaStreamBeginCapture"):
        gpu.device.failing = {step}
        for use in (backend.infer, backend.prepare):
            with pytest.raises(BackendError):
                use(zoo.pixels(2))
    gpu.device.failing = set()
    np.testing.assert_array_equal(backend.infer(zoo.pixels(2)), zoo.answer(zoo.pixels(2)))
    backend.close()


def test_a_capture_that_breaks_off_leaves_the_stream_usable(gpu, model, zoo, monkeypatch):
    with load_backend("tensorrt", model) as backend:
        context, calls = backend._runs[0]._context, []
        execute = context.execute_async_v3
        monkeypatch.setattr(context, "execute_async_v3", lambda s: (calls.append(s), len(calls) != 2 and execute(s))[1])
        with pytest.raises(BackendError, match="failed to run the model"):
            backend.infer(zoo.pixels(2))  # the second call is the captured one
        assert gpu.device.capturing is None
        np.testing.assert_array_equal(backend.infer(zoo.pixels(2)), zoo.answer(zoo.pixels(2)))


def test_out_of_device_memory_says_how_much_was_asked_for(gpu, model, zoo):
    with load_backend("tensorrt", model) as backend:
        gpu.device.free_bytes = 100
        with pytest.raises(BackendError, match=r"cudaMalloc failed.*192 bytes were asked for.*smaller batch"):
            backend.infer(zoo.pixels(4))
        x = zoo.pixels(2)
        np.testing.assert_array_equal(backend.infer(x), zoo.answer(x))


@pytest.mark.parametrize(
    ("options", "error", "rule"),
    [
        ({"device": "cpu"}, BackendError, "'cpu' was asked for"),
        ({"device": "cuda:1"}, BackendError, "CUDA device 1 cannot be used here: there are 1"),
        ({"device": "gpu"}, UsageError, "cpu, cuda, cuda:N"),
        ({"threads": 0}, UsageError, "between 1 and 4096"),
        ({"threads": 2}, UsageError, "no effect"),
    ],
)
def test_refuses_other_devices_and_threads(gpu, flavour, model, options, error, rule):
    with pytest.raises(error, match=rule):
        load_backend(flavour, model, **options)


def test_outputs_that_numpy_has_no_type_for_are_refused(gpu, zoo, tmp_path):
    file = zoo.build(tmp_path / "m.onnx", result=TensorProto.BFLOAT16)
    with pytest.raises(BackendError, match="bf16, which NumPy has not"):
        load_backend("tensorrt", file)


def test_the_list_of_backends_tells_library_device_and_bindings_apart(gpu, flavour, model, monkeypatch):
    def found():
        return next(status for status in available() if status.name == flavour)

    assert found().ok
    assert found().devices == ("cuda",)
    gpu.device.count = 0
    assert not found().ok
    assert "finds no GPU to run on: CUDA: cudaGetDeviceCount failed" in found().reason
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    assert "pip install cuda-bindings" in found().reason
    with pytest.raises(MissingDependencyError, match="cuda-bindings"):
        load_backend(flavour, model)
    monkeypatch.setitem(sys.modules, flavour.replace("-", "_"), None)
    load_library.cache_clear()
    assert f"pip install 'rkd-deploy[{flavour}]'" in found().reason
