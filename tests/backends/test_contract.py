"""One contract for every backend: the zoo's answers are exact, misuse is refused."""

import json
import re

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper

from rkd_deploy.backends import available, load_backend
from rkd_deploy.backends.onnxrt import has_tensorrt
from rkd_deploy.backends.protocol import infer_all_many
from rkd_deploy.backends.pytorch import PyTorchBackend
from rkd_deploy.bench import bench
from rkd_deploy.bench.reading import read_bench
from rkd_deploy.bench.records import record_bench
from rkd_deploy.errors import BackendError, UsageError
from rkd_deploy.report.writing import bench_markdown
from tests.support.benching import bench_settings

WITH_CUDA = [status.name for status in available() if status.ok and "cuda" in status.devices]
SIMULATED = {
    "tensorrt": "gpu",
    "tensorrt-rtx": "gpu",
    "pytorch:cuda-graphs": "graphs",
    "onnxruntime:cuda-graphs": "ort_gpu",
}
"""What runs on a CUDA device only, and the fixture that simulates one for it."""
ON_CUDA = [*SIMULATED, "onnxruntime", "onnxruntime:tensorrt", "pytorch", "pytorch:compile"]


def on_a_gpu(name):
    absent = pytest.mark.skipif(name.split(":")[0] not in WITH_CUDA, reason=f"{name} finds no GPU on this machine")
    if name == "onnxruntime:tensorrt" and not has_tensorrt():
        absent = pytest.mark.skip(reason=f"{name} finds no TensorRT library on this machine")
    return pytest.param(f"{name} on cuda", marks=[pytest.mark.gpu, absent])


@pytest.fixture(
    params=[
        "onnxruntime",
        "pytorch",
        "openvino",
        *(f"{name}, simulated" for name in SIMULATED),
        *map(on_a_gpu, ON_CUDA),
    ]
)
def backend(request, bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("RKD_DEPLOY_CACHE", str(tmp_path))
    name, *where = re.split(", | on ", request.param)
    if where == ["simulated"]:
        request.getfixturevalue(SIMULATED[name])
    with load_backend(name, bundle, device="cuda" if where == ["cuda"] else None) as loaded:
        yield loaded


def test_says_what_it_is(backend, request):
    name, *where = re.split(", | on ", request.node.callspec.params["backend"])
    assert backend.name == name
    assert backend.device == ("cuda:0" if where else "cpu")
    assert backend.precision == "fp32"
    assert backend.info.input_shape == (None, 4, 4, 3)
    assert backend.info.input_dtype == "uint8"
    assert backend.info.outputs == ("logits",)


def test_answers_are_exact_at_batch_1_and_7(backend, zoo):
    x = zoo.pixels(7)
    logits = backend.infer(x)
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(logits, zoo.answer(x))
    for row in range(7):
        np.testing.assert_array_equal(backend.infer(x[row : row + 1])[0], logits[row])


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "tensorrt", "onnxruntime:cuda-graphs"])
def test_every_output_is_given_or_refused(name, zoo, tmp_path, monkeypatch, request):
    monkeypatch.setenv("RKD_DEPLOY_CACHE", str(tmp_path))
    device = "cuda" if name in SIMULATED else None
    if name in SIMULATED:
        request.getfixturevalue(SIMULATED[name])
    x = zoo.pixels(600)
    with load_backend(name, zoo.build(tmp_path / "m.onnx", extra=True), device=device) as loaded:
        if name == "onnxruntime:cuda-graphs":
            with pytest.raises(BackendError, match=r"has the outputs logits, sums, of which .* gives the first alone"):
                loaded.infer_all(x[:2])
            return
        logits, sums = infer_all_many(loaded, x)
        np.testing.assert_array_equal(logits, zoo.answer(x))
        np.testing.assert_array_equal(sums, x.astype(np.float32).sum((1, 2)))
    with load_backend(name, zoo.build(tmp_path / "one.onnx"), device=device) as loaded:
        (logits,) = loaded.infer_all(x[:3])
        np.testing.assert_array_equal(logits, zoo.answer(x[:3]))


def test_takes_read_only_and_strided_arrays(backend, zoo):
    x = zoo.pixels(6)
    frozen = x.copy()
    frozen.setflags(write=False)
    for variant in (frozen, x[::-1], x[:, :, ::-1], np.asfortranarray(x)):
        np.testing.assert_array_equal(backend.infer(variant), zoo.answer(variant))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((1, 4, 4, 3), np.float32), "float32 [1, 4, 4, 3]"),
        (np.zeros((1, 3, 4, 4), np.uint8), "uint8 [1, 3, 4, 4]"),
        (np.zeros((4, 4, 3), np.uint8), "uint8 [4, 4, 3]"),
        (np.zeros((0, 4, 4, 3), np.uint8), "uint8 [0, 4, 4, 3]"),
        (np.uint8(3), "uint8"),
        ([[1, 2, 3]], "a list"),
    ],
)
def test_refuses_what_does_not_fit_and_names_both(backend, x, message):
    for use in (backend.infer, backend.prepare):
        with pytest.raises(UsageError) as caught:
            use(x)
        assert message in str(caught.value)
        assert "uint8 [any, 4, 4, 3]" in str(caught.value)


def test_prepared_runs_repeat_and_other_batches_stay_right(backend, zoo):
    run = backend.prepare(zoo.pixels(3))
    for _ in range(3):
        assert run() is None
    backend.synchronize()
    np.testing.assert_array_equal(backend.infer(zoo.pixels(2)), zoo.answer(zoo.pixels(2)))


def fixed_inside(zoo, file):
    """A model whose batch is free by its input and 2 by a Reshape: of 4 images it makes 2 rows of twice the width."""
    shape = helper.make_tensor("shape", TensorProto.INT64, [2], [2, -1])
    nodes = [helper.make_node("Reshape", ["input", "shape"], ["rows"]), helper.make_node("Abs", ["rows"], ["logits"])]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "k"]) for name in ("input", "logits")]
    return zoo.save(file, helper.make_graph(nodes, "g", ends[:1], ends[1:], [shape]))


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_an_answer_with_other_rows_than_the_batch_is_refused_and_the_next_call_works(name, zoo, tmp_path):
    fixed_inside(zoo, tmp_path / "m.onnx")
    two, four = np.ones((2, 6), np.float32), np.ones((4, 6), np.float32)
    with load_backend(name, tmp_path / "m.onnx") as backend:
        for x in (four, four):
            with pytest.raises(BackendError, match=r"shape \[2, 12\] for a batch of 4.*one row for each image"):
                backend.infer(x)
            np.testing.assert_array_equal(backend.infer(two), two)
        with pytest.raises(BackendError, match="one row for each image"):
            backend.prepare(four)()
        backend.prepare(two)()
        backend.synchronize()


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_after_a_run_that_failed_the_next_one_on_that_thread_works(name, zoo, tmp_path):
    """A product whose second factor fixes the batch: any other batch is an error inside the runtime."""
    weight = helper.make_tensor("w", TensorProto.FLOAT, [6, 1, 3], [1.0] * 18)
    nodes = [
        helper.make_node("Reshape", ["input", "shape"], ["rows"]),
        helper.make_node("MatMul", ["rows", "w"], ["y"]),
        helper.make_node("Squeeze", ["y", "axis"], ["logits"]),
    ]
    constants = [
        helper.make_tensor("shape", TensorProto.INT64, [3], [6, 1, 1]),
        helper.make_tensor("axis", TensorProto.INT64, [1], [1]),
        weight,
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "k"]) for name in ("input", "logits")]
    zoo.save(tmp_path / "m.onnx", helper.make_graph(nodes, "g", ends[:1], ends[1:], constants))
    good, bad = np.ones((6, 1), np.float32), np.ones((4, 1), np.float32)
    with load_backend(name, tmp_path / "m.onnx") as backend:
        for _ in range(2):
            np.testing.assert_array_equal(backend.infer(good), np.ones((6, 3)))
            with pytest.raises(BackendError):
                backend.infer(bad)
        np.testing.assert_array_equal(backend.infer(good), np.ones((6, 3)))


def test_a_module_with_other_rows_than_the_batch_is_refused():
    class Fixed(torch.nn.Module):
        def forward(self, x):
            return x.reshape(2, -1)

    two, four = np.ones((2, 6), np.float32), np.ones((4, 6), np.float32)
    with PyTorchBackend(Fixed(), input_shape=(None, 6), input_dtype="float32") as backend:
        with pytest.raises(BackendError, match=r"shape \[2, 12\] for a batch of 4"):
            backend.infer(four)
        np.testing.assert_array_equal(backend.infer(two), two)


def test_closes_twice_and_refuses_use_afterwards(backend, zoo):
    run = backend.prepare(zoo.pixels(1))
    backend.close()
    backend.close()
    uses = (lambda: backend.infer(zoo.pixels(1)), lambda: backend.prepare(zoo.pixels(1)), run, backend.synchronize)
    for use in uses:
        with pytest.raises(BackendError, match="closed"):
            use()


@pytest.mark.parametrize("name", ["onnxruntime", "pytorch"])
def test_the_context_manager_closes(name, bundle, zoo):
    with load_backend(name, bundle) as loaded:
        pass
    with pytest.raises(BackendError, match="closed"):
        loaded.infer(zoo.pixels(1))


@pytest.mark.parametrize("name", ["onnxruntime", "pytorch"])
@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"device": "gpu"}, "cpu, cuda, cuda:N"),
        ({"device": "cuda:x"}, "cpu, cuda, cuda:N"),
        ({"device": 0}, "Unknown device 0. Choices: cpu, cuda, cuda:N"),
        ({"threads": 0}, "threads 0 must be a whole number between 1 and 4096"),
        ({"threads": 2147483648}, "whole number between 1 and 4096"),
        ({"threads": 1.5}, "threads 1.5 must be a whole number"),
        ({"threads": True}, "threads True must be a whole number"),
    ],
)
def test_refuses_unknown_devices_and_thread_counts(name, options, rule, bundle):
    with pytest.raises(UsageError, match=rule):
        load_backend(name, bundle, **options)


@pytest.mark.parametrize(
    ("name", "options", "rule"),
    [
        ("onnxruntime", {}, "no effect on onnxruntime on cpu"),
        (
            "openvino",
            {},
            "no effect on openvino on cpu; on device='cuda' it holds for onnxruntime, .*pytorch,",
        ),
        ("pytorch", {"device": "cuda", "memory_limit": 0}, "memory_limit 0 must be a whole number between 1"),
    ],
)
def test_a_memory_limit_without_an_effect_is_refused(name, options, rule, bundle):
    with pytest.raises(UsageError, match=rule):
        load_backend(name, bundle, **{"memory_limit": 1 << 30, **options})


@pytest.mark.parametrize(
    "name", ["onnxruntime", "openvino", "pytorch", "pytorch:cuda-graphs", "onnxruntime:cuda-graphs"]
)
def test_a_bench_refuses_options_without_an_effect_before_it_loads_anything(name, tmp_path):
    for options, rule in (
        ({"cuda_graph": False}, rf"no effect on {name}\b.*for tensorrt and tensorrt-rtx"),
        ({"memory_limit": 1 << 30, "device": "cpu"}, f"no effect on {name} on cpu"),
    ):
        with pytest.raises(UsageError, match=rule):
            bench([tmp_path / "absent.onnx"], bench_settings(backend=name, **options))


def test_a_memory_limit_is_set_recorded_and_printed(graphs, bundle, tmp_path, monkeypatch):
    shares = []
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda place: (1 << 30, 4 << 30))
    monkeypatch.setattr("torch.cuda.set_per_process_memory_fraction", lambda share, place: shares.append(share))
    monkeypatch.setattr("torch.cuda.synchronize", lambda place: None)
    settings = {"backend": "pytorch:cuda-graphs", "memory_limit": 1 << 30, "batches": [1]}
    done = record_bench(
        [bundle], bench_settings(**{**settings, "min_seconds": 0, "min_runs": 2, "warmup_seconds": 0}), tmp_path / "out"
    )
    assert shares == [0.25]
    assert json.loads(done.path.read_text())["results"][0]["memory_limit_bytes"] == 1 << 30
    assert "| 1,073.7 |" in bench_markdown(read_bench(done.path))


@pytest.mark.parametrize("name", ["onnxruntime", "pytorch"])
def test_never_falls_back_from_cuda(name, bundle):
    # An index that no machine has: with CUDA or without, the answer has to be an error and not the CPU.
    with pytest.raises(BackendError, match="cpu"):
        load_backend(name, bundle, device="cuda:99")
