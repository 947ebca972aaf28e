"""The example for Node.js answers the golden photo as the bundle does."""

from __future__ import annotations

import json
import subprocess

import pytest


def classify(folder, *arguments):
    command = ["node", folder / "classify.js", "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return done, [json.loads(line) for line in done.stdout.splitlines()]


def test_the_golden_photo_gets_its_class(javascript, golden):
    done, (answer,) = classify(javascript("node"), "--top", "2", golden.bundle, golden.photo)
    assert (done.returncode, done.stderr) == (0, "")
    best = answer["predictions"][0]
    assert best["label"] == golden.label
    assert best["probability"] == pytest.approx(golden.probability, abs=1e-3)
    assert len(answer["predictions"]) == 2


def test_a_file_that_is_no_image_is_named_and_the_others_are_classified(javascript, golden, tmp_path):
    text = tmp_path / "text.jpg"
    text.write_text("no image")
    done, answers = classify(javascript("node"), golden.bundle, text, golden.photo)
    assert done.returncode == 1
    assert f"{text} cannot be classified" in done.stderr
    assert [answer["image"] for answer in answers] == [str(golden.photo)]


def test_every_kind_of_file_is_decoded_as_pillow_decodes_it(javascript, golden, variants):
    done, answers = classify(javascript("node"), golden.bundle, *variants)
    assert done.returncode == 0, done.stderr
    for answer, (label, probability) in zip(answers, variants.values(), strict=True):
        assert answer["predictions"][0]["label"] == label
        assert answer["predictions"][0]["probability"] == pytest.approx(probability, abs=1e-5), answer["image"]
