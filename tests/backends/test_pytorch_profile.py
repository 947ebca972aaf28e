"""Times of a program's operators on a GPU, from what PyTorch's profiler says of them."""

from types import SimpleNamespace

import pytest
import torch

from rkd_deploy.backends import load_backend
from rkd_deploy.backends.pytorch_profile import kernel_us


def event(name, kernels, *children):
    kernels = [SimpleNamespace(name=kernel, duration=duration) for kernel, duration in kernels]
    return SimpleNamespace(name=name, kernels=kernels, cpu_children=list(children))


def test_a_kernel_counts_once_though_the_annotation_spans_it():
    conv = event("aten::convolution", [("implicit_gemm", 5.0)], event("aten::add_", [("elementwise", 2.0)]))
    assert kernel_us(event("0 conv", [("0 conv", 9.0)], conv)) == 7.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_layer_times_on_cuda_add_up_to_no_more_than_the_run(bundle, zoo):
    with load_backend("pytorch", bundle, device="cuda") as backend:
        runs = backend.layer_runs(zoo.pixels(4), 3)
        assert len(runs) == 3
        assert all(layer.ms >= 0 for run in runs for layer in run)
        assert all(0 < sum(layer.ms for layer in run) < 5 for run in runs)
