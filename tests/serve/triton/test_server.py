"""The python backend in a real tritonserver gives the answers of golden.npz."""

from __future__ import annotations

import json
import subprocess

import numpy as np
import pytest

from rkd_deploy.serve.triton.repository import export_triton
from rkd_deploy.serve.triton.settings import Serving

pytestmark = pytest.mark.slow

NAME = "tiny-s-a"
LABELS = ("ant", "bee", "cat", "dog", "elk")
SERVING = Serving(backend="python", max_batch=8, preferred=(4, 8), queue_delay_us=20_000, threads=1, versions=2)


def same(answer, golden):
    np.testing.assert_allclose(answer, golden["logits"], rtol=0, atol=float(golden["tolerance"]))


@pytest.fixture
def golden(bundles):
    return [dict(np.load(bundle / "golden.npz")) for bundle in bundles]


def test_golden_logits_labels_batching_and_the_next_version(triton, bundles, golden, tmp_path):
    repository, x, y = tmp_path / "repository", tmp_path / "x.npy", tmp_path / "y.npz"
    export_triton(bundles[0], repository, SERVING)
    np.save(x, golden[0]["inputs"])
    with triton.server(repository, tmp_path / "log") as server:
        for how, address in (("ask", server.grpc), ("ask_http", server.http)):
            answer = json.loads(triton.client(how, address, NAME, "1", x, y))
            same(np.load(y)["logits"], golden[0])
            y.unlink()
            for row, logits in zip(answer["top3"], golden[0]["logits"], strict=True):
                best = np.argsort(-logits)[:3]
                assert [entry.split(":")[1:] for entry in row] == [[str(k), LABELS[k]] for k in best]
                np.testing.assert_allclose([float(entry.split(":")[0]) for entry in row], logits[best], atol=1e-4)

        photo = bundles[0] / "golden/photo.jpg"
        answer = json.loads(triton.client("photo", server.http, f"{NAME}-images", photo))
        expected = json.loads(photo.with_suffix(".json").read_text())
        np.testing.assert_allclose(answer, expected["logits"], atol=expected["tolerance"])
        x.write_bytes(b"no image")
        with pytest.raises(AssertionError, match="cannot be read as an image"):
            triton.client("photo", server.http, f"{NAME}-images", x)

        np.save(x, np.concatenate([golden[0]["inputs"]] * 4))
        ran = json.loads(triton.client("crowd", server.grpc, NAME, x, y))
        for part in np.split(np.load(y)["logits"], 4):  # each request got its own image's logits back
            same(part, golden[0])
        assert ran["images"] == 32
        assert ran["runs"] < 16  # joined; one by one they would be 32

        np.save(x, golden[0]["inputs"])
        command = [triton.python, triton.script, "follow", server.grpc, NAME, "2", x, y]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
            assert client.stdout.readline() == "following\n"
            assert export_triton(bundles[1], repository, SERVING).version == 2
            followed = json.loads(client.stdout.readline())
        answers = np.load(y)["logits"]
        assert followed["ready"], server.log.read_text()
        assert not followed["errors"]
        same(answers[0], golden[0])
        same(answers[-1], golden[1])
        with pytest.raises(AssertionError, match="Not equal to tolerance"):  # other weights are seen
            same(answers[-1], golden[0])
        triton.client("ask", server.grpc, NAME, "1", x, y)  # the version before it still answers who names it
        same(np.load(y)["logits"], golden[0])
