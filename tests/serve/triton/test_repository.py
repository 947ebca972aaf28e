"""What a model repository is made of, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml

from rkd_deploy.errors import BackendError, ModelFileError, StorageError, UsageError
from rkd_deploy.serve.triton import repository as repository_module
from rkd_deploy.serve.triton.repository import export_triton
from rkd_deploy.serve.triton.settings import Serving
from tests.support.repositories import NAME, files, save

LABELS = "ant\nbee\ncat\ndog\nelk\n"


MODULES = ("__init__", "card", "decoding", "errors", "fields", "image_folders", "images", "storage")


def pixels(version):
    """The files of a version that prepares images."""
    modules = (f"{version}/rkd_deploy/{module}.py" for module in MODULES)
    return {f"{version}/model.py", f"{version}/model.json", *modules}


def test_a_new_model(bundles, tmp_path):
    written = export_triton(bundles[0], tmp_path / "models")
    assert (written.name, written.version, written.unchanged) == (NAME, 1, ())
    contents = files(tmp_path / "models")
    assert set(contents) == {
        f"{NAME}.kserve.yaml",
        *(f"{NAME}/{file}" for file in ("config.pbtxt", "labels.txt", "1/model.onnx")),
        *(f"{NAME}-pixels/{file}" for file in ("config.pbtxt", *pixels(1))),
        *(f"{NAME}-images/{file}" for file in ("config.pbtxt", "labels.txt", "1/keep.txt")),
    }
    assert contents[f"{NAME}/1/model.onnx"] == (bundles[0] / "model.onnx").read_bytes()
    assert contents[f"{NAME}/labels.txt"].decode() == LABELS


def test_the_next_version_stands_beside_the_old_one(bundles, tmp_path):
    export_triton(bundles[0], tmp_path)
    before = files(tmp_path)
    assert export_triton(bundles[1], tmp_path).version == 2
    after = files(tmp_path)
    assert {path: after[path] for path in before} == before
    assert set(after) - set(before) == {f"{NAME}/2/model.onnx", *(f"{NAME}-pixels/{file}" for file in pixels(2))}
    shutil.rmtree(tmp_path / NAME / "1")  # retired by hand: its number is not given again
    assert export_triton(bundles[0], tmp_path).version == 3


def test_configuration_that_differs_is_replaced_or_kept_as_asked(bundles, tmp_path):
    export_triton(bundles[0], tmp_path)
    config, service = tmp_path / NAME / "config.pbtxt", tmp_path / f"{NAME}.kserve.yaml"
    config.write_text(config.read_text() + "# tuned by hand\n")
    before = files(tmp_path)
    with pytest.raises(UsageError, match=r"(?s)config.pbtxt stands there already.*-# tuned by hand.*--config keep"):
        export_triton(bundles[1], tmp_path)
    assert files(tmp_path) == before
    unreplaced = export_triton(bundles[1], tmp_path, Serving(config="keep", storage_uri="s3://b/m"))
    assert (unreplaced.version, unreplaced.unchanged) == (2, (config, service))
    assert config.read_bytes() == before[f"{NAME}/config.pbtxt"]
    assert service.read_bytes() == before[f"{NAME}.kserve.yaml"]
    replaced = export_triton(bundles[1], tmp_path, Serving(config="replace", max_batch=4, preferred=(2,)))
    assert (replaced.version, replaced.unchanged) == (3, ())
    assert "max_batch_size: 4\n" in config.read_text()


@pytest.mark.parametrize(("changed", "what"), [("other backend", "backend"), ("labels", "labels")])
def test_another_model_is_no_next_version(bundles, tmp_path, changed, what):
    export_triton(bundles[0], tmp_path)
    serving = Serving(config="replace")
    if changed == "labels":
        (tmp_path / NAME / "labels.txt").write_text(LABELS.replace("ant", "auk"))
    else:
        serving = Serving(config="replace", backend="python")
    before = files(tmp_path)
    with pytest.raises(UsageError, match=f"other {what}.*--model-name"):
        export_triton(bundles[1], tmp_path, serving)
    assert files(tmp_path) == before
    assert export_triton(bundles[1], tmp_path, Serving(name="another")).version == 1


def test_a_folder_of_something_else_is_left_alone(bundles, tmp_path):
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "diary.txt").write_text("mine")
    with pytest.raises(StorageError, match="holds no model with a version"):
        export_triton(bundles[0], tmp_path)
    assert set(files(tmp_path)) == {f"{NAME}/diary.txt"}


@pytest.mark.parametrize("version", [1, 2])
def test_nothing_is_left_where_writing_fails(bundles, tmp_path, monkeypatch, version):
    if version == 2:
        export_triton(bundles[0], tmp_path)
    before = files(tmp_path)

    def full(path, content):
        raise StorageError(f"{path}: no space left")

    monkeypatch.setattr(repository_module, "write_bytes", full)
    with pytest.raises(StorageError, match="no space left"):
        export_triton(bundles[1], tmp_path)
    assert files(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == (
        {NAME, f"{NAME}-pixels", f"{NAME}-images", f"{NAME}.kserve.yaml"} if version == 2 else set()
    )
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("name", ["config.pbtxt", "labels.txt"])
@pytest.mark.parametrize("kind", ["a pipe", "a device", "no text"])
def test_what_stands_in_a_repository_and_is_no_file_is_said(bundles, tmp_path, name, kind):
    export_triton(bundles[0], tmp_path)
    file = tmp_path / NAME / name
    file.unlink()
    if kind == "a pipe":
        os.mkfifo(file)
    elif kind == "a device":
        file.symlink_to("/dev/zero")
    else:
        file.write_bytes(b"\xff\xfe")
    with pytest.raises(StorageError, match=f"{name}|holds no model with a version"):
        export_triton(bundles[1], tmp_path)


def test_a_file_in_the_place_of_a_model_is_said(bundles, tmp_path):
    (tmp_path / NAME).write_text("")
    with pytest.raises(StorageError, match="cannot be read as a model's folder"):
        export_triton(bundles[0], tmp_path)


def test_a_plan_and_its_batch_sizes(with_plan, tmp_path):
    bundle = with_plan("1:8:16")
    written = export_triton(bundle, tmp_path / "models", Serving(backend="tensorrt"))
    folder = tmp_path / "models" / NAME
    assert (folder / "1/model.plan").read_bytes() == b"plan"
    assert json.loads((folder / "1/model.plan.json").read_text())["version"] == "10.9.0.34"
    config = (folder / "config.pbtxt").read_text()
    for line in ('backend: "tensorrt"', "max_batch_size: 16", "preferred_batch_size: [ 8, 16 ]", "kind: KIND_GPU"):
        assert line in config
    assert "profile:" not in config
    assert yaml.safe_load(written.service.read_text())["spec"]["predictor"]["model"]["modelFormat"] == {
        "name": "tensorrt"
    }
    with pytest.raises(UsageError, match=r"built for 1:8:16.*--max-batch 32.*17 too.*--profile 1:OPT:MAX"):
        export_triton(bundle, tmp_path / "more", Serving(backend="tensorrt", max_batch=32))
    assert not (tmp_path / "more").exists()


def test_several_profiles_are_all_used(with_plan, tmp_path):
    export_triton(with_plan("1:1:1", "2:8:32"), tmp_path / "models", Serving(backend="tensorrt"))
    config = (tmp_path / "models" / NAME / "config.pbtxt").read_text()
    for line in ('profile: [ "0", "1" ]', "max_batch_size: 32", "preferred_batch_size: [ 1, 8, 32 ]"):
        assert line in config


def test_without_a_fitting_plan_it_is_said_how_to_get_one(bundles, with_plan, tmp_path):
    wanted = r"export \S+first --format tensorrt.*trtexec --onnx=model.onnx --saveEngine=model.tensorrt.engine"
    wanted += " --minShapes=input:1x8x8x3 --optShapes=input:8x8x8x3 --maxShapes=input:32x8x8x3"
    with pytest.raises(UsageError, match=wanted):
        export_triton(bundles[0], tmp_path / "models", Serving(backend="tensorrt"))
    foreign = with_plan("1:8:16")
    shutil.copy(bundles[1] / "model.onnx", foreign / "model.onnx")
    (foreign / "model.json").unlink()  # else its checksums notice first
    with pytest.raises(ModelFileError, match=r"built from another model\.onnx"):
        export_triton(foreign, tmp_path / "models", Serving(backend="tensorrt"))
    (foreign / "model.tensorrt.engine.json").unlink()  # what trtexec writes has no record
    written = export_triton(foreign, tmp_path / "models", Serving(backend="tensorrt"))
    assert set(files(written.repository / NAME / "1")) == {"model.plan"}


def test_it_needs_no_torch(bundles, tmp_path):
    code = "import sys; sys.modules['torch'] = None; from rkd_deploy.cli import main; main()"
    command = [
        sys.executable,
        "-c",
        code,
        "export",
        bundles[0],
        "--format",
        "triton",
        "--repository",
        tmp_path / "models",
    ]
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "models" / NAME / "1/model.onnx").exists()


def test_a_changed_bundle_is_refused(bundles, tmp_path):
    bundle = shutil.copytree(bundles[0], tmp_path / "bundle")
    (bundle / "labels.txt").write_text("x\n")
    with pytest.raises(ModelFileError, match=r"labels\.txt changed"):
        export_triton(bundle, tmp_path / "models")
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("shapes", "error", "reason"),
    [
        ([["n", 3], ["n", 3]], BackendError, "has 2 inputs"),
        ([[4, 3]], UsageError, r"the shape \[4, 3\]: its batch is fixed"),
        ([["n", "w"]], UsageError, r"the shape \[\?, \?\]: only the batch may be free"),
    ],
)
def test_what_cannot_be_batched_is_refused(tmp_path, shapes, error, reason):
    file = save(tmp_path / "model.onnx", shapes)
    with pytest.raises(error, match=reason):
        export_triton(file, tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_a_file_of_others_has_no_labels(tmp_path):
    written = export_triton(save(tmp_path / "Foo_v2.onnx", [["n", 3]]), tmp_path / "models")
    assert written.name == "foo-v2"
    assert not (written.repository / "foo-v2/labels.txt").exists()
    assert not (written.repository / "foo-v2-images").exists()  # nothing is known of what is done to images
    assert "label_filename" not in (written.repository / "foo-v2/config.pbtxt").read_text()
