"""The two libraries of engines, on a simulated device."""

import pytest

from tests.support.engine_backends import FLAVOURS


@pytest.fixture(params=list(FLAVOURS))
def flavour(request, gpu):
    return request.param


@pytest.fixture
def model(zoo, tmp_path):
    return zoo.build(tmp_path / "model.onnx", card=zoo.card())
