"""@huggingface/transformers answers the golden photo from what --format transformers-js writes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from rkd_deploy.export.transformers_js import export_transformers_js


@pytest.fixture(scope="module")
def folder(golden, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "landscapes"
    assert export_transformers_js(golden.bundle, folder).max_abs_diff < 1e-5
    return folder


def classify(script, *arguments):
    done = subprocess.run(
        ["node", script / "classify.js", "--json", *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line)["predictions"] for line in done.stdout.splitlines()]


def test_the_golden_photo_gets_its_class_and_its_probability(javascript, folder, golden):
    ((best, *others),) = classify(javascript("transformers.js"), folder, golden.photo)
    assert (best["label"], best["probability"]) == (golden.label, pytest.approx(golden.probability, abs=1e-3))
    assert len(others) == 4


def test_by_its_own_resize_it_gets_its_class(javascript, folder, golden):
    ((best, *_),) = classify(javascript("transformers.js"), "--as-is", folder, golden.photo)
    assert best["label"] == golden.label
    assert abs(best["probability"] - golden.probability) > 1e-3  # so the examples' limit does tell resizes apart
