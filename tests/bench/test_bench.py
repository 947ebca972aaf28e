import numpy as np
import pytest
from onnx import TensorProto, helper

from rkd_deploy.backends import load_backend
from rkd_deploy.bench import BenchSettings, bench, random_input
from rkd_deploy.card import Preprocess
from rkd_deploy.errors import ModelFileError, UsageError
from tests.support.benching import bench_settings

SHORT = {"min_seconds": 0.01, "min_runs": 5, "warmup_seconds": 0.0}


def test_models_with_and_without_a_card(bundle, zoo, tmp_path):
    bare = zoo.build(tmp_path / "bare.onnx", dtype=TensorProto.FLOAT)
    reports = []
    results = bench(
        [bundle, bare], bench_settings(batches=(1, 3), threads=1, **SHORT), progress=lambda *item: reports.append(item)
    )
    assert [(result.model, result.batch) for result in results] == [("sums", 1), ("bare", 1), ("sums", 3), ("bare", 3)]
    known, unknown = results[:2]
    assert (known.accuracy, known.parameters, known.macs, known.part) == (71.5, 4, 48, "fused")
    assert (known.backend, known.device, known.threads, known.precision) == ("onnxruntime", "cpu", 1, "fp32")
    assert known.file_bytes == (bundle / "model.onnx").stat().st_size
    assert known.runs == len(known.samples_ms) >= 5
    assert (unknown.accuracy, unknown.parameters, unknown.macs, unknown.precision) == (None, None, None, "unknown")
    assert {name for name, _ in reports} == {"1 sums", "2 bare"}


def test_one_model_twice_and_on_pytorch_without_transfers(bundle):
    results = bench([bundle, bundle], bench_settings(backend="pytorch", batches=(2,), transfers=False, **SHORT))
    assert [(result.model, result.backend, result.transfers) for result in results] == [("sums", "pytorch", False)] * 2


@pytest.mark.parametrize("dtype", [TensorProto.UINT8, TensorProto.INT8, TensorProto.INT32, TensorProto.FLOAT16])
def test_inputs_are_seeded_and_of_the_models_type(zoo, tmp_path, dtype):
    with load_backend("onnxruntime", zoo.build(tmp_path / "m.onnx", dtype=dtype)) as backend:
        x = random_input(backend, None, 5, seed=1)
        assert x.dtype == helper.tensor_dtype_to_np_dtype(dtype)
        assert x.shape == (5, 4, 4, 3)
        assert len(np.unique(x)) > 50
        np.testing.assert_array_equal(x, random_input(backend, None, 5, seed=1))
        assert (x != random_input(backend, None, 5, seed=2)).any()
        backend.infer(x)


def test_a_free_image_size_comes_from_the_card_or_is_an_error(zoo, tmp_path):
    shape = ["n", "h", "w", 3]
    graph = helper.make_graph(
        [helper.make_node("ReduceMax", ["input", "axes"], ["logits"], keepdims=0)],
        "brightest",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor("axes", TensorProto.INT64, [2], [1, 2])],
    )
    zoo.save(tmp_path / "m.onnx", graph)
    with load_backend("onnxruntime", tmp_path / "m.onnx") as backend:
        assert backend.info.input_shape == (None, None, None, 3)
        card = zoo.card(preprocess=Preprocess(height=6, width=5, mean=(0.5,) * 3, std=(0.5,) * 3))
        assert backend.infer(random_input(backend, card, 2, seed=0)).shape == (2, 3)
        with pytest.raises(UsageError, match="no card that says which size"):
            random_input(backend, None, 2, seed=0)


def test_a_fixed_batch_is_measured_at_its_own_size_only(zoo, tmp_path):
    file = zoo.build(tmp_path / "m.onnx", batch=4)
    assert bench([file], bench_settings(batches=[4], **SHORT))[0].batch == 4
    with pytest.raises(UsageError, match="A batch of 1 was asked for, and the model takes 4"):
        bench([file], bench_settings(**SHORT))


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"batches": ()}, "at least one of each"),
        ({"run_on": ()}, "at least one of each"),
        ({"batches": (0,)}, "batches 0 must be a whole number at least 1"),
        ({"batches": (1.5,)}, "batches 1.5 must be a whole number"),
        ({"seed": -1}, "seed -1 must be a whole number at least 0"),
        ({"shape": (3, 0)}, "shape 0 must be a whole number at least 1"),
        ({"min_seconds": float("nan")}, "min_seconds nan must be"),
    ],
)
def test_what_no_bench_can_measure_is_refused(settings, rule):
    with pytest.raises(UsageError, match=rule):
        BenchSettings(**settings)


def test_nothing_to_measure_is_refused():
    with pytest.raises(UsageError, match="0 models"):
        bench([])


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(ModelFileError, match=r"no\.onnx"):
        bench([tmp_path / "no.onnx"], bench_settings(**SHORT))
