from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from rkd_deploy.backends import RunOn, load_backend
from rkd_deploy.backends.onnxrt import OnnxRuntimeBackend
from rkd_deploy.backends.onnxrt_session import check_provider, multiplies_int8_exactly
from rkd_deploy.errors import BackendError, ModelFileError

CPU_BUILD = "CUDAExecutionProvider" not in onnxruntime.get_available_providers()


def test_the_guard_refuses_a_session_that_fell_back(bundle):
    session = onnxruntime.InferenceSession(bundle / "model.onnx", providers=["CPUExecutionProvider"])
    check_provider(session.get_providers(), "cpu")
    with pytest.raises(BackendError, match=r"CUDAExecutionProvider and fell back to CPUExecutionProvider.*\[gpu\]"):
        check_provider(session.get_providers(), "cuda")


@pytest.mark.skipif(not CPU_BUILD, reason="this build has CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_the_cpu_build_names_the_gpu_build(bundle, device):
    with pytest.raises(BackendError, match=r"built without it.*pip install 'rkd-deploy\[gpu\]'"):
        load_backend("onnxruntime", bundle, device=device)


def test_the_guard_names_the_tensorrt_that_is_missing(bundle):
    session = onnxruntime.InferenceSession(bundle / "model.onnx", providers=["CPUExecutionProvider"])
    with pytest.raises(BackendError, match=r"TensorrtExecutionProvider and fell back.*libnvinfer\.so\.10.*TensorRT 11"):
        check_provider(session.get_providers(), "tensorrt")


@pytest.mark.skipif(not CPU_BUILD, reason="this build has CUDA")
def test_the_tensorrt_provider_needs_the_gpu_build_and_a_gpu(bundle):
    with pytest.raises(BackendError, match=r"TensorrtExecutionProvider was asked for.*pip install 'rkd-deploy\[gpu\]'"):
        load_backend("onnxruntime:tensorrt", bundle)
    with pytest.raises(BackendError, match="runs on device='cuda' or 'cuda:N' only"):
        load_backend("onnxruntime:tensorrt", bundle, device="cpu")


def test_a_listed_tensorrt_provider_without_its_library_is_an_error_before_anything_is_loaded(bundle, monkeypatch):
    """The GPU build lists it on every machine, and fails inside a session's set-up where the library is missing."""
    listed = [*onnxruntime.get_available_providers(), "TensorrtExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
    with pytest.raises(BackendError, match=r"needs TensorRT's library libnvinfer\.so\.10.*pip install tensorrt-cu12"):
        load_backend("onnxruntime:tensorrt", bundle)


def test_what_forbids_a_fallback_is_a_setting_that_onnxruntime_knows(bundle):
    """It keeps `onnxruntime:tensorrt` from running a part on the CPU; asked for with the CPU it contradicts."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    with pytest.raises(Exception, match="CPU"):
        onnxruntime.InferenceSession(bundle / "model.onnx", options, providers=["CPUExecutionProvider"])


@pytest.mark.gpu
@pytest.mark.skipif(CPU_BUILD, reason="this build has no CUDA")
def test_cuda_runs_on_cuda(bundle, zoo):
    with load_backend("onnxruntime", bundle, device="cuda") as backend:
        assert backend.device == "cuda:0"
        np.testing.assert_array_equal(backend.infer(zoo.pixels(3)), zoo.answer(zoo.pixels(3)))


def test_threads_reach_the_session(bundle):
    with OnnxRuntimeBackend(bundle, RunOn(threads=1)) as backend:
        options = backend._session.get_session_options()
        assert (options.intra_op_num_threads, options.inter_op_num_threads) == (1, 1)


def test_prepared_input_and_output_stay_bound_and_apart_from_the_callers_array(bundle, zoo):
    x = zoo.pixels(2)
    with OnnxRuntimeBackend(bundle) as backend:
        run = backend.prepare(x)
        expected = zoo.answer(x)
        x[:] = 0
        run()
        backend.synchronize()
        np.testing.assert_array_equal(backend._binding.copy_outputs_to_cpu()[0], expected)


def test_logits_are_found_by_name(zoo, tmp_path):
    x = zoo.pixels(2)
    with OnnxRuntimeBackend(zoo.build(tmp_path / "m.onnx", extra=True)) as backend:
        assert backend.info.outputs == ("logits", "sums")
        np.testing.assert_array_equal(backend.infer(x), zoo.answer(x))


def test_without_that_name_the_first_output_is_the_logits(zoo, tmp_path):
    with OnnxRuntimeBackend(zoo.build(tmp_path / "m.onnx", output="scores")) as backend:
        assert backend.info.outputs == ("scores",)
        assert backend.precision == "unknown"
        assert backend.info.metadata == {}


def test_metadata_gives_the_card_and_the_precision(zoo, tmp_path):
    card = zoo.card(precision="int8")
    with OnnxRuntimeBackend(zoo.build(tmp_path / "m.onnx", card=card)) as backend:
        assert backend.info.metadata == {"rkd_deploy.card": card.to_json()}
        assert backend.precision == "int8"


def test_a_fixed_batch_is_known_and_kept(zoo, tmp_path):
    with OnnxRuntimeBackend(zoo.build(tmp_path / "m.onnx", batch=4)) as backend:
        assert backend.info.input_shape == (4, 4, 4, 3)
        np.testing.assert_array_equal(backend.infer(zoo.pixels(4)), zoo.answer(zoo.pixels(4)))
        with pytest.raises(ValueError, match=r"\[3, 4, 4, 3\].*\[4, 4, 4, 3\]"):
            backend.infer(zoo.pixels(3))


def identity(kind, shape, inputs=("input",)):
    nodes = [helper.make_node("Identity", [inputs[0]], ["logits"])]
    infos = [helper.make_tensor_value_info(name, kind, shape) for name in inputs]
    return helper.make_graph(nodes, "identity", infos, [helper.make_tensor_value_info("logits", kind, shape)])


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (identity(TensorProto.FLOAT, ["n", 2], ("image", "mask")), r"has 2 inputs \(image tensor\(float\)"),
        (identity(TensorProto.STRING, ["n", 2]), r"tensor\(string\)"),
        (identity(TensorProto.BFLOAT16, ["n", 2]), r"tensor\(bfloat16\)"),
        (identity(TensorProto.FLOAT, None), "no known rank"),
    ],
)
def test_models_that_are_no_classifier_of_one_array_are_refused(zoo, tmp_path, graph, message):
    zoo.save(tmp_path / "m.onnx", graph)
    with pytest.raises(BackendError, match=message):
        OnnxRuntimeBackend(tmp_path / "m.onnx")


def test_an_operator_that_this_build_lacks_is_no_broken_file(zoo, tmp_path):
    nodes = [
        helper.make_node("Cast", ["input"], ["half"], to=TensorProto.BFLOAT16),
        helper.make_node("Conv", ["half", "weight"], ["out"]),
        helper.make_node("Cast", ["out"], ["logits"], to=TensorProto.FLOAT),
    ]
    shape = ["n", 1, 2, 2]
    graph = helper.make_graph(
        nodes,
        "bf16",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)],
        [helper.make_tensor("weight", TensorProto.BFLOAT16, [1, 1, 1, 1], [1.0])],
    )
    zoo.save(tmp_path / "m.onnx", graph, opset=22)
    with pytest.raises(BackendError, match=r"cannot run .*m\.onnx"):
        OnnxRuntimeBackend(tmp_path / "m.onnx")


def test_a_run_that_fails_says_so(zoo, tmp_path):
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["input", "shape"], ["logits"])],
        "one_row",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 2])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
        [helper.make_tensor("shape", TensorProto.INT64, [2], [1, 2])],
    )
    zoo.save(tmp_path / "m.onnx", graph)
    with OnnxRuntimeBackend(tmp_path / "m.onnx") as backend:
        assert backend.infer(np.zeros((1, 2), np.float32)).shape == (1, 2)
        for use in (backend.infer, lambda x: backend.prepare(x)()):
            with pytest.raises(BackendError, match="failed to run"):
                use(np.zeros((3, 2), np.float32))


@pytest.mark.parametrize("name", [b"input", b"logits", b"rkd_deploy.card"])
def test_a_flipped_bit_in_a_name_is_a_broken_file_and_prints_nothing(zoo, tmp_path, capfd, name):
    file = zoo.build(tmp_path / "m.onnx", card=zoo.card())
    file.write_bytes(file.read_bytes().replace(name, b"\xff" + name[1:]))
    with pytest.raises(ModelFileError, match=r"m\.onnx"):
        OnnxRuntimeBackend(file)
    assert capfd.readouterr() == ("", "")


def test_a_model_without_outputs_is_a_broken_file(zoo, tmp_path):
    shape = ["n", 2]
    graph = identity(TensorProto.FLOAT, shape)
    del graph.output[:]
    zoo.save(tmp_path / "m.onnx", graph)
    with pytest.raises(ModelFileError, match=r"m\.onnx"):
        OnnxRuntimeBackend(tmp_path / "m.onnx")


def test_a_card_in_a_newer_schema_is_refused_at_load(zoo, tmp_path):
    card = zoo.card()
    file = zoo.build(tmp_path / "m.onnx", card=card)
    file.write_bytes(file.read_bytes().replace(b'"schema": 1,', b'"schema": 9,'))
    with pytest.raises(ModelFileError, match="schema 9"):
        OnnxRuntimeBackend(file)


def test_bound_memory_never_leaks_from_one_run_into_another(bundle, zoo):
    """The second run of a shape goes through memory that is kept: answers must be arrays of their own."""
    with OnnxRuntimeBackend(bundle) as backend:
        inputs = [zoo.pixels(2, seed=seed) for seed in range(4)]
        answers = [backend.infer(x) for x in inputs]
        inputs[-1][...] = 0
        for seed, answer in enumerate(answers):
            np.testing.assert_array_equal(answer, zoo.answer(zoo.pixels(2, seed=seed)))
        backend.infer(zoo.pixels(3))  # another shape in between
        np.testing.assert_array_equal(backend.infer(zoo.pixels(2)), zoo.answer(zoo.pixels(2)))


def test_threads_share_a_backend(bundle, zoo):
    with OnnxRuntimeBackend(bundle, RunOn(threads=1)) as backend, ThreadPoolExecutor(8) as pool:
        inputs = [zoo.pixels(1, seed=seed) for seed in range(400)]
        for x, answer in zip(inputs, pool.map(backend.infer, inputs), strict=True):
            np.testing.assert_array_equal(answer, zoo.answer(x))


@pytest.mark.parametrize(
    ("facts", "exact"),
    [
        ("flags : fpu avx2 avx512f avx512_vnni md_clear\n", True),
        ("flags : fpu avx2 avx_vnni\n", True),
        ("flags : fpu avx2 avx512f\n", False),
        (None, False),
    ],
)
def test_exact_kernels_are_asked_for_where_the_fast_ones_saturate(tmp_path, facts, exact):
    file = tmp_path / "cpuinfo"
    if facts is not None:
        file.write_text(facts)
    assert multiplies_int8_exactly(file) is exact


def test_uint8_times_int8_does_not_saturate_on_any_machine(tmp_path):
    """64 products of 255 and 127: two of them overflow 16 bits, which kernels without VNNI add them in."""
    nodes, constants = [], []

    def constant(name, value):
        constants.append(onnx.numpy_helper.from_array(value, name))
        return name

    scale, zero = constant("one", np.float32(1)), constant("zero", np.uint8(0))
    zeros, scales = constant("zeros", np.zeros(8, np.int8)), constant("scales", np.ones(8, np.float32))
    weight = constant("weight", np.full((64, 8), 127, np.int8))
    wide = constant("wide", np.float32(64 * 127))
    nodes.append(helper.make_node("QuantizeLinear", ["x", scale, zero], ["x8"]))
    nodes.append(helper.make_node("DequantizeLinear", ["x8", scale, zero], ["x32"]))
    nodes.append(helper.make_node("DequantizeLinear", [weight, scales, zeros], ["w32"], axis=1))
    nodes.append(helper.make_node("MatMul", ["x32", "w32"], ["y32"]))
    nodes.append(helper.make_node("QuantizeLinear", ["y32", wide, zero], ["y8"]))
    nodes.append(helper.make_node("DequantizeLinear", ["y8", wide, zero], ["y"]))
    shapes = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, n]) for name, n in (("x", 64), ("y", 8))]
    graph = helper.make_graph(nodes, "products", shapes[:1], shapes[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, tmp_path / "products.onnx")
    with load_backend("onnxruntime", tmp_path / "products.onnx", threads=1) as backend:
        logits = backend.infer(np.full((1, 64), 255, np.float32))
    np.testing.assert_array_equal(logits, np.full((1, 8), 255 * 64 * 127, np.float32))
