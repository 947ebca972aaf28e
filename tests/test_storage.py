from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rkd_deploy.errors import StorageError
from rkd_deploy.storage import new_folder, read_bytes, read_text, storage_error, write_bytes, write_json, write_text

SIZE = 48_000_000  # large enough that most of a write's time is spent inside write and fsync


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_bytes_text_and_json_are_written_as_given(tmp_path: Path) -> None:
    write_bytes(tmp_path / "new" / "deeper" / "b", b"\x00\xff")
    write_text(tmp_path / "t", "déjà\n")
    write_json(tmp_path / "j", {"a": [1, None], "b": "ß"})
    assert contents(tmp_path) == {
        "new/deeper/b": b"\x00\xff",
        "t": "déjà\n".encode(),
        "j": b'{\n  "a": [\n    1,\n    null\n  ],\n  "b": "\\u00df"\n}\n',
    }


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"deep": [-float("inf")]}])
def test_json_refuses_what_json_has_not(tmp_path: Path, value: object) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "j", value)
    assert contents(tmp_path) == {}


def test_a_file_gets_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    write_bytes(tmp_path / "ours", b"")
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_an_earlier_file_is_replaced(tmp_path: Path) -> None:
    for content in (b"long first content", b"", b"second"):
        write_bytes(tmp_path / "f", content)
        assert contents(tmp_path) == {"f": content}


@pytest.mark.parametrize("failure", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_a_failure_before_the_rename_leaves_the_earlier_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    write_bytes(tmp_path / "f", b"earlier")

    def fail(descriptor: int) -> None:
        raise failure

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises((StorageError, KeyboardInterrupt)) as caught:
        write_bytes(tmp_path / "f", b"later")
    assert isinstance(caught.value, StorageError) == isinstance(failure, OSError)
    assert contents(tmp_path) == {"f": b"earlier"}


def test_a_folder_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    with pytest.raises(StorageError, match=rf"Could not write {re.escape(str(tmp_path))}/f: Is a directory"):
        write_bytes(tmp_path / "f", b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_a_file_in_the_way_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"earlier")
    for write in (lambda: write_bytes(tmp_path / "f" / "g", b"x"), new_folder(tmp_path / "f" / "g").__enter__):
        with pytest.raises(StorageError, match=r"Could not write .*/f/g: (File exists|Not a directory)"):
            write()
    assert contents(tmp_path) == {"f": b"earlier"}


def test_the_message_states_the_room_that_there_is(tmp_path: Path) -> None:
    error = storage_error(tmp_path / "absent" / "f", OSError(28, "No space left on device"), needed=1_234_567)
    match = re.search(
        r"/absent/f: No space left on device\. Free there: ([\d,]+) bytes, needed: 1,234,567\.", str(error)
    )
    assert match
    free = int(match[1].replace(",", ""))
    assert free == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.2)  # others write to this disk too


# Killed in the middle of a write. The writer alternates two contents until it is killed; whatever the moment, the file
# must hold one of them whole.

WRITER = """
import sys
from pathlib import Path
from rkd_deploy.storage import write_bytes
path, size, way = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
write = write_bytes if way == "whole" else Path.write_bytes
contents = [letter * size for letter in (b"a", b"b")]
print("ready", flush=True)
while True:
    for content in contents:
        write(path, content)
"""


def kill_writer(path: Path, way: str, delay: float) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), str(SIZE), way], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
    assert writer.returncode == -signal.SIGKILL


def is_whole(path: Path) -> bool:
    content = path.read_bytes()
    return content == b"earlier" or (len(content) == SIZE and content == content[:1] * SIZE)


def test_kill_9_at_any_moment_leaves_a_whole_file(tmp_path: Path) -> None:
    chance, path, in_the_middle = random.Random(1), tmp_path / "f", 0
    for _ in range(8):
        path.write_bytes(b"earlier")
        kill_writer(path, "whole", chance.uniform(0, 0.15))
        assert is_whole(path)
        temporary = [other for other in tmp_path.iterdir() if other != path]
        in_the_middle += len(temporary)
        for other in temporary:  # a killed process cannot tidy up; what it leaves is hidden and under no name of ours
            assert re.fullmatch(r"\.f\..+\.tmp", other.name)
            other.unlink()
    assert in_the_middle >= 2  # else no kill came between the first byte and the rename, and nothing was shown


def test_kill_9_is_seen_to_spoil_a_file_that_is_written_in_place(tmp_path: Path) -> None:
    """The judge above can say no."""
    chance, path = random.Random(2), tmp_path / "f"
    for _ in range(20):
        kill_writer(path, "in place", chance.uniform(0.005, 0.05))
        if not is_whole(path):
            return
    pytest.fail("20 files written in place were all whole: the kills come at the wrong moments")


# No room, for real. Each script prints what it saw as JSON.

OVERFULL = """
import json, resource, signal, sys
from pathlib import Path
from rkd_deploy.errors import StorageError
from rkd_deploy.storage import new_folder, write_bytes
folder = Path(sys.argv[1])
write_bytes(folder / "f", b"earlier")
if sys.argv[2] == "limit":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
messages = []
def overfill():
    write_bytes(folder / "f", b"x" * 100_000)
def overfill_folder():
    with new_folder(folder / "bundle") as temporary:
        (temporary / "small").write_bytes(b"x")
        (temporary / "large").write_bytes(b"x" * 100_000)
for action in (overfill, overfill_folder):
    try:
        action()
        messages.append("nothing was raised")
    except StorageError as error:
        messages.append(str(error))
left = {str(path.relative_to(folder)): path.read_bytes()[:20].decode() for path in folder.rglob("*") if path.is_file()}
print(json.dumps({"messages": messages, "left": left, "names": sorted(path.name for path in folder.iterdir())}))
"""


def overfill(folder: Path, way: str, *before: str) -> dict[str, object]:
    command = [*before, sys.executable, "-c", OVERFULL, str(folder), way]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    observed = json.loads(done.stdout)
    assert isinstance(observed, dict)
    return observed


def check_overfull(seen: dict[str, object], folder: Path, reason: str) -> None:
    file, bundle = seen["messages"]  # type: ignore[misc]
    assert f"Could not write {folder}/f: {reason}. Free there: " in file
    assert "bytes, needed: 100,000. What stood there before is intact" in file
    assert f"Could not write {folder}/bundle: {reason}. Free there: " in bundle
    assert seen["left"] == {"f": "earlier"}
    assert seen["names"] == ["f"]


def test_a_file_size_limit_leaves_the_earlier_file(tmp_path: Path) -> None:
    check_overfull(overfill(tmp_path, "limit"), tmp_path, "File too large")


def test_a_full_disk_leaves_the_earlier_file(tmp_path: Path) -> None:
    # A disk of 64 KiB in a mount namespace of its own: it vanishes with the process, however that ends.
    space = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    mounted = [*space, "sh", "-c", 'mount -t tmpfs -o size=64k tmpfs "$0" && exec "$@"', str(tmp_path)]
    if shutil.which("unshare") and subprocess.run([*mounted, "true"], capture_output=True, check=False).returncode == 0:
        observed = overfill(tmp_path, "disk", *mounted)
    else:  # no right to mount: the same answer of the kernel from the device that is always full
        full = OVERFULL.replace(
            "messages = []",
            "messages = []; import os, tempfile; name = str(folder / '.full.tmp'); tempfile.mkstemp = lambda **_: "
            "(os.symlink('/dev/full', name), (os.open(name, os.O_WRONLY), name))[1]; "
            "Path.write_bytes = lambda path, content: open('/dev/full', 'wb').write(content)",
        )
        done = subprocess.run(
            [sys.executable, "-c", full, str(tmp_path), "disk"], capture_output=True, text=True, check=True
        )
        observed = json.loads(done.stdout)
    check_overfull(observed, tmp_path, "No space left on device")


def test_a_new_folder_appears_whole(tmp_path: Path) -> None:
    with new_folder(tmp_path / "runs" / "bundle") as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "f").write_bytes(b"1")
        assert not (tmp_path / "runs" / "bundle").exists()
    assert contents(tmp_path) == {"runs/bundle/sub/f": b"1"}
    (tmp_path / "plain").mkdir()
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("runs/bundle", "plain")]
    assert modes[0] == modes[1]


@pytest.mark.parametrize("failure", [RuntimeError("in the block"), KeyboardInterrupt(), OSError(28, "No space")])
def test_a_new_folder_vanishes_on_an_exception(tmp_path: Path, failure: BaseException) -> None:
    def fill() -> None:
        with new_folder(tmp_path / "bundle") as temporary:
            (temporary / "f").write_bytes(b"1")
            raise failure

    wanted = StorageError if isinstance(failure, OSError) else type(failure)
    with pytest.raises(wanted):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_a_new_folder_takes_another_ones_place_only_when_the_block_ends_well(tmp_path: Path) -> None:
    with new_folder(tmp_path / "logs") as temporary:
        (temporary / "old").write_text("old")
    with pytest.raises(StorageError), new_folder(tmp_path / "logs", replace=True) as temporary:
        (temporary / "absent" / "new").write_text("")
    assert [path.name for path in tmp_path.rglob("*")] == ["logs", "old"]
    with new_folder(tmp_path / "logs", replace=True) as temporary:
        (temporary / "new").write_text("whole")
    assert [path.name for path in tmp_path.rglob("*")] == ["logs", "new"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_new_folder_overwrites_nothing(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "bundle"
    if kind == "folder":
        path.mkdir()
        path = path / "kept"
    path.write_bytes(b"kept")
    with pytest.raises(StorageError, match=r"bundle exists already and is never overwritten\. Name another folder"):
        new_folder(tmp_path / "bundle").__enter__()
    assert path.read_bytes() == b"kept"
    assert len(list(tmp_path.iterdir())) == 1


def test_an_error_of_storage_inside_the_block_keeps_its_own_message(tmp_path: Path) -> None:
    def fill() -> None:
        with new_folder(tmp_path / "bundle") as temporary:
            (temporary / "f").mkdir()
            write_bytes(temporary / "f", b"1")

    with pytest.raises(StorageError, match=r"/f: Is a directory"):
        fill()
    assert list(tmp_path.iterdir()) == []


# Files of unknown origin. A pipe with no writer would wait for ever, and /dev/zero would fill the memory.


def socket_at(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (os.mkfifo, "it is a named pipe, and must be a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "it is a device, and must be a regular file"),
        (socket_at, "it is a socket, and must be a regular file"),
        (Path.mkdir, "it is a folder, and must be a regular file"),
        (lambda path: path.symlink_to("absent"), "it is a link to absent, which is not there"),
        (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
        (lambda path: None, "No such file or directory"),
        (lambda path: path.write_bytes(b"x" * 11), "it has 11 bytes, and at most 10 are read"),
    ],
)
def test_what_is_no_readable_file_is_said(tmp_path: Path, make: Callable[[Path], None], words: str) -> None:
    make(tmp_path / "f")
    with pytest.raises(OSError, match=re.escape(words)) as caught:
        read_text(tmp_path / "f", limit=10)
    assert caught.value.strerror == words
    assert caught.value.filename == str(tmp_path / "f")


def test_a_file_of_the_kernel_that_says_it_is_empty_is_bounded_too() -> None:
    assert os.stat("/proc/self/maps").st_size == 0
    with pytest.raises(OSError, match="at most 10 are read"):
        read_bytes("/proc/self/maps", limit=10)


@pytest.mark.parametrize(
    ("content", "way"),
    [
        (f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 46827520\n", "git lfs pull"),
        ("/annex/objects/SHA256E-s46827520--0123.onnx\n", "git annex get"),
    ],
)
def test_a_pointer_to_a_file_that_was_not_fetched_says_how_to_fetch_it(tmp_path: Path, content: str, way: str) -> None:
    (tmp_path / "f").write_text(content)
    with pytest.raises(OSError, match=rf"it is a pointer of Git.* instead of the file; fetch it with: {way}|git-annex"):
        read_bytes(tmp_path / "f")


def test_a_regular_file_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"a\r\nb\n")
    (tmp_path / "link").symlink_to("f")
    assert (read_bytes(tmp_path / "link"), read_text(tmp_path / "link")) == (b"a\r\nb\n", "a\nb\n")


def test_a_null_byte_in_a_name_is_an_error_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="null"):
        read_bytes(f"{tmp_path}/a\0b")


# What a killed process leaves is removed by the next that writes there; what a living one is writing stays.

HOLDER = """
import sys, time
from pathlib import Path
from rkd_deploy.storage import new_folder
with new_folder(Path(sys.argv[1])) as temporary:
    (temporary / "half").write_bytes(b"1")
    print(temporary.name, flush=True)
    time.sleep(600)
"""


def test_leftovers_of_a_killed_process_are_removed_by_the_next_and_a_living_ones_stay(tmp_path: Path) -> None:
    holders = [
        subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "b")], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    names = []
    for holder in holders:
        assert holder.stdout is not None
        names.append(holder.stdout.readline().strip())
    dead, living = names
    try:
        holders[0].kill()
        holders[0].wait()
        (tmp_path / ".b.file.tmp").write_bytes(b"half")
        (tmp_path / ".b2.other.tmp").mkdir()  # of another name
        assert (tmp_path / dead).is_dir()
        with new_folder(tmp_path / "b") as temporary:
            assert {path.name for path in tmp_path.iterdir()} == {living, temporary.name, ".b2.other.tmp"}
        write_bytes(tmp_path / "b2", b"")
        assert {path.name for path in tmp_path.iterdir()} == {living, "b", "b2"}
    finally:
        for holder in holders:
            holder.kill()
            holder.communicate()


@pytest.mark.parametrize("content", [b"a\nb", b"a\r\nb", b"a\rb", b"\xef\xbb\xbfa\r\nb"])
def test_text_is_the_same_whichever_editor_wrote_it(tmp_path, content):
    (tmp_path / "text").write_bytes(content)
    assert read_text(tmp_path / "text") == "a\nb"
