"""Ranges of least squared error: published optima of 8-bit clipping, and what a real graph's activations get."""

import numpy as np
import pytest
import torch

from rkd_deploy.export.precision.int8 import best_range, best_ranges

SHARES = (np.arange(1_000_000) + 0.5) / 1_000_000


@pytest.mark.parametrize(
    ("values", "end", "clip"),
    [
        # Banner, Nahshan, Soudry, "Post training 4-bit quantization of convolutional networks", 2019, for 8 bits: 3.92
        # standard deviations of a normal distribution, 9.89 scales of a Laplace distribution.
        (torch.special.ndtri(torch.from_numpy(SHARES)).numpy(), 5.0, 3.92),
        (-np.sign(SHARES - 0.5) * np.log(1 - 2 * np.abs(SHARES - 0.5)), 15.0, 9.89),
    ],
    ids=["normal", "laplace"],
)
def test_the_published_optimum_of_8_bits(values, end, clip):
    lo, hi = best_range(values, (-end, end), symmetric=True)
    assert hi == -lo == pytest.approx(clip, abs=0.08 * clip)  # the error is flat there, and a goes in steps of 2 %


def test_evenly_spread_values_are_not_clipped():
    x = np.linspace(-1, 3, 4001)
    assert best_range(x, (-1.0, 3.0), symmetric=False) == (-1.0, 3.0)
    assert best_range(x, (-1.0, 3.0), symmetric=True) == (-3.0, 3.0)


def test_one_outlier_in_a_million_does_not_widen_the_steps():
    # E = hi^2 / (12 * 255^2) + (1.5 - hi)^2 / 10^6 still falls at hi = 1, and below that whole parts are cut off.
    lo, hi = best_range(np.append(SHARES, 1.5), (0.0, 1.5), symmetric=False)
    assert lo == 0
    assert 0.98 <= hi <= 1.03


def test_a_tensor_of_zeros_has_an_empty_range():
    assert best_range(np.zeros(100), (0.0, 0.0), symmetric=True) == (0.0, 0.0)


def test_activations_of_a_graph_get_ranges_with_0_inside(trained):
    x = trained.calibration.images_NHWC[:32]
    kinds = {node.output[0]: node.op_type for node in trained.proto.graph.node}
    for symmetric in (False, True):
        actual = best_ranges(trained.proto, [*kinds, "input"], x, symmetric=symmetric)
        assert "input" not in actual  # uint8
        assert {name for name, kind in kinds.items() if kind in ("Conv", "Relu", "Gemm")} <= set(actual)
        assert all(lo <= 0 <= hi for lo, hi in actual.values())
        if symmetric:
            assert all(lo == -hi for lo, hi in actual.values())
        else:
            assert {actual[name][0] for name, kind in kinds.items() if kind == "Relu"} == {0.0}
    logits = trained.logits(x)
    assert actual["logits"][1] <= np.abs(logits).max() * (1 + 1e-5)
