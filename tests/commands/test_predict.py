"""predict on files, folders, globs and standard input: every image has its line, and what cannot be read is told."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from rkd_deploy.serve import bulk


@pytest.fixture
def photos(tmp_path, zoo):
    """Forty images of 4 x 4 in two folders, and their pixels by name."""
    images = {}
    for number, x in enumerate(zoo.pixels(40)):
        path = tmp_path / "photos" / ("left", "right")[number % 2] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x).save(path)
        images[f"photos/{path.parent.name}/{path.name}"] = x
    return dict(sorted(images.items()))


def expected(zoo, x):
    """The classes of an image, best first, with their probabilities, computed apart."""
    logits = zoo.answer(x[None])[0].astype(np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum()
    return [(("red", "green", "blue")[index], probabilities[index]) for index in np.argsort(-probabilities)]


def test_a_folder_becomes_a_csv_and_lines_of_json(rkd, bundle, photos, tmp_path, zoo):
    ended = rkd("predict", bundle, "photos", "--csv", "out/a.csv", "--jsonl", "a.jsonl", "--top", 2)
    assert (ended.code, ended.out) == (0, "")
    rows = list(csv.DictReader((tmp_path / "out/a.csv").read_text().splitlines()))
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [row["image"] for row in rows] == [line["image"] for line in lines] == list(photos)
    assert list(rows[0]) == ["image", "label_1", "probability_1", "label_2", "probability_2"]
    for row, line in zip(rows, lines, strict=True):
        best = expected(zoo, photos[row["image"]])[:2]
        assert [guess["label"] for guess in line["predictions"]] == [label for label, _ in best]
        assert [guess["probability"] for guess in line["predictions"]] == pytest.approx([p for _, p in best], rel=1e-5)
        assert (row["label_1"], float(row["probability_2"])) == (best[0][0], pytest.approx(best[1][1], rel=1e-4))


def test_globs_folders_and_files_are_mixed_in_their_order(rkd, bundle, photos, tmp_path):
    (tmp_path / "photos/left/notes.txt").write_text("no image")
    ended = rkd("predict", bundle, "photos/**/*3.png", "photos/left", "photos/right/01.png", "--jsonl", "-")
    names = [json.loads(line)["image"] for line in ended.out.splitlines()]
    threes = [name for name in photos if name.endswith("3.png")]
    assert names == [*threes, *(name for name in photos if "left" in name), "photos/right/01.png"]
    assert "left out: 1 .txt" in ended.err
    assert ended.code == 0


def test_a_file_with_the_signs_of_a_glob_is_that_file(rkd, bundle, tmp_path, zoo):
    for name in ("a[1].png", "a1.png"):
        Image.fromarray(zoo.pixels(1)[0]).save(tmp_path / name)
    assert list(rkd("predict", bundle, "a[1].png", "--json").json["predictions"]) == ["a[1].png"]


def test_what_cannot_be_read_is_listed_and_all_else_is_written(rkd, bundle, photos, tmp_path):
    broken = tmp_path / "photos/left/18.png"
    broken.write_bytes(broken.read_bytes()[:40])
    (tmp_path / "empty").mkdir()
    arguments = ("photos", "empty", "*.webp", "missing.jpg", "--csv", "a.csv", "--json")
    ended = rkd("predict", bundle, *arguments)
    assert ended.code == 1
    written = [row["image"] for row in csv.DictReader((tmp_path / "a.csv").read_text().splitlines())]
    assert written == list(ended.json["predictions"]) == [name for name in photos if name != "photos/left/18.png"]
    messages = ended.json["unreadable"]
    assert len(messages) == 4
    for beginning in ("photos/left/18.png cannot", "empty is a folder", "*.webp matches no image", "missing.jpg"):
        (message,) = [line for line in messages if line.startswith(beginning)]
        assert message in ended.err
    assert ended.json["exit_code"] == 1
    assert "4 could not be read" in ended.err


def test_the_only_image_says_by_itself_why_it_cannot_be_read(rkd, bundle):
    ended = rkd("predict", bundle, "missing.jpg")
    assert ended.code == 1
    assert ended.err.startswith("Error: missing.jpg")
    assert len(ended.err.splitlines()) == 1


def test_standard_input_is_an_image(bundle, tmp_path, zoo):
    x = zoo.pixels(1)[0]
    content = io.BytesIO()
    Image.fromarray(x).save(content, "PNG")
    command = [sys.executable, "-m", "rkd_deploy.cli", "predict", bundle, "-", "--json"]
    ended = subprocess.run(command, input=content.getvalue(), capture_output=True, check=True, timeout=60)
    best = json.loads(ended.stdout.splitlines()[-1])["predictions"]["-"]
    assert [guess["label"] for guess in best] == [label for label, _ in expected(zoo, x)]
    for refused, why in ((b"", b"standard input is empty"), (b"text", b"standard input cannot be read as an image")):
        ended = subprocess.run(command, input=refused, capture_output=True, timeout=60, check=False)
        assert ended.returncode == 1
        assert why in ended.stderr


def test_few_images_are_decoded_ahead(bundle, photos, monkeypatch, tmp_path):
    """However many are asked for, two batches are in memory."""
    from rkd_deploy.serve.classifier import load

    monkeypatch.chdir(tmp_path)
    read, most = [], 0
    monkeypatch.setattr(bulk, "BULK_BATCH", 4)
    monkeypatch.setattr(bulk, "to_array", lambda name, rule: read.append(name) or photos[name])
    with load(bundle) as classifier:
        for count, image in enumerate(bulk.classify_all(classifier, list(photos)), 1):
            most = max(most, len(read) - count)
            assert image.name == list(photos)[count - 1]
    assert sorted(read) == list(photos)
    assert most < 8


def test_nothing_is_written_where_the_model_fails(rkd, bundle, photos, tmp_path, monkeypatch):
    ended = rkd("predict", bundle, "photos", "--csv", "a.csv", "--top", 0)
    assert ended.code == 2
    assert not list(tmp_path.glob("*a.csv*"))


def test_standard_output_holds_one_thing(rkd, bundle):
    ended = rkd("predict", bundle, "x.png", "--csv", "-", "--json")
    assert ended.code == 2
    assert "Standard output is asked for twice" in ended.err
