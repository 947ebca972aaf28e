"""CIFAR-100 for real: files, torchvision's reader, its download from a server on this host."""

from __future__ import annotations

import functools
import hashlib
import http.server
import os
import pickle
import shutil
import socket
import socketserver
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.datasets import CIFAR100

from rkd_deploy.data import sources
from rkd_deploy.data.sources import ImageSet, load_images
from rkd_deploy.errors import DataError
from rkd_deploy.recipe import DataRecipe

ARCHIVE = "cifar-100-python.tar.gz"
FILES = ("train", "test", "meta")


def load(root: Path) -> ImageSet:
    return load_images(DataRecipe(name="cifar100", root=str(root), val_fraction=0), 0)


@contextmanager
def served(handler: Any) -> Iterator[str]:
    """Address of a server on this host that answers by this handler."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/{ARCHIVE}"
        finally:
            server.shutdown()
            thread.join()


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves the files of a folder and logs nothing."""

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever would be downloaded comes from a port of this host that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    monkeypatch.setattr(CIFAR100, "url", f"http://127.0.0.1:{port}/{ARCHIVE}")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")


def unpickled(path: Path) -> dict[str, Any]:
    content = pickle.loads(path.read_bytes(), encoding="latin1")
    assert isinstance(content, dict)
    return content


def test_arrays_are_those_of_the_files(cifar100: ImageSet, cifar_root: Path) -> None:
    """Against the description of the format: 3072 bytes an image, red plane, green plane, blue plane, row by row."""
    for split, name in ((cifar100.train, "train"), (cifar100.test, "test")):
        content = unpickled(cifar_root / "cifar-100-python" / name)
        assert torch.equal(split.images_NCHW, torch.from_numpy(content["data"]).view(-1, 3, 32, 32))
        assert split.labels_N.tolist() == content["fine_labels"]
        assert (split.images_NCHW.dtype, split.labels_N.dtype) == (torch.uint8, torch.int64)
    names = unpickled(cifar_root / "cifar-100-python" / "meta")["fine_label_names"]
    assert list(cifar100.classes) == names
    assert (names[0], names[99]) == ("apple", "worm")
    assert (len(cifar100.train), len(cifar100.val), len(cifar100.test)) == (50_000, 0, 10_000)


def test_images_are_those_that_torchvision_gives(cifar100: ImageSet, cifar_root: Path) -> None:
    theirs = CIFAR100(cifar_root, train=False)
    assert torch.equal(cifar100.test.images_NCHW.permute(0, 2, 3, 1), torch.from_numpy(theirs.data))
    assert cifar100.test.labels_N.tolist() == theirs.targets
    assert list(cifar100.classes) == theirs.classes


def test_its_normalisation_is_that_of_its_training_images(cifar100: ImageSet) -> None:
    pixels = cifar100.train.images_NCHW.transpose(0, 1).flatten(1)
    values = torch.arange(256, dtype=torch.float64) / 255
    for channel in range(3):
        share = torch.bincount(pixels[channel], minlength=256).double() / pixels.shape[1]
        mean = (share * values).sum()
        assert cifar100.mean[channel] == pytest.approx(mean.item(), abs=1e-4)
        assert cifar100.std[channel] == pytest.approx((share * (values - mean) ** 2).sum().sqrt().item(), abs=1e-4)


def copied(root: Path, folder: Path, changed: str) -> Path:
    """The set in another folder: one file copied, the others linked."""
    (folder / "cifar-100-python").mkdir(parents=True)
    for name in FILES:
        source, target = root / "cifar-100-python" / name, folder / "cifar-100-python" / name
        shutil.copyfile(source, target) if name == changed else target.symlink_to(source)
    return folder / "cifar-100-python" / changed


@pytest.mark.parametrize("changed", ["meta", "test"])
def test_one_flipped_bit_is_an_error_with_a_way_out(cifar_root: Path, tmp_path: Path, changed: str) -> None:
    with copied(cifar_root, tmp_path, changed).open("r+b") as stream:
        stream.seek(1000)
        byte = stream.read(1)[0]
        stream.seek(1000)
        stream.write(bytes([byte ^ 4]))
    with pytest.raises(DataError) as caught:
        load(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"cifar100 is not whole in {tmp_path}/cifar-100-python and could not be downloaded from ")
    assert "http://127.0.0.1" in message
    assert message.endswith("name the folder that holds cifar-100-python/: --set data.root=FOLDER")


@pytest.mark.parametrize("name", ["cifar100", "cifar10"])
def test_without_data_and_without_network_the_way_out_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("torchvision.datasets.CIFAR10.url", CIFAR100.url)
    monkeypatch.setattr(sources, "DATA_ROOT", tmp_path / "default")
    with pytest.raises(DataError, match=rf"{name} is not whole in .*default/cifar-.*--set data\.root=FOLDER"):
        load_images(DataRecipe(name=name), 0)


class Absent(Quiet):
    """Has no such file."""

    def do_GET(self) -> None:
        self.send_error(404)


class Portal(Quiet):
    """A page in place of the file, as the log-in of a wireless network gives."""

    def do_GET(self) -> None:
        self.answer(b"<html>Please log in</html>", 26)

    def answer(self, content: bytes, length: int) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(content)


class Cut(Portal):
    """Breaks off in the middle."""

    def do_GET(self) -> None:
        self.answer(b"x" * 1000, 100_000)


class OtherProtocol(socketserver.BaseRequestHandler):
    """Speaks no HTTP."""

    def handle(self) -> None:
        self.request.recv(1000)
        self.request.sendall(b"220 ready\r\n")


class HangUp(socketserver.BaseRequestHandler):
    """Says nothing."""

    def handle(self) -> None:
        self.request.recv(1000)


@pytest.mark.parametrize("handler", [Absent, Portal, Cut, OtherProtocol, HangUp])
def test_a_download_that_fails_is_an_error_with_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handler: Any
) -> None:
    with served(handler) as url:
        monkeypatch.setattr(CIFAR100, "url", url)
        with pytest.raises(DataError, match=rf"(?s)could not be downloaded from {url} \(.+\)\. Unpack it yourself"):
            load(tmp_path)


@pytest.mark.filterwarnings("ignore:Python 3.14 will:DeprecationWarning")  # of extractall, inside torchvision
def test_it_is_downloaded_where_it_is_missing(
    cifar_root: Path, cifar100: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchvision's own code, from HTTP to tensors; only the archive's address and checksum are not the real ones."""
    (tmp_path / "server").mkdir()
    archive = tmp_path / "server" / ARCHIVE
    with tarfile.open(archive, "w:gz", compresslevel=0) as stream:
        stream.add(cifar_root / "cifar-100-python", "cifar-100-python")
    with archive.open("rb") as content:
        monkeypatch.setattr(CIFAR100, "tgz_md5", hashlib.file_digest(content, "md5").hexdigest())
    with served(functools.partial(Quiet, directory=str(archive.parent))) as url:
        monkeypatch.setattr(CIFAR100, "url", url)
        images = load(tmp_path / "new" / "root")
    for ours, theirs in ((images.train, cifar100.train), (images.test, cifar100.test)):
        assert torch.equal(ours.images_NCHW, theirs.images_NCHW)
        assert torch.equal(ours.labels_N, theirs.labels_N)
    assert sorted(os.listdir(tmp_path / "new" / "root")) == ["cifar-100-python", ARCHIVE]
    shutil.rmtree(tmp_path / "new")  # 360 MB
    archive.unlink()
