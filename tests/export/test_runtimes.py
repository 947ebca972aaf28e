"""A bundle unchanged in runtimes that this package has no part in: their answers are those of golden.npz.

What else was tried, by benchmarks/runtimes.py, is in docs/runtimes.md.
"""

import numpy as np
import onnx
import openvino
import pytest
from onnx.reference import ReferenceEvaluator

from rkd_deploy.export.bundle import export_bundle


def reference_evaluator(file, x):
    return ReferenceEvaluator(onnx.load(file)).run(["logits"], {"input": x})[0]


def openvino_itself(file, x):
    compiled = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled({"input": x})["logits"]


@pytest.mark.parametrize("level", ["tail", "wide"])
def test_runtimes_of_others_give_the_golden_logits(model, card, tmp_path, level):
    export_bundle(model, card, tmp_path / "bundle", level=level)
    golden = np.load(tmp_path / "bundle/golden.npz")
    assert np.ptp(golden["logits"]) > 0.01
    for run in (reference_evaluator, openvino_itself):
        for batch in (8, 1):
            found = run(tmp_path / "bundle/model.onnx", golden["inputs"][:batch])
            np.testing.assert_allclose(found, golden["logits"][:batch], rtol=0, atol=float(golden["tolerance"]))
