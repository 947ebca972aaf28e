"""ONNX Runtime on CUDA without a GPU: options, captured graphs, libraries, error lines."""

import os
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rkd_deploy.backends import load_backend, onnxrt_cuda
from rkd_deploy.backends.onnx_bytes import has_16_bit_weights
from rkd_deploy.errors import BackendError


def network(*weights, extra=()):
    """A file whose weights are these arrays."""
    nodes = [helper.make_node("Identity", ["x"], ["logits"])]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 2])],
        [*(numpy_helper.from_array(array, f"w{place}") for place, array in enumerate(weights)), *extra],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


FLOAT, HALF = np.zeros(30, np.float32), np.zeros(100, np.float16)
BFLOAT = helper.make_tensor("b", TensorProto.BFLOAT16, [100], np.zeros(200, np.uint8).tobytes(), raw=True)


@pytest.mark.parametrize(
    ("model", "half"),
    [
        (network(FLOAT), False),
        (network(HALF), True),
        (network(HALF, FLOAT), True),
        (network(FLOAT, FLOAT, HALF), False),
        (network(FLOAT, extra=[BFLOAT]), True),
        (network(np.arange(500)), False),
        (network(), False),
    ],
)
def test_the_type_of_most_weights_is_read_without_them(model, half, tmp_path):
    file = tmp_path / "model.onnx"
    onnx.save(model, file)
    assert has_16_bit_weights(file) is half


def test_what_is_no_onnx_file_has_no_16_bit_weights(tmp_path):
    for place, content in enumerate((b"", b"\x07", b"\xff" * 40, os.urandom(200), b"\x3a\xff\xff\xff\x0f\x2a")):
        (tmp_path / str(place)).write_bytes(content)
        assert has_16_bit_weights(tmp_path / str(place)) in (False, True)  # an answer, and no endless reading


def test_tensor_cores_are_off_for_float32_and_on_for_float16(bundle, ort_gpu, tmp_path):
    """use_tf32=0 takes float16 its tensor cores too, and its convolutions their fused bias."""
    half = tmp_path / "half.onnx"
    onnx.save(network(HALF), half)
    with load_backend("onnxruntime", bundle, device="cuda"), load_backend("onnxruntime", half, device="cuda"):
        assert [session.options["use_tf32"] for session in ort_gpu] == ["0", "1"]
        assert all("enable_cuda_graph" not in session.options for session in ort_gpu)


def test_a_graph_for_each_shape_and_one_of_its_own_for_what_is_prepared(bundle, zoo, ort_gpu):
    with load_backend("onnxruntime:cuda-graphs", bundle) as backend:
        (session,) = ort_gpu
        assert session.options["enable_cuda_graph"] == "1"
        prepared = backend.prepare(zoo.pixels(2, seed=9))
        for count, captured in ((1, 2), (1, 2), (4, 3), (1, 3), (2, 4)):
            x = zoo.pixels(count, seed=captured)
            np.testing.assert_array_equal(backend.infer(x), zoo.answer(x))
            assert len(session.graphs) == captured
        prepared()
        logits = session.graphs["1"].outputs["logits"].memory
        np.testing.assert_array_equal(logits, zoo.answer(zoo.pixels(2, seed=9)))  # its input is its own
        assert backend.info.cuda_graph


def test_logits_of_a_graph_stay_when_it_runs_again(bundle, zoo, ort_gpu):
    with load_backend("onnxruntime:cuda-graphs", bundle) as backend:
        first = backend.infer(zoo.pixels(2, seed=1))
        backend.infer(zoo.pixels(2, seed=2))
    np.testing.assert_array_equal(first, zoo.answer(zoo.pixels(2, seed=1)))


def test_cuda_graphs_on_a_cpu_are_refused(bundle):
    with pytest.raises(BackendError, match="runs on device='cuda' or 'cuda:N' only"):
        load_backend("onnxruntime:cuda-graphs", bundle, device="cpu")


def test_a_capture_that_fails_is_a_backends_error(bundle, zoo, ort_gpu, monkeypatch):
    with load_backend("onnxruntime:cuda-graphs", bundle) as backend:

        def refuse(binding, options):
            raise RuntimeError("[ONNXRuntimeError] : 1 : FAIL : operation not permitted when stream is capturing")

        monkeypatch.setattr(ort_gpu[0], "run_with_iobinding", refuse)
        with pytest.raises(BackendError, match="operation not permitted"):
            backend.infer(zoo.pixels(2))


def test_libraries_are_found_in_the_nvidia_wheels_wherever_they_are(tmp_path):
    """In a process of its own: a library that is loaded stays loaded."""
    folder = tmp_path / "nvidia" / "cu13" / "lib"
    folder.mkdir(parents=True)
    (folder / "libcublas.so.13").write_bytes(b"no library")  # of another platform, say: it is passed over
    program = (
        "import ctypes, onnxruntime\n"
        "from rkd_deploy.backends import onnxrt_cuda\n"
        "asked, real = [], ctypes.CDLL\n"
        "ctypes.CDLL = lambda name, *more: asked.append(name) or real(name, *more)\n"
        "onnxruntime.preload_dlls = lambda: print('asked of onnxruntime')\n"
        "onnxrt_cuda.preload(); onnxrt_cuda.preload()\n"
        "print(asked)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.count(str(folder / "libcublas.so.13")) == 1
    assert "asked of onnxruntime" not in done.stdout  # standard output is ours


def test_cudnns_error_lines_are_counted_and_kept_from_the_terminal(capfd):
    with onnxrt_cuda.quiet_terminal() as count:
        os.write(2, b"[E] [cudnn_frontend] Error: No execution plans support the graph.\nsomething else\n")
        os.write(2, b"CUDNN_FE failed\n")
        os.write(2, b"No registered plugin EP device found for 'CUDAExecutionProvider'\n")
    assert count() == 2
    assert capfd.readouterr().err == "something else\n"


def test_error_lines_of_the_first_run_of_a_shape_are_counted(bundle, zoo, ort_gpu, monkeypatch, capfd):
    with load_backend("onnxruntime", bundle, device="cuda") as backend:
        run = ort_gpu[0].run

        def talkative(*arguments):
            os.write(2, b"[cudnn_frontend] Error: No execution plans support the graph.\n")
            return run(*arguments)

        monkeypatch.setattr(ort_gpu[0], "run", talkative)
        for count in (1, 2):
            backend.infer(zoo.pixels(count))
        assert backend.info.error_lines == 2
    assert capfd.readouterr().err == ""
