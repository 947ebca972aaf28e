"""Which backends there are, what is said of those that cannot run, and which files are refused."""

import importlib.util
import sys
from dataclasses import replace

import numpy as np
import pytest

from rkd_deploy.backends import available, infer_many, load_backend, model_path
from rkd_deploy.backends.files import model_name, read_card
from rkd_deploy.errors import MissingDependencyError, ModelFileError, UsageError

ENGINES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


def test_every_backend_has_a_status():
    statuses = {status.name: status for status in available()}
    assert list(statuses) == ["onnxruntime", "pytorch", "openvino", "tensorrt", "tensorrt-rtx"]
    for name in ("onnxruntime", "pytorch", "openvino"):
        assert statuses[name].ok
        assert statuses[name].reason is None
        assert statuses[name].devices[0] == "cpu"
    compiled, graphs, tensorrt = "pytorch:compile", "pytorch:cuda-graphs", "onnxruntime:tensorrt"
    assert statuses["pytorch"].modes == ((compiled, graphs) if "cuda" in statuses["pytorch"].devices else (compiled,))
    assert statuses["onnxruntime"].modes == ((tensorrt,) if "cuda" in statuses["onnxruntime"].devices else ())
    assert replace(statuses["pytorch"], devices=("cpu", "cuda")).modes == (compiled, graphs)
    assert replace(statuses["onnxruntime"], devices=("cpu", "cuda")).modes == (tensorrt,)
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
