import numpy as np
import pytest
import torch
from torch import nn

from rkd_deploy.errors import BackendError, ModelFileError
from rkd_deploy.serve.backends import load_backend
from rkd_deploy.serve.backends.pytorch import PyTorchBackend


def live(module, **options):
    return PyTorchBackend(module, input_shape=(None, 2), input_dtype="float32", **options)


def test_a_live_module_is_copied_in_eval_mode_and_left_as_it_is():
    module = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Dropout(0.5)).train()
    x = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    expected = x @ module[0].weight.detach().numpy().T
    with live(module, precision="bf16") as backend:
        assert module.training
        with torch.no_grad():
            module[0].weight.zero_()
        np.testing.assert_allclose(backend.infer(x), expected, rtol=1e-6)
        assert backend.precision == "bf16"


class Answer(nn.Module):
    def __init__(self, give):
        super().__init__()
        self.give = give

    def forward(self, x):
        return self.give(x)


def test_a_tuple_begins_with_the_logits():
    x = np.ones((1, 2), np.float32)
    for give in (lambda x: (2 * x, x), lambda x: [2 * x], lambda x: 2 * x):
        np.testing.assert_array_equal(live(Answer(give)).infer(x), 2 * x)


def test_bfloat16_logits_come_as_float32():
    logits = live(Answer(lambda x: x.bfloat16())).infer(np.ones((1, 2), np.float32))
    assert logits.dtype == np.float32


@pytest.mark.parametrize("give", [lambda x: {"logits": x}, lambda x: ()])
def test_an_answer_without_logits_is_refused(give):
    with pytest.raises(BackendError, match="needs a tensor of logits"):
        live(Answer(give)).infer(np.ones((1, 2), np.float32))


def test_a_run_that_fails_says_so():
    with pytest.raises(BackendError, match="batch of 3"):
        live(Answer(lambda x: x.view(7, 7))).infer(np.ones((3, 2), np.float32))


def test_a_prepared_input_is_apart_from_the_callers_array():
    seen = []
    x = np.ones((1, 2), np.float32)
    run = live(Answer(lambda x: seen.append(x.clone()) or x)).prepare(x)
    x[:] = 5
    run()
    assert seen[0].tolist() == [[1.0, 1.0]]


def test_threads_are_set(monkeypatch):
    before = torch.get_num_threads()
    try:
        live(nn.Identity(), threads=1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_a_bundle_without_a_program_says_how_to_export_one(zoo, tmp_path):
    zoo.build(tmp_path / "model.onnx")
    for path in (tmp_path, tmp_path / "model.onnx"):
        with pytest.raises(BackendError, match="rkd-deploy export --with-pytorch"):
            load_backend("pytorch", path)
    with pytest.raises(ModelFileError, match="no file"):
        load_backend("pytorch", tmp_path / "nothing")


def test_corrupt_programs_are_refused(bundle, zoo, tmp_path):
    whole = (bundle / "model.pt2").read_bytes()
    zip_of_something_else = tmp_path / "other.npz"
    np.savez(zip_of_something_else, a=1)
    for content in (b"", b"text", whole[:3000], zip_of_something_else.read_bytes()):
        (tmp_path / "model.pt2").write_bytes(content)
        with pytest.raises(ModelFileError, match=r"model\.pt2"):
            load_backend("pytorch", tmp_path)
