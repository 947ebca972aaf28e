"""The golden photo: each way to get the pre-processing wrong changes what the model sees of it, and its answer."""

import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from rkd_deploy.backends.files import check_files, with_checksums
from rkd_deploy.bench.parity import verify
from rkd_deploy.card import ModelCard, Preprocess
from rkd_deploy.errors import DataError, ModelFileError
from rkd_deploy.export.bundle import export_bundle
from rkd_deploy.export.proving import draw_photo


def rule(size, **options):
    return Preprocess(height=size, width=size, mean=(0.5,) * 3, std=(0.25,) * 3, **options)


@pytest.mark.parametrize(("size", "crop"), [(8, 1.0), (32, 1.0), (224, 0.875), (256, 1.0)])
def test_it_is_a_small_jpeg_not_square_and_larger_than_the_input(size, crop):
    content = draw_photo(rule(size, crop_fraction=crop))
    assert len(content) < 60_000
    assert content == draw_photo(rule(size, crop_fraction=crop))
    photo = Image.open(io.BytesIO(content))
    assert photo.format == "JPEG"
    assert photo.width > photo.height > size / crop


def test_what_people_get_wrong_is_seen_in_its_pixels():
    """By more than a tenth of the range in 1 of 20 values: by far more than decoders differ."""
    photo = Image.open(io.BytesIO(draw_photo(rule(224, crop_fraction=0.875))))
    scale = 256 / photo.height
    whole = photo.resize((int(photo.width * scale), 256), Image.Resampling.BILINEAR)
    left = round((whole.width - 224) / 2)
    right = np.asarray(whole.crop((left, 16, left + 224, 240)), int)
    nearest = photo.resize(whole.size, Image.Resampling.NEAREST).crop((left, 16, left + 224, 240))
    wrongs = {
        "colours swapped": right[..., ::-1],
        "squashed, not cropped": np.asarray(photo.resize((224, 224)), int),
        "cropped at a corner": np.asarray(whole.crop((0, 0, 224, 224)), int),
        "mirrored": right[:, ::-1],
        "upside down": right[::-1],
        "no antialiasing": np.asarray(nearest, int),
    }
    for name, wrong in wrongs.items():
        assert np.mean(np.abs(wrong - right) > 25) > 0.05, name


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tiny_run):
    from rkd_deploy.pipeline import export_run

    return export_run(tiny_run, test_images=False, folder=tmp_path_factory.mktemp("photo") / "bundle").folder


def test_its_logits_are_pytorchs_for_the_photo_as_torchvision_prepares_it(model, card, tmp_path):
    from torchvision.transforms import v2

    export_bundle(model, card, tmp_path / "bundle")
    photo = Image.open(tmp_path / "bundle/golden/photo.jpg")
    steps = [v2.Resize(8), v2.CenterCrop(8), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    x = v2.Compose([*steps, v2.Normalize(card.preprocess.mean, card.preprocess.std)])(photo)
    with torch.no_grad():
        logits = model(x[None])[0]
    answer = json.loads((tmp_path / "bundle/golden/photo.json").read_text())
    np.testing.assert_allclose(answer["logits"], logits, atol=1e-4)
    assert answer["label"] == card.labels[answer["index"]] == card.labels[int(logits.argmax())]
    assert answer["probability"] == pytest.approx(float(logits.softmax(0).max()), abs=1e-5)
    assert answer["tolerance"] == 1e-4


def test_verify_runs_it_and_says_no_to_another_answer(exported, tmp_path):
    assert verify(exported).n == 9
    folder = shutil.copytree(exported, tmp_path / "bundle")
    answer = json.loads((folder / "golden/photo.json").read_text())
    answer["logits"][0] += 0.01
    (folder / "golden/photo.json").write_text(json.dumps(answer))
    with pytest.raises(ModelFileError, match=r"golden/photo\.json changed"):
        verify(folder)
    reseal(folder)
    parity = verify(folder)
    assert not parity.passed
    assert parity.max_abs_diff == pytest.approx(0.01, rel=1e-2)


def test_verify_says_no_where_pre_processing_is_another(exported, tmp_path):
    """The graph is intact and its golden.npz passes: only the photo shows that the card's rule was changed."""
    folder = shutil.copytree(exported, tmp_path / "bundle")
    card = ModelCard.from_json((folder / "model.json").read_text(), "model.json")
    wrong = replace(card, preprocess=replace(card.preprocess, interpolation="nearest"))
    import onnx

    from rkd_deploy.export.graph import append_card

    proto = onnx.load(folder / "model.onnx")
    del proto.metadata_props[:]
    onnx.save(proto, folder / "model.onnx")
    append_card(folder / "model.onnx", wrong)
    reseal(folder, wrong)
    assert not verify(folder).passed
    shutil.rmtree(folder / "golden")
    reseal(folder, wrong)
    assert verify(folder).passed


def test_bundles_of_before_have_none(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "bundle")
    shutil.rmtree(folder / "golden")
    with pytest.raises(ModelFileError, match=r"golden/photo\.jpg.* missing"):
        verify(folder)
    reseal(folder)
    assert verify(folder).n == 8
    assert set(check_files(folder, complete=True)) == {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("content", ["{}", '{"logits": [1, 2]}', "[", '{"logits": "x"}'])
def test_an_answer_that_is_none_is_refused(exported, tmp_path, content):
    folder = shutil.copytree(exported, tmp_path / "bundle")
    (folder / "golden/photo.json").write_text(content)
    reseal(folder)
    with pytest.raises(ModelFileError, match=r"photo\.json cannot be read"):
        verify(folder)


def test_a_photo_that_is_none_and_logits_of_other_classes_are_refused(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "bundle")
    answer = json.loads((folder / "golden/photo.json").read_text())
    (folder / "golden/photo.json").write_text(json.dumps(answer | {"logits": answer["logits"][:3]}))
    reseal(folder)
    with pytest.raises(ModelFileError, match="do not belong together"):
        verify(folder)
    (folder / "golden/photo.jpg").write_bytes(b"no image")
    reseal(folder)
    with pytest.raises(DataError, match=r"photo\.jpg"):
        verify(folder)


def reseal(folder, card=None):
    text = (folder / "model.json").read_text()
    card = card or ModelCard.from_json(text, "model.json")
    (folder / "model.json").write_text(with_checksums(card, folder))
