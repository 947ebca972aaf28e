"""The TensorRT backend on a simulated device: order of calls, graphs, memory, refusals."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from onnx import TensorProto

from rkd_deploy.backends import RunOn, available, infer_many, load_backend
from rkd_deploy.backends.tensorrt import TensorRtBackend, TensorRtRtxBackend
from rkd_deploy.backends.tensorrt.cache import export_engine
from rkd_deploy.backends.tensorrt.record import read_engine
from rkd_deploy.backends.tensorrt.settings import EngineSettings, Profile, check_gpu, load_library
from rkd_deploy.bench import bench
from rkd_deploy.bench.reading import read_bench
from rkd_deploy.bench.records import record_bench
from rkd_deploy.errors import BackendError, MissingDependencyError, ModelFileError, UsageError
from rkd_deploy.report.writing import bench_markdown
from tests.support.benching import bench_settings

FLAVOURS = {"tensorrt": TensorRtBackend, "tensorrt-rtx": TensorRtRtxBackend}


@pytest.fixture(params=list(FLAVOURS))
def flavour(request, gpu):
    return request.param


@pytest.fixture
def model(zoo, tmp_path):
    return zoo.build(tmp_path / "model.onnx", card=zoo.card())


def calls(device):
    """What was asked of the device since the last time, the current device aside."""
    log = [entry[0] if isinstance(entry, tuple) else entry for entry in device.log if entry != "SetDevice"]
    device.log.clear()
    return log


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


def test_an_engine_is_built_once_and_kept_by_file_gpu_version_and_settings(gpu, flavour, model, zoo):
    def built(**options):
        with FLAVOURS[flavour](model, **options) as backend:
            np.testing.assert_array_equal(backend.infer(zoo.pixels(2)), zoo.answer(zoo.pixels(2)))
            assert (backend.info.build_seconds is not None) == any(entry[0] == "build" for entry in gpu.device.log)
            gpu.device.log.clear()
            return backend.info.build_seconds is not None

    assert built()
    assert not built()
    assert built(settings=EngineSettings(profiles=(Profile(1, 2, 4),)))
    gpu.device.name = "Another GPU"
    assert built()
    gpu.install("11.5.0", "1.8.0")
    assert built()
    assert not built()
    zoo.build(model, bias=(0.0, 0.0, 0.0), card=zoo.card(name="another"))
    assert built()


def test_a_damaged_engine_in_the_cache_is_built_again(gpu, model, tmp_path, zoo):
    load_backend("tensorrt", model).close()
    (engine,) = (tmp_path / "cache/engines").glob("*/model.engine")
    engine.write_bytes(engine.read_bytes()[:-1])
    with load_backend("tensorrt", model) as backend:
        assert backend.info.build_seconds is not None
        np.testing.assert_array_equal(backend.infer(zoo.pixels(1)), zoo.answer(zoo.pixels(1)))


def test_bench_says_how_long_the_build_took_once(gpu, model):
    settings = {"backend": "tensorrt", "batches": (1, 8), "min_seconds": 0.0, "min_runs": 3, "warmup_seconds": 0.0}
    first, second = bench([model], bench_settings(**settings)), bench([model], bench_settings(**settings))
    assert [result.device for result in first] == ["cuda:0", "cuda:0"]
    assert all(result.build_seconds > 0 for result in first)
    assert [result.build_seconds for result in second] == [None, None]


def test_an_engine_is_built_for_the_batches_that_are_asked_for(gpu, flavour, model, zoo, tmp_path):
    reports = []

    def run(batches, reports=None):
        settings = {"min_seconds": 0.0, "min_runs": 3, "warmup_seconds": 0.0}
        progress = None if reports is None else lambda *step: reports.append(step)
        results = bench([model], bench_settings(backend=flavour, batches=batches, **settings), progress=progress)
        engine = tmp_path / "cache/engines" / results[0].engine_kept / "model.engine"
        return results[0].build_seconds is not None, read_engine(engine)[1].profiles

    assert run([64, 48, 50, 40], reports) == (True, ("40:50:64",))
    building = f"building the engine of {tmp_path.name}: Building engine"
    assert [step for step in reports if "building" in step[0]] == [(building, share) for share in (0.0, 0.5, 1.0, 1.0)]
    assert run([1, 2]) == (True, ("1:2:2",))
    assert run([64, 50, 48, 40]) == (False, ("40:50:64",))  # the order does not matter
    assert run(None) == (True, ("1:8:32",))
    assert run([1, 8, 32]) == (False, ("1:8:32",))
    gpu.device.log.clear()
    static = zoo.build(tmp_path / "static.onnx", batch=8)
    for batches in ([8], None, [8, 8]):
        load_backend(flavour, static, batches=batches).close()
    assert [entry[0] for entry in gpu.device.log].count("build") == 1  # whose profiles say nothing


def test_a_bundles_engine_that_does_not_take_a_batch_is_refused_before_anything_is_measured(gpu, flavour, model):
    export_engine(model, flavour)
    with pytest.raises(UsageError, match=r"batch of 64.*1:8:32.*name its ONNX file"):
        bench(
            [model.parent],
            bench_settings(backend=flavour, batches=[1, 64], min_seconds=0.0, min_runs=1, warmup_seconds=0.0),
        )
    assert "execute_async_v3" not in calls(gpu.device)


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


def test_a_bundle_with_an_engine_runs_that_one(gpu, flavour, model, zoo):
    exported = export_engine(model, flavour)
    with load_backend(flavour, model.parent) as backend:
        assert backend.info.file == exported.file
        assert backend.info.build_seconds is None
        assert backend.precision == "fp32"
        assert "rkd_deploy.card" in backend.info.metadata
        np.testing.assert_array_equal(backend.infer(zoo.pixels(2)), zoo.answer(zoo.pixels(2)))
    zoo.build(model, bias=(1.0, 0.0, 0.0))
    with pytest.raises(ModelFileError, match=r"another model than the model\.onnx beside it"):
        load_backend(flavour, model.parent)


def test_a_foreign_engine_without_a_record_runs_where_the_library_takes_it(gpu, flavour, model, zoo, tmp_path):
    plan = tmp_path / "by_hand.plan"
    plan.write_bytes(export_engine(model, flavour).file.read_bytes())
    with load_backend(flavour, plan) as backend:
        assert (backend.precision, dict(backend.info.metadata)) == ("unknown", {})
        np.testing.assert_array_equal(backend.infer(zoo.pixels(2)), zoo.answer(zoo.pixels(2)))
    gpu.device.name = "Another GPU"
    with pytest.raises((BackendError, ModelFileError), match=r"Another GPU \(12\.0\)"):
        load_backend(flavour, plan)
    plan.write_bytes(b"no engine")
    gpu.device.failing.add("validity")
    if flavour == "tensorrt":
        with pytest.raises(ModelFileError, match="Magic tag does not match"):
            load_backend(flavour, plan)


def test_an_engine_of_another_gpu_version_or_library_is_refused_with_both_named(gpu, model):
    engine = export_engine(model, "tensorrt").file
    with pytest.raises(BackendError, match="is tensorrt's and cannot run on tensorrt-rtx"):
        load_backend("tensorrt-rtx", engine)
    gpu.device.name = "Another GPU"
    with pytest.raises(BackendError, match=r"built for Simulated GPU \(12\.0\); here is Another GPU \(12\.0\)"):
        load_backend("tensorrt", engine)
    gpu.device.name = "Simulated GPU"
    gpu.install("11.5.0")
    with pytest.raises(BackendError, match=r"built by tensorrt 11\.4\.0; 11\.5\.0 is installed"):
        load_backend("tensorrt", engine)


@pytest.mark.parametrize(
    ("hardware", "capability", "runs"),
    [
        ("ampere+", (8, 0), True),
        ("ampere+", (7, 5), False),
        ("same-capability", (12, 0), True),
        ("same-capability", (8, 6), False),
        ("none", (12, 0), False),
    ],
)
def test_hardware_compatibility_says_where_else_it_runs(gpu, model, hardware, capability, runs):
    record = export_engine(model, "tensorrt", EngineSettings(hardware=hardware)).record
    library, name = load_library("tensorrt"), ".".join(map(str, capability))
    if runs:
        record.check_fits(library, "Another GPU", name)
    else:
        with pytest.raises(BackendError, match="Another GPU"):
            record.check_fits(library, "Another GPU", name)


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


def test_a_build_that_fails_gives_the_librarys_own_words_and_keeps_nothing(gpu, flavour, model, tmp_path):
    gpu.device.failing.add("build")
    with pytest.raises(BackendError, match=r"could not build .*model\.onnx: Out of memory"):
        load_backend(flavour, model)
    assert not list((tmp_path / "cache").rglob("*engine*/*"))


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


def test_the_record_beside_the_engine_is_json_for_others(gpu, model):
    exported = export_engine(model, "tensorrt", EngineSettings(version_compatible=True))
    written = json.loads(exported.file.with_name("model.tensorrt.engine.json").read_text())
    assert written["device"] == "Simulated GPU"
    assert written["compute_capability"] == "12.0"
    assert written["driver"] == 13020
    assert written["layers_of"] == "engine"
    assert written["layers"][0]["name"].startswith("fused Cast+ReduceSum")
    gpu.install("11.5.0")
    exported.record.check_fits(load_library("tensorrt"), "Simulated GPU", "12.0")


@pytest.mark.parametrize(
    ("capability", "runs"),
    [
        ((8, 0), True),
        ((8, 6), True),
        ((8, 7), False),
        ((9, 0), False),
        ((10, 0), False),
        ((12, 1), True),
        ((13, 0), True),
    ],
)
def test_rtx_refuses_a_gpu_that_it_does_not_name_before_it_builds(gpu, bundle, capability, runs):
    """Known answer of an H100: TensorRT-RTX 1.7.1 runs on 8.0, 8.6, 8.9, 12.0, 12.1 and newer, and refuses 9.0."""
    gpu.device.capability = capability
    if runs:
        load_backend("tensorrt-rtx", bundle).close()
        return
    name = ".".join(map(str, capability))
    with pytest.raises(
        BackendError, match=rf"compute capability {name}: it runs on 8.0, 8.6, 8.9, 12.0, 12.1 and newer"
    ):
        load_backend("tensorrt-rtx", bundle)
    assert not any(isinstance(entry, tuple) and entry[0] == "build" for entry in gpu.device.log)
    load_backend("tensorrt", bundle).close()  # the whole TensorRT has kernels for it


def test_the_real_rtx_refuses_an_h100():
    pytest.importorskip("tensorrt_rtx")
    load_library.cache_clear()
    library = load_library("tensorrt-rtx")
    for capability in ("8.0", "8.6", "8.9", "12.0", "12.1", "13.0"):
        check_gpu(library, "a GPU", capability)
    with pytest.raises(BackendError, match=r"H100, compute capability 9\.0: it runs on .*, 12\.0, 12\.1 and newer"):
        check_gpu(library, "NVIDIA H100", "9.0")
