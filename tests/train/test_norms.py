"""The fused norms of training, against the network's passes and against PyTorch."""

from __future__ import annotations

import copy
import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rkd_deploy.models.families.cifar_resnet import CifarResNet
from rkd_deploy.train import kernels, norms
from rkd_deploy.train.norms import BatchNormAddReLU, Sums, fused_passes

WRAPPERS = r"""
#include "cuda_on_cpu.h"
typedef uint4 V;
typedef const uint4 W;
typedef const float F;
%s
extern "C" void run_norm_statistics(int B, int T, W* x, float* s, int M, int C) {
    launch(norm_statistics, B, T, x, s, M, C);
}
extern "C" void run_norm_forward(int B, int T, W* x, W* z, V* y, F* s, F* w, F* b, float* m, float* v, float* u, F* e,
                                 int M, int C, int a, int r) {
    launch(norm_forward, B, T, x, z, y, s, w, b, m, v, u, e, M, C, a, r);
}
extern "C" void run_norm_backward_sums(int B, int T, W* d, W* y, W* x, F* u, float* s, int M, int C, int r) {
    launch(norm_backward_sums, B, T, d, y, x, u, s, M, C, r);
}
extern "C" void run_norm_backward(int B, int T, W* d, W* y, W* x, F* u, F* s, F* w, V* dx, V* dz, float* dw, float* db,
                                  int M, int C, int a, int r) {
    launch(norm_backward, B, T, d, y, x, u, s, w, dx, dz, dw, db, M, C, a, r);
}
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The very source that NVRTC gets, compiled for a CPU."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ here: the kernels cannot be run on this CPU")
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "kernels.cpp").write_text(WRAPPERS % kernels.SOURCE)
    support = Path(__file__).parents[1] / "support"
    command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", "-pthread", f"-I{support}", "kernels.cpp", "-o", "k.so"]
    subprocess.run(command, cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "k.so"))

    def kernel(name: str) -> Any:
        function = getattr(library, f"run_{name}")

        def run(grid: tuple[int, int, int], block: tuple[int, int, int], args: list[Tensor | int]) -> None:
            values = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_int(a) for a in args]
            function(ctypes.c_int(min(grid[0], 3)), ctypes.c_int(block[0]), *values)

        return run

    return kernel


@pytest.mark.parametrize("shape", [(4, 16, 8, 8), (3, 24, 5, 7), (1, 2048, 2, 2), (2, 264, 3, 2), (1, 8, 2, 3)])
@pytest.mark.parametrize("how", ["norm", "relu", "add"])
def test_the_kernels_are_batch_norm(
    compiled: Any, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int, int], how: str
) -> None:
    """Maps, statistics and all gradients against float64, to the rounding of bfloat16."""
    monkeypatch.setattr(kernels, "_kernel", compiled)
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(shape[1])
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.uniform_(norm.bias, -0.5, 0.5)
    exact = copy.deepcopy(norm).double()
    x, z, dy = (
        (2 * torch.randn(shape) + mean).bfloat16().contiguous(memory_format=torch.channels_last) for mean in (3, 0, 0)
    )
    x_, z_ = x.requires_grad_(), z.requires_grad_()
    layer = BatchNormAddReLU(norm, relu=how != "norm")
    layer.sums = Sums(0, torch.device("cpu"))
    added = z_ if how == "add" else None
    y = norms._Fused.apply(x_, added, norm.weight, norm.bias, layer)
    y.backward(dy)

    X, Z = x.detach().double().requires_grad_(), z.detach().double().requires_grad_()
    Y = exact(X) + (Z if how == "add" else 0)
    if how != "norm":
        Y = Y * (y > 0)  # where rounding decides the sign, the kernels' gradient goes by their own y
    Y.backward(dy.double())
    close(y, Y, 4e-3)
    close(x_.grad, X.grad, 4e-3)
    close(norm.weight.grad, exact.weight.grad, 1e-5)
    close(norm.bias.grad, exact.bias.grad, 1e-5)
    close(norm.running_mean, exact.running_mean, 1e-5)
    close(norm.running_var, exact.running_var, 1e-5)
    if how == "add":
        close(z_.grad, Z.grad, 4e-3)


def close(ours: Tensor | None, exact: Tensor | None, limit: float) -> None:
    assert ours is not None
    assert exact is not None
    assert float((ours.detach().double() - exact.detach()).norm() / exact.detach().norm()) < limit


def test_rewritten_passes_are_the_networks_own() -> None:
    """On a CPU to the bit: maps, gradients, statistics; and every batch norm was taken up."""
    torch.manual_seed(0)
    network = CifarResNet(14, (8, 8, 16, 16), None)
    other = copy.deepcopy(network)
    passes = fused_passes(network)
    assert passes is not None
    layers = [module for module in passes.modules() if isinstance(module, BatchNormAddReLU)]
    assert len(layers) == sum(isinstance(module, nn.BatchNorm2d) for module in network.modules()) == 15
    assert sum(layer.relu for layer in layers) == 13  # but those of the two projections
    x_NCHW = torch.randn(4, 3, 16, 16)
    for maps, net in ((passes(x_NCHW), network), (other.features(x_NCHW), other)):
        sum(value.square().mean() for value in maps).backward()
        assert net.training
    for (name, value), wanted in zip(network.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, wanted), name
    for (name, parameter), twin in zip(network.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter.grad, twin.grad), name  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_fused_norms_are_the_plain_ones() -> None:
    torch.manual_seed(0)
    network = CifarResNet(8, (16, 16, 32, 64), None).cuda().to(memory_format=torch.channels_last)
    other = copy.deepcopy(network)
    passes = fused_passes(network)
    assert passes is not None
    for layer in passes.modules():
        if isinstance(layer, BatchNormAddReLU):
            layer.sums = Sums(0, torch.device("cuda"))
    x_NCHW = torch.randn(64, 3, 32, 32, device="cuda").contiguous(memory_format=torch.channels_last)
    with torch.autocast("cuda", torch.bfloat16):
        maps, wanted = passes(x_NCHW), other.features(x_NCHW)
    for ours, theirs in zip(maps, wanted, strict=True):
        close(ours, theirs.double(), 0.02)
    sum(value.square().mean() for value in maps).backward()
    sum(value.square().mean() for value in wanted).backward()
    for parameter, twin in zip(network.parameters(), other.parameters(), strict=True):
        close(parameter.grad, twin.grad.double(), 0.1)  # type: ignore[union-attr]
