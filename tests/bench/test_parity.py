import numpy as np
import pytest

from rkd_deploy.bench.parity import compare_logits, gate, read_golden, verify
from rkd_deploy.errors import GateError, ModelFileError, UsageError

REFERENCE = np.array([[1.0, 2.0, 3.0], [6.0, 5.0, 4.0]])


def test_compare_says_how_far_and_how_often():
    candidate = REFERENCE + np.array([[0, 0, 0], [-1.5, 0, 0]])
    parity = compare_logits(REFERENCE, candidate, 1.5)
    assert parity.max_abs_diff == 1.5
    assert parity.mean_abs_diff == 0.25
    assert parity.agreement == 0.5
    assert (parity.n, parity.tolerance, parity.passed) == (2, 1.5, True)
    assert not compare_logits(REFERENCE, candidate, 1.4999).passed
    assert compare_logits(REFERENCE, REFERENCE, 0).passed


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["reference", "candidate", "both"])
def test_what_is_not_finite_never_passes(value, side):
    broken = REFERENCE.copy()
    broken[1, 2] = value
    reference = REFERENCE if side == "candidate" else broken
    candidate = REFERENCE if side == "reference" else broken
    parity = compare_logits(reference, candidate, 1e9)
    assert not parity.passed
    assert parity.to_dict()["max_abs_diff"] is None
    with pytest.raises(GateError, match="NaN or infinite"):
        gate(parity, "a model")


@pytest.mark.parametrize(
    ("reference", "candidate"),
    [
        (REFERENCE, REFERENCE[:1]),
        (REFERENCE, REFERENCE[:, :2]),
        (REFERENCE[0], REFERENCE[0]),
        (REFERENCE[:0], REFERENCE[:0]),
    ],
)
def test_other_shapes_never_pass(reference, candidate):
    with pytest.raises(GateError, match="of one shape") as caught:
        compare_logits(reference, candidate, 1e9)
    assert str(list(candidate.shape)) in str(caught.value)


@pytest.mark.parametrize("tolerance", [-1e-3, float("nan"), float("inf")])
def test_a_tolerance_that_says_nothing_is_refused(tolerance):
    with pytest.raises(UsageError, match="tolerance"):
        compare_logits(REFERENCE, REFERENCE, tolerance)


def test_rounding_of_large_logits_is_called_so():
    large = 1e6 * REFERENCE
    with pytest.raises(GateError, match=r"Logits reach 6e\+06, .* rounding .* lower train\.lr"):
        gate(compare_logits(large, large * (1 + 1e-6), 1e-4), "a model", largest=float(large.max()))
    with pytest.raises(GateError, match="precision is not the cause"):
        gate(compare_logits(large, large * (1 + 1e-3), 1e-4), "a model", largest=float(large.max()))


def test_the_gate_states_the_numbers_the_tolerance_and_the_way_out():
    gate(compare_logits(REFERENCE, REFERENCE, 0), "a model")
    with pytest.raises(GateError) as caught:
        gate(compare_logits(REFERENCE, REFERENCE + 0.25, 0.125), "model.onnx on onnxruntime")
    message = str(caught.value)
    for part in ("model.onnx on onnxruntime", "0.25", "0.125", "2 inputs", "100.0%", "is float32, so precision is not"):
        assert part in message
    assert "--precision fp32" not in message
    assert caught.value.exit_code == 3
    with pytest.raises(GateError, match="--precision fp32 to see whether int8 is the cause"):
        gate(compare_logits(REFERENCE, REFERENCE + 0.25, 0.125), "model.onnx on onnxruntime", "int8")


@pytest.mark.parametrize("backend", ["onnxruntime", "pytorch"])
def test_verify_proves_a_bundle_again(bundle, backend):
    parity = verify(bundle, backend)
    assert parity.passed
    assert (parity.n, parity.max_abs_diff, parity.tolerance) == (5, 0.0, 1e-5)
    assert verify(bundle / "model.onnx", backend, tolerance=0.5).tolerance == 0.5


def test_verify_says_no_to_a_model_with_one_perturbed_weight(zoo, tmp_path, bundle):
    zoo.build(tmp_path / "model.onnx", bias=(0.0, 2.0**-12, 0.0))
    (tmp_path / "golden.npz").write_bytes((bundle / "golden.npz").read_bytes())
    zoo.seal(tmp_path)
    parity = verify(tmp_path)
    assert not parity.passed
    assert parity.max_abs_diff == 2.0**-12


def test_verify_runs_models_of_a_fixed_batch(zoo, tmp_path, bundle):
    zoo.build(tmp_path / "model.onnx", batch=2)
    (tmp_path / "golden.npz").write_bytes((bundle / "golden.npz").read_bytes())
    zoo.seal(tmp_path)
    assert verify(tmp_path).passed


def test_golden_inputs_of_another_model_are_refused(zoo, tmp_path):
    zoo.build(tmp_path / "model.onnx")
    np.savez(tmp_path / "golden.npz", inputs=np.zeros((1, 2, 2, 3), np.uint8), logits=np.zeros((1, 3)), tolerance=1e-4)
    zoo.seal(tmp_path)
    with pytest.raises(ModelFileError, match=r"do not fit the model.*\[1, 2, 2, 3\]"):
        verify(tmp_path)


def test_corrupt_golden_files_are_refused(bundle, tmp_path):
    path = tmp_path / "golden.npz"
    with pytest.raises(ModelFileError, match=r"no .*golden\.npz"):
        read_golden(path)
    whole = (bundle / "golden.npz").read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2], whole[:-30], whole[:200] + b"\0" * 60 + whole[260:]):
        path.write_bytes(content)
        with pytest.raises(ModelFileError, match=r"golden\.npz cannot be read"):
            read_golden(path)


def test_golden_files_without_a_key_or_with_objects_are_refused(tmp_path):
    path = tmp_path / "golden.npz"
    np.savez(path, inputs=np.zeros(1), logits=np.zeros(1))
    with pytest.raises(ModelFileError, match="tolerance"):
        read_golden(path)
    np.savez(path, inputs=np.array([{}], object), logits=np.zeros(1), tolerance=1.0)
    with pytest.raises(ModelFileError, match="cannot be read"):
        read_golden(path)
    np.savez(path, inputs=np.zeros(1), logits=np.zeros(1), tolerance=np.zeros(2))
    with pytest.raises(ModelFileError, match="cannot be read"):
        read_golden(path)
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(ModelFileError, match="cannot be read"):
        read_golden(tmp_path / "array.npy")
