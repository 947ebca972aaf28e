import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from rkd_deploy.backends import RunOn, load_backend
from rkd_deploy.backends.pytorch import CompiledPyTorchBackend, PyTorchBackend
from rkd_deploy.errors import BackendError, ModelFileError, UsageError


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
    inputs = []
    x = np.ones((1, 2), np.float32)
    run = live(Answer(lambda x: inputs.append(x.clone()) or x)).prepare(x)
    x[:] = 5
    run()
    assert inputs[0].tolist() == [[1.0, 1.0]]


def test_threads_are_set(monkeypatch):
    before = torch.get_num_threads()
    try:
        live(nn.Identity(), run_on=RunOn("pytorch", threads=1))
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


def test_another_shape_is_recorded_anew_and_what_was_prepared_stays(bundle, zoo, graphs):
    with load_backend("pytorch:cuda-graphs", bundle) as backend:
        prepared = backend.prepare(zoo.pixels(1, seed=9))
        for count, recorded in ((1, 2), (1, 2), (4, 3), (1, 4)):
            x = zoo.pixels(count, seed=recorded)
            np.testing.assert_array_equal(backend.infer(x), zoo.answer(x))
            assert len(graphs) == recorded
        prepared()
        assert [graph.replays for graph in graphs] == [1, 2, 1, 1]
        logits = graphs[0].steps[-1][-1].numpy()
        np.testing.assert_array_equal(logits, zoo.answer(zoo.pixels(1, seed=9)))  # its input is its own
        assert backend.info.cuda_graph


def test_logits_of_a_graph_stay_when_it_runs_again(bundle, zoo, graphs):
    with load_backend("pytorch:cuda-graphs", bundle) as backend:
        first = backend.infer(zoo.pixels(2, seed=1))
        backend.infer(zoo.pixels(2, seed=2))
    np.testing.assert_array_equal(first, zoo.answer(zoo.pixels(2, seed=1)))


def test_a_capture_that_fails_is_a_backends_error(bundle, zoo, graphs, monkeypatch):
    def refuse(graph, capture_error_mode):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    with (
        load_backend("pytorch:cuda-graphs", bundle) as backend,
        pytest.raises(BackendError, match="batch of 2: operation not permitted"),
    ):
        backend.infer(zoo.pixels(2))


def test_cuda_graphs_on_a_cpu_are_refused(bundle):
    with pytest.raises(BackendError, match="runs on device='cuda' or 'cuda:N' only"):
        load_backend("pytorch:cuda-graphs", bundle, device="cpu")


@pytest.mark.slow
def test_a_compiled_program_gives_the_same_answers(bundle, zoo):
    """Really compiled, by the C++ compiler of this machine; the second batch size for all further ones."""
    torch._dynamo.reset()
    with load_backend("pytorch:compile", bundle) as backend:
        assert (backend.name, backend.device) == ("pytorch:compile", "cpu")
        for count in (1, 7, 3, 7):
            x = zoo.pixels(count, seed=count)
            np.testing.assert_allclose(backend.infer(x), zoo.answer(x), rtol=1e-6)
        compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert 1 <= compiled <= 3
        run = backend.prepare(zoo.pixels(2))
        run()
        backend.synchronize()
    with pytest.raises(BackendError, match="closed"):
        run()


def test_what_cannot_be_compiled_whole_is_an_error():
    torch._dynamo.reset()
    module = Answer(lambda x: x * len(str(x.sum().item())))  # the result of a string of a number: no graph
    with (
        CompiledPyTorchBackend(module, input_shape=(None, 2), input_dtype="float32") as backend,
        pytest.raises(BackendError, match="batch of 1"),
    ):
        backend.infer(np.ones((1, 2), np.float32))


def test_a_memory_limit_is_a_share_of_the_device(bundle, graphs, monkeypatch):
    shares = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda place: (1 << 29, 1 << 30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, place: shares.append(share))
    with load_backend("pytorch", bundle, device="cuda", memory_limit=1 << 28):
        assert shares == [0.25]
    with pytest.raises(UsageError, match="has 1,073,741,824"):
        load_backend("pytorch", bundle, device="cuda", memory_limit=1 << 31)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_more_than_the_memory_limit_is_an_error(bundle, zoo):
    try:
        with (
            load_backend("pytorch", bundle, device="cuda", memory_limit=64 << 20) as backend,
            pytest.raises(BackendError, match="out of memory"),
        ):
            backend.infer(np.zeros((1 << 22, 4, 4, 3), np.uint8))  # 200 MB before it becomes float
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("threads", [1, 4])
def test_a_fork_of_a_process_with_pytorchs_threads_is_an_error_and_does_not_hang(threads):
    """With one thread it has none that a fork could lose."""
    program = (
        "import os, signal, sys, numpy as np, torch\n"
        "from rkd_deploy.backends import RunOn\n"
        "from rkd_deploy.backends.pytorch import PyTorchBackend\n"
        "from rkd_deploy.errors import BackendError\n"
        "network, x = torch.nn.Conv2d(3, 64, 3), np.zeros((16, 3, 64, 64), np.float32)\n"
        "run_on = RunOn('pytorch', threads=int(sys.argv[1]))\n"
        "backend = PyTorchBackend(network, run_on, input_shape=(None, 3, 64, 64), input_dtype='float32')\n"
        "backend.infer(x)\n"
        "if child := os.fork():\n"
        "    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "signal.alarm(30)\n"
        "try:\n"
        "    backend.infer(x)\n"
        "except BackendError as error:\n"
        "    os._exit(3 if 'after the fork' in str(error) else 4)\n"
        "os._exit(0)\n"
    )
    assert subprocess.run([sys.executable, "-c", program, str(threads)]).returncode == (0 if threads == 1 else 3)


def test_shared_weights_are_the_modules_own_and_others_are_copies():
    module = nn.Sequential(nn.Flatten(), nn.Linear(3, 2)).train()
    x = np.ones((1, 3, 1, 1), np.float32)
    how = {"input_shape": (None, 3, 1, 1), "input_dtype": "float32"}
    with PyTorchBackend(module, **how) as copied, PyTorchBackend(module, **how, shared=True) as shared:
        before = copied.infer(x)
        np.testing.assert_array_equal(shared.infer(x), before)
        with torch.no_grad():
            module[1].bias += 1
        np.testing.assert_array_equal(copied.infer(x), before)
        np.testing.assert_allclose(shared.infer(x), before + 1, rtol=1e-6)
    assert module.training
