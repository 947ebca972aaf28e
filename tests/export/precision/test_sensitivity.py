"""The fewest layers that must stay in float32: found by doubling and bisection, and the harmful one ranked first."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rkd_deploy.export.precision.int8 import Int8Quantiser, fewest_kept, sensitivities


@given(count=st.integers(1, 60), needed=st.integers(1, 80))
def test_the_shortest_beginning_that_passes_is_found_with_few_questions(count, needed):
    ranked, request = [str(number) for number in range(count)], []

    def passes(keep):
        request.append(tuple(keep))
        return len(keep) >= needed

    actual = fewest_kept(ranked, passes)
    assert list(actual) == ranked[: min(needed, count)]
    assert tuple(actual) in request
    assert len(request) == len(set(request)) <= 2 * np.log2(count) + 2


def test_the_layer_that_reads_the_uneven_map_does_the_most_harm(uneven):
    with Int8Quantiser(uneven.proto, uneven.calibration.images_NHWC, "tensorrt") as quantiser:
        actual = sensitivities(quantiser, quantiser.nodes, uneven.proto, uneven.calibration.images_NHWC, "onnxruntime")
    layers = {name for name, module in uneven.model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    assert set(actual) == layers
    first, second, *_ = sorted(actual, key=lambda name: -actual[name])
    assert first == "layer2.0.conv2"
    assert actual[first] > 10 * actual[second]
