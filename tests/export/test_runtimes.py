"""A bundle unchanged in runtimes that this package has no part in: their answers are those of golden.npz.

What else was tried, by benchmarks/runtimes.py, is in docs/reference/runtimes.md.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import node_packages
import numpy as np
import onnx
import openvino
import pytest
import tract
from onnx.reference import ReferenceEvaluator

from rkd_deploy.export.bundle import export_bundle

REPO = Path(__file__).parents[2]
SCRIPT = REPO / "benchmarks" / "runtimes.mjs"


@pytest.fixture(scope="session")
def node_folder(absent) -> Path:
    """A folder with the packages for Node.js, installed once by npm."""
    return node_packages.install(absent)


def reference_evaluator(file, x):
    return ReferenceEvaluator(onnx.load(file)).run(["logits"], {"input": x})[0]


def openvino_itself(file, x):
    compiled = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled({"input": x})["logits"]


def tract_itself(file, x):
    return tract.onnx().load(str(file)).into_model().into_runnable().run([x])[0].to_numpy()


def by_node(folder, package, file, x):
    inputs = file.with_name("inputs.bin")
    inputs.write_bytes(x.tobytes())
    command = ["node", SCRIPT, package, file, inputs, x.dtype.name, json.dumps(x.shape)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return np.array(json.loads(done.stdout.splitlines()[-1])["logits"]).reshape(len(x), -1)


@pytest.fixture(params=["tail", "wide"])
def exported(request, model, card, tmp_path):
    export_bundle(model, card, tmp_path / "bundle", level=request.param)
    golden = np.load(tmp_path / "bundle/golden.npz")
    assert np.ptp(golden["logits"]) > 0.01
    return tmp_path / "bundle/model.onnx", golden


@pytest.mark.parametrize("run", [reference_evaluator, openvino_itself, tract_itself])
def test_runtimes_of_others_give_the_golden_logits(exported, run):
    file, golden = exported
    for batch in (8, 1):
        found = run(file, golden["inputs"][:batch])
        np.testing.assert_allclose(found, golden["logits"][:batch], rtol=0, atol=float(golden["tolerance"]))


@pytest.mark.parametrize("package", ["onnxruntime-node", "onnxruntime-web"])
def test_node_and_the_browsers_runtime_give_the_golden_logits(exported, node_folder, package):
    file, golden = exported
    found = by_node(node_folder, package, file, golden["inputs"])
    np.testing.assert_allclose(found, golden["logits"], rtol=0, atol=float(golden["tolerance"]))
