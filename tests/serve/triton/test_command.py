"""`rkd-deploy export --format triton` as a person and as a script use it."""

from __future__ import annotations

import json
import shutil

import pytest
from typer.testing import CliRunner

from rkd_deploy.cli import app


def export(*arguments):
    result = CliRunner().invoke(app, ["export", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_a_run_becomes_a_bundle_and_a_repository_beside_it(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run.folder, tmp_path / "run")
    options = ("--triton-backend", "python", "--max-batch", "16", "--preferred-batch", "4,16", "--queue-delay", "100")
    result = export(run, "--format", "triton", "--random-images", *options, "--threads", "1", "--json")
    facts = json.loads(result.stdout.splitlines()[-1])
    repository, bundle = run / "triton", run / "bundle"
    assert facts["bundle"] == str(bundle)
    assert facts["triton"] == {
        "repository": str(repository),
        "service": str(repository / "tiny-s-a.kserve.yaml"),
        "name": "tiny-s-a",
        "version": 1,
        "kept": [],
    }
    assert "tritonserver --model-repository=" in result.stderr
    assert "replace s3://BUCKET/PATH" in result.stderr
    config = (repository / "tiny-s-a/config.pbtxt").read_text()
    for line in ("[ 4, 16 ]", "microseconds: 100", "max_batch_size: 16", "intra_op_thread_count"):
        assert line in config


def test_a_bundle_that_stands_in_the_run_is_taken_as_it_is(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run.folder, tmp_path / "run")
    bundle = json.loads(export(run, "--json").stdout.splitlines()[-1])["bundle"]
    before = {path: path.read_bytes() for path in (run / "bundle").rglob("*") if path.is_file()}
    facts = json.loads(export(run, "--format", "triton", "--threads", "1", "--json").stdout.splitlines()[-1])
    assert (facts["bundle"], facts["reused"], facts["triton"]["version"]) == (bundle, True, 1)
    assert {path: path.read_bytes() for path in (run / "bundle").rglob("*") if path.is_file()} == before
    other = json.loads(export(run, "--format", "triton", "--part", "s0", "--json").stdout.splitlines()[-1])
    assert other["bundle"] == str(run / "bundle-s0")  # another network is another bundle
    with (run / "bundle/labels.txt").open("a") as labels:
        labels.write("x")
    again = json.loads(export(run, "--format", "triton", "--config", "keep", "--json").stdout.splitlines()[-1])
    assert again["bundle"] == str(run / "bundle-2")  # what was changed is not taken


def test_a_bundle_becomes_the_next_version(bundles, tmp_path):
    options = ("--format", "triton", "--repository", tmp_path / "models", "--model-name", "tiny", "--json")
    options += ("--instances", "cpu:2", "--serve-versions", "all", "--storage-uri", "s3://bucket/models")
    for version, bundle in enumerate(bundles, start=1):
        result = export(bundle, *options)
        assert json.loads(result.stdout.splitlines()[-1])["triton"]["version"] == version
        assert "replace" not in result.stderr
    assert {path.name for path in (tmp_path / "models/tiny").iterdir()} == {"1", "2", "config.pbtxt", "labels.txt"}
    config = (tmp_path / "models/tiny/config.pbtxt").read_text()
    assert "count: 2\n" in config
    assert "version_policy: { all: {} }" in config
    keeping = export(bundles[0], *options[:-2], "--config", "keep")
    assert json.loads(keeping.stdout.splitlines()[-1])["triton"]["kept"] == [str(tmp_path / "models/tiny.kserve.yaml")]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            ("--format", "onnx", "--max-batch", "8"),
            "--format onnx writes no model repository.*--max-batch",
        ),
        (("--format", "onnx", "--repository", "r"), "has no use for --repository"),
        (("--format", "triton", "--tf32"), "--format triton builds no engine"),
        (("--format", "triton", "--fuse", "sum"), "exported already is what it is, and has no use for --fuse"),
        (("--format", "triton", "--output", "o"), "has no use for --output"),
        (("--format", "triton", "--preferred-batch", "8;16"), "must be whole numbers"),
        (("--format", "triton", "--serve-versions", "1,2"), "--serve-versions '1,2' must be a number or all"),
        (("--format", "triton", "--instances", "2"), "--instances '2' must be cpu or gpu"),
    ],
)
def test_options_without_an_effect_are_refused(bundles, tmp_path, monkeypatch, options, reason):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception, match=reason) as refused:
        export(bundles[0], *options)
    assert refused.value.exit_code == 2
    assert not list(tmp_path.iterdir())


def test_a_plan_of_a_run_is_refused_before_anything_is_exported(tiny_run):
    before = set(tiny_run.folder.iterdir())
    with pytest.raises(Exception, match="Build it first, with --format tensorrt"):
        export(tiny_run.folder, "--format", "triton", "--triton-backend", "tensorrt")
    assert set(tiny_run.folder.iterdir()) == before
