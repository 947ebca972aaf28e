import dataclasses
from pathlib import Path

import numpy as np
import pytest

from rkd_deploy.backends import load_backend
from rkd_deploy.bench.accuracy import Accuracy, card_accuracy, labelled_images, predicted_classes, top1
from rkd_deploy.data.folders import scan_folder
from rkd_deploy.errors import DataError


@pytest.mark.parametrize("batch", ["batch", 4])
def test_predictions_are_the_brightest_channels(zoo, tmp_path, batch):
    x = zoo.pixels(11)
    brightest = x.astype(int).sum((1, 2)).argmax(axis=1)
    with load_backend("onnxruntime", zoo.build(tmp_path / "m.onnx", batch=batch)) as backend:
        predicted = predicted_classes(backend, (x[start : start + 5] for start in range(0, 11, 5)))
        np.testing.assert_array_equal(predicted, brightest)
        assert predicted_classes(backend, []).shape == (0,)
    assert top1(predicted, brightest) == 100
    assert top1(predicted, (brightest + 1) % 3) == 0


def test_top1_is_in_percent():
    assert top1([1, 2, 3, 4], [1, 2, 3, 5]) == 75


@pytest.mark.parametrize(("predicted", "labels"), [([], []), ([1, 2], [1]), ([[1]], [1])])
def test_top1_needs_a_label_for_each(predicted, labels):
    with pytest.raises(DataError, match="one label for each"):
        top1(predicted, labels)


def accuracy_of(zoo, file="model.onnx", sha256="s", **facts):
    return card_accuracy(zoo.card(**facts), Path(file), sha256)


METRICS = {"accuracy": 32.67, "split": "test", "images": 300}


def test_the_accuracy_of_a_lower_precision_is_its_own_and_not_the_trained_networks(zoo):
    facts = {"metrics": METRICS, "parity": {"n": 300}, "checksums": {"model.onnx": "s"}}
    assert accuracy_of(zoo, **facts) == Accuracy(32.67, 300, "card")
    lowered = accuracy_of(zoo, precision="int8", lowering={"test_top1": 33.0}, **facts)
    assert lowered == Accuracy(33.0, 300, "card")
    # Exported without test images: nobody judged these bytes.
    assert accuracy_of(zoo, precision="int8", lowering={"test_top1": None}, **facts) is None
    assert accuracy_of(zoo, precision="int8", **facts) is None


def test_the_accuracy_of_a_card_is_of_no_other_file(zoo):
    facts = {"metrics": METRICS, "checksums": {"model.onnx": "s"}}
    assert accuracy_of(zoo, sha256="changed", **facts) is None
    assert accuracy_of(zoo, "model.engine", **facts) is None
    assert accuracy_of(zoo, metrics=METRICS).top1 == 32.67  # the card inside the file has no checksums


@pytest.mark.parametrize("top1", [None, "33", True, float("nan")])
def test_an_accuracy_that_is_no_number_is_unknown(zoo, top1):
    card = dataclasses.replace(zoo.card(), metrics={"accuracy": top1})
    assert card_accuracy(card, Path("model.onnx"), "s") is None


def test_a_folders_images_are_those_of_training(tmp_path):
    """Hidden files, companions of a Mac and other kinds of file are no images; a split is named and not guessed."""
    for split in ("Training", "Testing"):
        for label in ("ant", "bee"):
            folder = tmp_path / split / label
            folder.mkdir(parents=True)
            for name in ("1.tiff", "2.gif", "._1.jpg", "3.avif", "4.txt"):
                (folder / name).write_bytes(b"")
    (tmp_path / "Testing" / "__MACOSX" / "ant").mkdir(parents=True)
    files, labels_N = labelled_images(tmp_path / "Testing", ["bee", "ant"])
    trained = scan_folder(tmp_path).splits["test"]
    assert [str(file) for file in files] == [trained.source.name(n) for n in range(4)]
    assert labels_N.tolist() == [1, 1, 0, 0]
    with pytest.raises(DataError, match=r"holds splits: Testing, Training\. Name one of them"):
        labelled_images(tmp_path, ["bee", "ant"])
    for file in files:
        file.unlink()
    with pytest.raises(DataError, match=r"holds no image, only 2 \.avif, 2 \.txt: files that end in \.jpg"):
        labelled_images(tmp_path / "Testing", ["bee", "ant"])
