"""Engines on a simulated device: built once and kept, refused where they do not fit, described for others."""

import json

import numpy as np
import pytest

from rkd_deploy.backends import load_backend
from rkd_deploy.backends.tensorrt.cache import export_engine
from rkd_deploy.backends.tensorrt.record import read_engine
from rkd_deploy.backends.tensorrt.settings import EngineSettings, Profile, check_gpu, load_library
from rkd_deploy.bench import bench
from rkd_deploy.errors import BackendError, ModelFileError, UsageError
from tests.support.benching import bench_settings
from tests.support.engine_backends import FLAVOURS, calls


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


def test_a_build_that_fails_gives_the_librarys_own_words_and_keeps_nothing(gpu, flavour, model, tmp_path):
    gpu.device.failing.add("build")
    with pytest.raises(BackendError, match=r"could not build .*model\.onnx: Out of memory"):
        load_backend(flavour, model)
    assert not list((tmp_path / "cache").rglob("*engine*/*"))


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
