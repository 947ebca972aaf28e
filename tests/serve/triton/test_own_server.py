"""NVIDIA's client, unmodified, asks our server: JSON, binary, encoded images, asyncio."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytestmark = pytest.mark.slow


def test_tritonclients_http_client_works_as_it_is(triton, server, photo_bundle, expected, tmp_path):
    golden = np.load(photo_bundle / "golden.npz")
    np.save(tmp_path / "x.npy", golden["inputs"])
    place = server.address.removeprefix("http://")
    photo = photo_bundle / "golden/photo.jpg"
    answers = json.loads(triton.client("everything", place, "tiny-s-a", photo, tmp_path / "x.npy"))
    assert answers["live"]
    assert answers["ready"] == [True, True, False]
    assert (answers["server"], answers["model"]) == ("rkd-deploy", "tiny-s-a")
    for answer in (answers["binary"], answers["json"], *answers["many"], *answers["asyncio"]):
        np.testing.assert_allclose(answer, golden["logits"], atol=1e-4)
    np.testing.assert_allclose(answers["photo"], [expected["logits"]] * 2, atol=expected["tolerance"])
    np.testing.assert_allclose(answers["usual outputs"], np.ones(8), atol=1e-5)
    best = np.argsort(-golden["logits"], axis=1)[:, :3]
    assert [[text.split(":")[1] for text in row] for row in answers["top3"]] == best.astype(str).tolist()
    assert "it must be [N, 8, 8, 3]" in answers["refusal"]
