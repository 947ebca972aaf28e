"""What is no regular file, is missing or was never fetched is said by every reader in its own error, and none waits."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rkd_deploy.backends.files import check_files, model_path, read_card
from rkd_deploy.backends.tensorrt.record import read_engine
from rkd_deploy.bench.parity import read_golden
from rkd_deploy.card import ModelCard, Preprocess
from rkd_deploy.data.files import ImageFiles, read_image
from rkd_deploy.decoding import DecodingError, parse_object, read_json
from rkd_deploy.errors import RkdError
from rkd_deploy.recipe import read_recipe
from rkd_deploy.train.checkpoints import load_checkpoint
from rkd_deploy.train.log import RunLog, read_epochs
from rkd_deploy.train.runs import Run
from rkd_deploy.train.weights import load_tensors

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 46827520\n"
KINDS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a pipe": (os.mkfifo, "it is a named pipe"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "it is a device"),
    "a link to nothing": (lambda path: path.symlink_to("absent"), "it is a link to absent, which is not there"),
    "a pointer": (lambda path: path.write_text(POINTER) and None, "fetch it with: git lfs pull"),
}


def card_beside(path: Path) -> None:
    path.with_name("model.onnx").write_bytes(b"1")
    read_card(path.parent, {})


def checksums_of(path: Path) -> None:
    text = ModelCard(
        name="n",
        labels=("a", "b"),
        preprocess=Preprocess(height=1, width=1, mean=(0.0,), std=(1.0,)),
        checksums={"labels.txt": "0" * 64, "model.json": "0" * 64},
    ).to_json()
    path.with_name("model.onnx").write_bytes(b"1")
    path.with_name("model.json").write_text(text)
    check_files(path.parent, complete=True)


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "recipe": ("recipe.toml", read_recipe),
    "model": ("model.onnx", model_path),
    "card": ("model.json", card_beside),
    "golden data": ("golden.npz", read_golden),
    "engine": ("model.engine", read_engine),
    "record": ("bench.json", read_json),
    "checkpoint": ("weights.pth", load_checkpoint),
    "weights": ("weights.safetensors", load_checkpoint),
    "run's weights": ("teacher.safetensors", load_tensors),
    "facts": ("facts.json", lambda path: Run(path.parent).facts),
    "log": ("log.jsonl", read_epochs),
    "log to cut": ("log.jsonl", lambda path: RunLog(path).forget("s0")),
    "image": ("photo.jpg", lambda path: read_image(ImageFiles([str(path)]), 0)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_file_is_said(tmp_path: Path, reader: str, kind: str) -> None:
    name, read = READERS[reader]
    make, words = KINDS[kind]
    make(tmp_path / name)
    if kind == "a link to nothing" and reader in ("golden data", "checkpoint", "weights"):
        words = "There is no"
    with pytest.raises((RkdError, DecodingError), match=words):
        read(tmp_path / name)


def test_a_pipe_among_the_files_of_a_bundle_holds_up_no_checksum(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "labels.txt")
    with pytest.raises(RkdError, match=r"labels\.txt"):
        checksums_of(tmp_path / "labels.txt")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' * 100_000, "nested too deeply"),
        ('{"a": ' + "1" * 5000 + "}", "a whole number of 5,000 digits"),
        ('{"a": 1e999}', "1e999"),
        ('{"a": -Infinity}', "-Infinity is no number"),
        ("[]", r"\[\] where an object"),
        ("null", "null where an object"),
        ("", "no JSON"),
    ],
)
def test_json_is_bounded_in_every_direction(text: str, words: str) -> None:
    with pytest.raises(DecodingError, match=words):
        parse_object(text)
