"""The page that shows what A corrects: its numbers are those of the networks, its picture is there."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from rkd_deploy.cli import app
from rkd_deploy.train.explanation import explain
from rkd_deploy.train.networks import load_part


@pytest.fixture
def image(tiny_run):
    height, width = tiny_run.facts.image_size
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def test_maps_shares_and_answers_are_those_of_the_networks(tiny_run, image):
    explanation = explain(tiny_run, image)
    facts = tiny_run.facts
    x = (torch.from_numpy(image).permute(2, 0, 1)[None] / 255 - torch.tensor(facts.mean)[:, None, None]) / torch.tensor(
        facts.std
    )[:, None, None]
    T, model = load_part(tiny_run, "teacher"), load_part(tiny_run, "fused")
    with torch.inference_mode():
        f_T, z = T.features(x)[-1], model(x)
        s, a = model.student_map(x), model.assistant_map(x)
    if s.shape[-1] != f_T.shape[-1]:
        pytest.fail("the tiny run's maps are of one size")
    left = (f_T - s - a).square().mean() / f_T.square().mean()
    assert explanation.explained["S + A"] == pytest.approx(1 - left.item(), rel=1e-4)
    np.testing.assert_allclose(explanation.maps["P_A f_A"], a[0].square().mean(0).sqrt(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(explanation.maps["f_T"], f_T[0].square().mean(0).sqrt(), rtol=1e-4, atol=1e-5)
    label, probability = explanation.answers["S + A"][0]
    assert label == facts.classes[z.argmax()]
    assert probability == pytest.approx(z.softmax(1).max().item(), rel=1e-4)


def test_the_command_writes_a_page_that_opens_offline(tiny_run, image, tmp_path):
    Image.fromarray(image).save(tmp_path / "photo <1>.png")
    command = ["explain", str(tiny_run.folder), str(tmp_path / "photo <1>.png"), "--output", str(tmp_path / "p.html")]
    result = CliRunner().invoke(app, [*command, "--json"])
    assert result.exit_code == 0, result.output
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert page.count("data:image/png") == 6
    assert "photo &lt;1&gt;.png" in page
    assert "http:" not in page.replace("http://www.w3.org", "")
    assert "https:" not in page
    assert set(json.loads(result.stdout.splitlines()[-1])["answers"]) == {"T", "S alone", "S + A"}


def test_a_page_has_the_suffix_of_one(tiny_run, tmp_path):
    result = CliRunner().invoke(app, ["explain", str(tiny_run.folder), "x.png", "--output", str(tmp_path / "page")])
    assert result.exit_code != 0
    assert not list(tmp_path.iterdir())
