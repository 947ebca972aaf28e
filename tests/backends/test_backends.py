"""Which backends there are, which cannot run and why, and which files are refused."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from rkd_deploy.backends import available, infer_many, load_backend, model_path, runtimes
from rkd_deploy.backends.files import failed_load, model_name, read_card
from rkd_deploy.errors import BackendError, MissingDependencyError, ModelFileError, UsageError

ENGINES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


def test_every_backend_has_a_status():
    statuses = {status.name: status for status in available()}
    assert list(statuses) == ["onnxruntime", "pytorch", "openvino", "tensorrt", "tensorrt-rtx"]
    for name in ("onnxruntime", "pytorch", "openvino"):
        assert statuses[name].ok
        assert statuses[name].reason is None
        assert statuses[name].devices[0] == "cpu"
    compiled, graphs = "pytorch:compile", "pytorch:cuda-graphs"
    on_cuda = ("onnxruntime:cuda-graphs", "onnxruntime:tensorrt")
    assert statuses["pytorch"].modes == ((compiled, graphs) if "cuda" in statuses["pytorch"].devices else (compiled,))
    assert statuses["onnxruntime"].modes == (on_cuda if "cuda" in statuses["onnxruntime"].devices else ())
    assert replace(statuses["pytorch"], devices=("cpu", "cuda")).modes == (compiled, graphs)
    assert replace(statuses["onnxruntime"], devices=("cpu", "cuda")).modes == on_cuda
    assert statuses["openvino"].modes == ()
    for name, package in ENGINES.items():
        assert statuses[name].devices == (("cuda",) if statuses[name].ok else ())
        if not statuses[name].ok:  # the library is missing, or a GPU is
            missing = importlib.util.find_spec(package) is None
            assert ("is not installed" if missing else "finds no GPU to run on") in statuses[name].reason
        assert statuses[name].install == f"pip install 'rkd-deploy[{name}]'"


@pytest.mark.parametrize("name", list(ENGINES))
def test_an_absent_library_is_named_with_its_extra(name, bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, ENGINES[name], None)
    status = next(status for status in available() if status.name == name)
    assert not status.ok
    assert status.version is None
    assert f"{ENGINES[name]} is needed here and is not installed" in status.reason
    assert f"pip install 'rkd-deploy[{name}]'" in status.reason
    with pytest.raises(MissingDependencyError, match="is not installed"):
        load_backend(name, bundle)


def test_a_broken_installation_is_a_status_and_not_a_crash(tmp_path, monkeypatch):
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    status = available()[0]
    assert not status.ok
    assert "libcudart.so.13" in status.reason


def test_a_runtime_that_is_not_installed_is_named_with_its_extra(monkeypatch, bundle):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'rkd-deploy\[cpu\]'"):
        load_backend("onnxruntime", bundle)
    assert not available()[0].ok


def test_an_unknown_backend_gets_the_nearest_name(bundle):
    with pytest.raises(UsageError, match="Did you mean 'onnxruntime'"):
        load_backend("onnxruntme", bundle)


def test_model_path_takes_a_bundle_and_a_file(bundle):
    assert model_path(bundle) == bundle / "model.onnx"
    assert model_path(str(bundle / "model.onnx")) == bundle / "model.onnx"


def test_model_names_hold_no_folders(bundle, zoo, tmp_path):
    assert model_name(bundle) == "sums"
    assert model_name(bundle / "model.onnx") == "sums"
    assert model_name(zoo.build(tmp_path / "mine.onnx")) == "mine"


def test_missing_files_name_themselves(tmp_path):
    for path in (tmp_path / "no.onnx", tmp_path, tmp_path / "no" / "bundle"):
        with pytest.raises(ModelFileError, match="rkd-deploy export") as caught:
            load_backend("onnxruntime", path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_corrupt_files_name_themselves_the_reason_and_the_way_out(bundle, tmp_path, backend):
    whole = (bundle / "model.onnx").read_bytes()
    contents = {
        "empty": b"",
        "random": np.random.default_rng(0).bytes(3000),
        "text": b"not a model, but a letter\n" * 20,
        **{f"cut{share}": whole[: len(whole) * share // 100] for share in (1, 25, 50, 90, 99)},
    }
    for name, content in contents.items():
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(content)
        with pytest.raises(ModelFileError, match=r"cannot be loaded as a model: .+ rkd-deploy export") as caught:
            load_backend(backend, path)
        assert str(path) in str(caught.value)


def test_cards_come_from_the_metadata_first_and_from_beside_second(zoo, tmp_path):
    file = zoo.build(tmp_path / "model.onnx")
    assert read_card(file, {}) is None
    (tmp_path / "model.json").write_text(zoo.card(name="beside").to_json())
    assert read_card(tmp_path, {}).name == "beside"
    assert read_card(file, {"rkd_deploy.card": zoo.card(name="inside").to_json()}).name == "inside"
    (tmp_path / "model.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ModelFileError, match=r"model\.json"):
        read_card(file, {})


@pytest.mark.parametrize("batch", ["batch", 4])
@pytest.mark.parametrize("count", [1, 4, 5, 10])
def test_any_number_of_inputs_runs_in_chunks(zoo, tmp_path, batch, count):
    x = zoo.pixels(count)
    with load_backend("onnxruntime", zoo.build(tmp_path / "m.onnx", batch=batch)) as backend:
        np.testing.assert_array_equal(infer_many(backend, x, max_batch=3), zoo.answer(x))
        with pytest.raises(UsageError, match=r"\b0\b"):
            infer_many(backend, x[:0])


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("Load model from x failed:std::bad_alloc", "memory ran out"),
        ("env.cc:327 PosixThread pthread_create failed, error code: 11", "no more threads could be started"),
        ("Load model from x failed:system error number 24", "no more files could be opened"),
    ],
)
def test_what_a_machine_lacks_is_not_called_a_broken_file(reason, words, backend):
    """The reasons are those of ONNX Runtime 1.32 and OpenVINO 2026.4 under limits of memory, threads and files."""
    error = failed_load(Path("m.onnx"), backend, reason)
    assert isinstance(error, BackendError)
    assert f"{backend} could not load m.onnx: {words}" in str(error)
    assert "Copy" not in str(error)
    assert isinstance(failed_load(Path("m.onnx"), backend, "Protobuf parsing failed"), ModelFileError)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_memory_that_runs_out_while_loading_is_named(backend, zoo, tmp_path):
    """In a process that may have 150 MB more than it has; the weights alone are 256 MB."""
    weight = numpy_helper.from_array(np.ones((4, 1 << 24), np.float32), "w")
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", None]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", ends[:1], ends[1:], [weight])
    zoo.save(tmp_path / "big.onnx", graph)
    small = zoo.build(tmp_path / "small.onnx")
    program = (
        "import re, resource, sys; from pathlib import Path\n"
        "from rkd_deploy.backends import load_backend\n"
        "backend, small, big = sys.argv[1:]\n"
        "load_backend(backend, small, threads=1).close()\n"
        "kilobytes = int(re.search(r'VmSize:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "resource.setrlimit(resource.RLIMIT_AS, ((kilobytes << 10) + (150 << 20),) * 2)\n"
        "load_backend(backend, big, threads=1)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, backend, small, tmp_path / "big.onnx"], capture_output=True, text=True
    )
    assert "BackendError" in done.stderr.splitlines()[-1]
    assert "memory ran out" in done.stderr


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "pytorch"])
def test_files_that_may_not_be_read_or_are_pointers_say_so(backend, tmp_path):
    suffix = "pt2" if backend == "pytorch" else "onnx"
    file = tmp_path / f"m.{suffix}"
    (tmp_path / "m.onnx").write_bytes(b"there")
    file.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 46827520\n")
    with pytest.raises(ModelFileError, match=r"pointer of Git LFS.*git lfs pull"):
        load_backend(backend, tmp_path / "m.onnx")
    file.unlink()
    os.mkfifo(file)
    with pytest.raises((ModelFileError, BackendError), match="named pipe"):
        load_backend(backend, tmp_path / "m.onnx")


def test_a_name_that_is_no_utf_8_is_said_to_be_one(zoo, tmp_path):
    file = zoo.build(tmp_path / "m.onnx").rename(Path(os.fsdecode(os.fsencode(tmp_path) + b"/m\xff.onnx")))
    with pytest.raises(BackendError, match=r"no UTF-8.*Rename it"):
        load_backend("onnxruntime", file)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "pytorch"])
def test_a_backend_leaves_nothing_in_the_home_folder(backend, bundle, tmp_path):
    """ONNX Runtime wrote a device id under ~/.cache/Microsoft and OpenVINO a customer id under ~/intel, unasked."""
    program = (
        "import sys, numpy as np\n"
        "from rkd_deploy.backends import available, load_backend\n"
        "with load_backend(sys.argv[1], sys.argv[2]) as backend:\n"
        "    backend.infer(np.zeros((1, 4, 4, 3), np.uint8))\n"
        "available()\n"
        "assert 'openvino_telemetry' not in sys.modules\n"
    )
    search = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    command = [sys.executable, "-c", program, backend, str(bundle)]
    subprocess.run(command, check=True, env={**search, "HOME": str(tmp_path)})
    assert list(tmp_path.rglob("*")) == []


def test_a_program_that_wants_a_runtimes_telemetry_can_have_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino_telemetry", runtimes)
    with runtimes._without_telemetry():
        assert sys.modules["openvino_telemetry"] is runtimes
    monkeypatch.delitem(sys.modules, "openvino_telemetry")
    with runtimes._without_telemetry(), pytest.raises(ImportError):
        importlib.import_module("openvino_telemetry")
    assert "openvino_telemetry" not in sys.modules
