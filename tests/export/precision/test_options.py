"""What can be asked for together, and what is refused before anything is computed."""

from pathlib import Path

import pytest

from rkd_deploy.errors import UsageError
from rkd_deploy.export.precision.options import GATES, PRECISIONS, TARGETS, PrecisionOptions

FITS = {
    "fp16": {"cpu", "tensorrt", "openvino"},
    "bf16": {"tensorrt", "openvino"},
    "int8": {"cpu", "tensorrt", "openvino"},
    "fp8": {"tensorrt"},
}


@pytest.mark.parametrize("precision", FITS)
@pytest.mark.parametrize("target", TARGETS)
def test_a_precision_is_taken_where_it_applies_and_refused_elsewhere(precision, target):
    if target in FITS[precision]:
        assert PrecisionOptions(precision=precision, target=target).is_lower
        return
    with pytest.raises(
        UsageError, match=rf"{precision} does not apply to --target {target}: .+ Choose --target"
    ) as error:
        PrecisionOptions(precision=precision, target=target)
    assert error.value.exit_code == 2


def test_every_precision_below_float32_has_limits_and_a_backend_that_proves_it():
    assert set(GATES) == set(PRECISIONS) - {"fp32"} == set(FITS)
    provers = {(p, t): PrecisionOptions(precision=p, target=t).prover for p, targets in FITS.items() for t in targets}
    assert provers["int8", "cpu"] == provers["fp16", "tensorrt"] == "onnxruntime"
    assert provers["int8", "openvino"] == provers["bf16", "tensorrt"] == provers["fp8", "tensorrt"] == "openvino"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int4"}, r"Unknown --precision 'int4'. Did you mean 'int8'"),
        ({"precision": "int8", "target": "tensort"}, r"Did you mean 'tensorrt'"),
        ({"target": "openvino"}, r"--target has no effect with --precision fp32"),
        ({"precision": "fp16", "calibration": Path("x")}, r"--calibration has no effect with --precision fp16"),
        ({"precision": "fp16", "count": 5}, r"--calibration-count has no effect"),
        ({"precision": "fp16", "keep": ("auto",)}, r"--keep has no effect"),
        ({"precision": "fp32", "drop": 1.0}, r"--max-drop has no effect with --precision fp32"),
        ({"precision": "int8", "keep": ("auto", "conv1")}, r"name layers, or auto"),
        ({"precision": "fp8", "target": "tensorrt", "keep": ("auto",)}, r"--keep auto searches for --precision int8"),
        ({"precision": "int8", "count": 0}, r"--calibration-count 0 must be a whole number between 1 and 1000000"),
        ({"precision": "int8", "agreement": 101.0}, r"--min-agreement 101.0 must be between 0 and 100"),
        ({"precision": "int8", "drop": float("nan")}, r"--max-drop nan must be between"),
    ],
)
def test_what_cannot_be_or_has_no_effect_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        PrecisionOptions(**options)


def test_a_limit_given_replaces_its_default_only():
    gates = PrecisionOptions(precision="int8", drop=2.0).gates
    assert (gates.drop, gates.agreement) == (2.0, GATES["int8"].agreement)
