"""What PyTorch is set to on CUDA, as far as that can be seen without a GPU."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from rkd_deploy.backends import RunOn, load_backend
from rkd_deploy.backends.pytorch import GraphedPyTorchBackend, PyTorchBackend
from rkd_deploy.backends.pytorch_cuda import exact_float32
from rkd_deploy.bench.parity import compare_logits

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def settings():
    return (
        torch.backends.cudnn.conv.fp32_precision,
        torch.backends.cudnn.rnn.fp32_precision,
        torch.backends.cuda.matmul.fp32_precision,
    )


@pytest.fixture(params=["as PyTorch comes", "older interface", "newer interface", "exact already"])
def before(request):
    """TF32 as a user may have set it; put back afterwards."""
    allowed = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    if request.param == "older interface":
        torch.backends.cuda.matmul.allow_tf32 = True
    elif request.param == "newer interface":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        torch.backends.cudnn.rnn.fp32_precision = "ieee"
    elif request.param == "exact already":
        torch.backends.cudnn.allow_tf32 = False
    yield settings()
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = allowed


def test_float32_is_exact_inside_and_as_it_was_afterwards(before):
    with exact_float32:
        assert "tf32" not in settings()
        with exact_float32:
            assert "tf32" not in settings()
        assert "tf32" not in settings()
        assert torch.backends.cuda.matmul.allow_tf32 is False  # both of PyTorch's interfaces agree
    assert settings() == before


def test_it_stays_exact_until_the_last_thread_has_left(before):
    def run(_):
        with exact_float32:
            return "tf32" in settings()

    with exact_float32, ThreadPoolExecutor(4) as pool:
        assert not any(pool.map(run, range(200)))
        assert "tf32" not in settings()
    assert settings() == before


@pytest.mark.gpu
@on_cuda
@pytest.mark.parametrize("name", ["pytorch", "pytorch:cuda-graphs"])
def test_float32_on_cuda_is_the_cpus_to_1e_4(name):
    """With TF32 the logits differ in the third digit."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 64, 3),
        torch.nn.ReLU(),
        torch.nn.Conv2d(64, 64, 3),
        torch.nn.Flatten(),
        torch.nn.Linear(9216, 10),
    )
    shape = {"input_shape": (None, 3, 16, 16), "input_dtype": "float32"}
    x = np.random.default_rng(0).standard_normal((8, 3, 16, 16), dtype=np.float32)
    kinds = {"pytorch": PyTorchBackend, "pytorch:cuda-graphs": GraphedPyTorchBackend}
    with (
        PyTorchBackend(network, **shape) as cpu,
        kinds[name](network, RunOn(name, device="cuda"), **shape) as cuda,
    ):
        assert compare_logits(cpu.infer(x), cuda.infer(x), 1e-4).passed
        assert compare_logits(cpu.infer(x), cuda.infer(x), 1e-4).passed


@pytest.mark.gpu
@on_cuda
def test_two_backends_have_two_streams(bundle):
    with (
        load_backend("pytorch", bundle, device="cuda") as first,
        load_backend("pytorch", bundle, device="cuda") as second,
    ):
        assert first._stream.cuda_stream != second._stream.cuda_stream
