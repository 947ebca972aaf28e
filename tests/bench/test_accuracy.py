import numpy as np
import pytest

from rkd_deploy.backends import load_backend
from rkd_deploy.bench.accuracy import predictions, top1
from rkd_deploy.errors import DataError


@pytest.mark.parametrize("batch", ["batch", 4])
def test_predictions_are_the_brightest_channels(zoo, tmp_path, batch):
    x = zoo.pixels(11)
    brightest = x.astype(int).sum((1, 2)).argmax(axis=1)
    with load_backend("onnxruntime", zoo.build(tmp_path / "m.onnx", batch=batch)) as backend:
        found = predictions(backend, (x[start : start + 5] for start in range(0, 11, 5)))
        np.testing.assert_array_equal(found, brightest)
        assert predictions(backend, []).shape == (0,)
    assert top1(found, brightest) == 100
    assert top1(found, (brightest + 1) % 3) == 0


def test_top1_is_in_percent():
    assert top1([1, 2, 3, 4], [1, 2, 3, 5]) == 75


@pytest.mark.parametrize(("predicted", "labels"), [([], []), ([1, 2], [1]), ([[1]], [1])])
def test_top1_needs_a_label_for_each(predicted, labels):
    with pytest.raises(DataError, match="one label for each"):
        top1(predicted, labels)
