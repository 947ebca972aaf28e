"""The code that Triton runs: the python variant, and what prepares images."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import types

import numpy as np
import pytest

from rkd_deploy.backends.tensorrt.source import read_source
from rkd_deploy.images import to_array
from rkd_deploy.serve.triton.repository import export_triton
from rkd_deploy.serve.triton.settings import Serving
from tests.support.repositories import HIDING, NAME, files


def test_the_python_variant_brings_its_code(bundles, tmp_path):
    export_triton(bundles[0], tmp_path, Serving(backend="python"))
    assert set(files(tmp_path / NAME / "1")) == {"model.onnx", "model.py"}
    code = (tmp_path / NAME / "1/model.py").read_text()
    imported = set(re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE))
    assert imported - {"json", "os", "pathlib", "typing", "__future__"} == {
        "numpy", "onnxruntime", "triton_python_backend_utils",
    }  # fmt: skip


def python_variant(repository, monkeypatch):
    """The code of the python variant, imported as Triton would, but for Triton's own module."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", types.ModuleType("triton_python_backend_utils"))
    spec = importlib.util.spec_from_file_location("triton_model", repository / NAME / "1/model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ARGS = {
    "model_config": json.dumps({"input": [{"name": "input"}], "output": [{"name": "logits"}], "parameters": {}}),
    "model_instance_kind": "CPU",
    "model_instance_device_id": "0",
}


def test_the_python_variant_keeps_no_identifier_and_waits_for_no_pipe(bundles, tmp_path, monkeypatch):
    export_triton(bundles[0], tmp_path, Serving(backend="python"))
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    variant = python_variant(tmp_path, monkeypatch)
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
    code = (tmp_path / NAME / "1/model.py").read_text()
    assert code.index("ORT_DISABLE_TELEMETRY") < code.index("import onnxruntime")  # it is read when that is imported
    model = variant.TritonPythonModel()
    model.initialize(ARGS)
    model.finalize()
    file = tmp_path / NAME / "1/model.onnx"
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to("absent")):
        file.unlink()
        make(file)
        with pytest.raises(RuntimeError, match=r"model\.onnx is missing, or no regular file: export the model"):
            model.initialize(ARGS)


def test_what_prepares_images_needs_nothing_but_its_own_folder(bundles, tmp_path):
    """Its code in a Python that has no rkd_deploy: the pixels are those of `images.to_array`."""
    export_triton(bundles[0], tmp_path / "models")
    photo = bundles[0] / "golden/photo.jpg"
    script = """
import sys, types
class Tensor:
    def __init__(self, name, array): self.name, self.array = name, array
    def as_numpy(self): return self.array
stub = types.ModuleType("triton_python_backend_utils")
stub.Tensor, stub.TritonError = Tensor, str
stub.InferenceResponse = lambda tensors=None, error=None: (tensors, error)
stub.get_input_tensor_by_name = lambda request, name: request[name]
sys.modules["triton_python_backend_utils"] = stub
import importlib.util, numpy as np
assert importlib.util.find_spec("rkd_deploy") is None
spec = importlib.util.spec_from_file_location("model", sys.argv[1] + "/model.py")
module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
model = module.TritonPythonModel(); model.initialize({})
photo = open(sys.argv[2], "rb").read()
good, bad = model.execute([{"images": Tensor("images", np.array([[image]], object))} for image in (photo, b"none")])
assert "Image 0 cannot be read as an image" in bad[1], bad
np.save(sys.argv[3], good[0][0].array)
"""
    places = [tmp_path / f"models/{NAME}-pixels/1", photo, tmp_path / "pixels.npy"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-P", "-c", HIDING + script, *places]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)
    rule = read_source(bundles[0]).card.preprocess
    np.testing.assert_array_equal(np.load(tmp_path / "pixels.npy"), to_array(photo, rule)[None])
