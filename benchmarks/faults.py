"""Makes faulty files, environments and calls by seed, as somebody may come with them.

A fault is prepared and run in a process of its own, in an empty folder (`bad_input.py`). Each is drawn from its number
and the seed alone, so that one can be repeated without those before it.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 46827520\n"
ESCAPE = "\x1b]0;owned\x07\x1b[31mError: all is well\n"
FORMATS = {"jpg": "JPEG", "png": "PNG", "bmp": "BMP", "gif": "GIF", "tiff": "TIFF", "webp": "WEBP", "ppm": "PPM"}

# What no value of a recipe, a card or a record should be, as JSON and TOML write it.
JSON_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1.5, 2**31, 2**63, 10**30, 1e308, -0.0, "", "nan", "\0", ESCAPE, "x" * 5000),
    *([], {}, [[]], [None], {"": 0}, list(range(50))),
)
TOML_VALUES = (
    *("nan", "inf", "-inf", "-1", "0", "1.5", "1e400", "1" * 5000, "true", "''", "'\\n'", '"\\u0000"', "[]", "{}"),
    *("[[]]", "[" * 3000, "2026-11-26", "'x' x", "\n[data]\nname='x'", "9223372036854775808", "'~/nothing'"),
)
CALL_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1.5, float("nan"), float("inf"), 2**31, 10**30, "", "x", "\0", ESCAPE, "x" * 5000, b"x"),
    *([], {}, (), [None], object(), Path("/dev/zero"), Path("absent"), (1, 2, 3)),
)


class WronglyAcceptedError(Exception):
    """Damage that ought to have been noticed gave a result."""


@dataclass(frozen=True)
class Material:
    """Whole files that faults are made from.

    Attributes:
        run: A finished run.
        bundle: Exported from it.
        record: A bench.json of it.
        photo: A JPEG.
    """

    run: Path
    bundle: Path
    record: Path
    photo: Path


@dataclass(frozen=True)
class Fault:
    """One thing that somebody may come with.

    Attributes:
        group: One of `GROUPS`.
        name: What it is, in words.
        run: Prepares it in the current folder and runs it; raises what the package raises, and
            `WronglyAcceptedError` where a result is wrong.
        by_command: Whether it ends as a command does, with an exit code and text.
    """

    group: str
    name: str
    run: Callable[[], object]
    by_command: bool = False


def draw(material: Material, seed: int, number: int) -> Fault:
    """The fault of a number, whatever was drawn before it."""
    group = list(GROUPS)[number % len(GROUPS)]
    return GROUPS[group](random.Random(f"{seed}/{number}"), material)


def run_command(*words: object) -> None:
    """Run a command of the package in this process."""
    from rkd_deploy.cli import main

    sys.argv[:] = ["rkd-deploy", *map(str, words)]
    main()


# Damage of bytes and of files.


def damaged(content: bytes, chance: random.Random) -> tuple[bytes, str]:
    """Bytes that are damaged in one way, and which."""
    data, size = bytearray(content), len(content)
    way = chance.choice(("flipped bits", "cut off", "zeroed", "numbers at their ends", "garbage", "repeated", "empty"))
    if way == "flipped bits":
        for _ in range(chance.choice((1, 1, 1, 8, 64))):
            data[chance.randrange(size)] ^= 1 << chance.randrange(8)
    elif way == "cut off":
        del data[chance.randrange(size) :]
    elif way == "zeroed":
        start = chance.randrange(size)
        data[start : start + 4096] = bytes(len(data[start : start + 4096]))
    elif way == "numbers at their ends":
        start = chance.randrange(min(size, 256))
        data[start : start + 4] = chance.choice((b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", bytes(4)))
    elif way == "garbage":
        data[:] = chance.randbytes(chance.choice((1, 100, 10_000)))
    elif way == "repeated":
        data += content
    else:
        data.clear()
    return bytes(data), way


def no_file(path: Path, chance: random.Random) -> str:
    """Put something at a path that is no regular file, or not the file that it stands for."""
    kinds: dict[str, Callable[[], object]] = {
        "a named pipe": lambda: os.mkfifo(path),
        "an endless device": lambda: path.symlink_to("/dev/zero"),
        "a link to nothing": lambda: path.symlink_to("absent"),
        "a link to itself": lambda: path.symlink_to(path.name),
        "a folder": path.mkdir,
        "a pointer of Git LFS": lambda: path.write_text(POINTER),
    }
    kind = chance.choice(list(kinds))
    kinds[kind]()
    return kind


def changed_json(content: Any, chance: random.Random) -> tuple[Any, str]:
    """JSON with one value replaced or one key removed, and where."""
    places: list[tuple[Any, Any, str]] = []

    def collect(node: Any, where: str) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in itertools.islice(items, 50):
            places.append((node, key, f"{where}.{key}"))
            collect(value, f"{where}.{key}")

    copy = json.loads(json.dumps(content))
    collect(copy, "")
    node, key, where = chance.choice(places)
    if chance.random() < 0.25:
        del node[key]
        return copy, f"without {where[1:]}"
    node[key] = chance.choice(JSON_VALUES)
    return copy, f"{where[1:]} = {json.dumps(node[key])[:40]}"


# The groups. Preparation happens inside of `run`, in the folder of the fault.


def _recipe(chance: random.Random, material: Material) -> Fault:
    from rkd_deploy.recipe import read_recipe

    text = (material.run / "recipe.toml").read_text()
    keys = [f"{table}.{key}" for table, key in _keys(text)]
    way = chance.choice(("override", "override", "value", "bytes", "file", "deep"))
    key, value = (
        chance.choice([*keys, "data.nothing", "nothing", "", "data", "data.name.x"]),
        chance.choice(TOML_VALUES),
    )
    content, name, overrides = text.encode(), "", []
    if way == "override":
        overrides, name = [f"{key}={value}"], f"--set {key}={value[:40]!r}"
    elif way == "value":
        lines = text.splitlines()
        at = chance.choice([n for n, line in enumerate(lines) if " = " in line])
        lines[at] = f"{lines[at].split(' = ')[0]} = {value}"
        content, name = "\n".join(lines).encode(errors="surrogatepass"), lines[at][:60]
    elif way == "bytes":
        content, name = damaged(content, chance)
    elif way == "deep":
        content, name = b"x = " + chance.choice((b"[", b"{a=")) * 100_000, "100,000 levels deep"

    def run() -> None:
        file = Path("recipe.toml")
        if way == "file":
            no_file(file, chance)
        else:
            file.write_bytes(content)
        recipe = read_recipe(file, overrides)
        again = Path("again.toml")
        again.write_text(recipe.to_toml())
        if read_recipe(again) != recipe:
            raise WronglyAcceptedError("the recipe that is written back is another")

    return Fault("recipes", name or way, run)


def _keys(text: str) -> Iterator[tuple[str, str]]:
    table = ""
    for line in text.splitlines():
        if line.startswith("["):
            table = line.strip("[]")
        elif " = " in line and table:
            yield table, line.split(" = ")[0]


def _checkpoint(chance: random.Random, material: Material) -> Fault:
    way = chance.choice(("safetensors", "pth", "pth", "file", "content"))
    content = chance.choice(("code", "itself", "numbers", "list", "empty", "nan", "names", "wrapped in 50"))

    def run() -> None:
        import torch

        from rkd_deploy.train.checkpoints import load_checkpoint

        weights = next((material.run / "weights").glob("teacher.safetensors"))
        if way == "file":
            path = Path(f"w.{chance.choice(('pth', 'safetensors'))}")
            no_file(path, chance)
        elif way == "safetensors":
            path = Path("w.safetensors")
            path.write_bytes(damaged(weights.read_bytes(), chance)[0])
        elif way == "pth":
            path, state = Path("w.pth"), load_checkpoint(weights).state
            torch.save(state, path)
            path.write_bytes(damaged(path.read_bytes(), chance)[0])
            loaded = load_checkpoint(path).state
            same = loaded.keys() == state.keys() and all(torch.equal(loaded[key], state[key]) for key in state)
            if not same:
                raise WronglyAcceptedError("other weights than were saved")
            return
        else:
            path = Path("w.pth")
            torch.save(_strange_state(content), path)
        load_checkpoint(path)

    return Fault("checkpoints", f"{way}{f': {content}' if way == 'content' else ''}", run)


class _Code:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch executed",)


def _strange_state(content: str) -> Any:
    import torch

    itself: dict[str, Any] = {}
    itself["state_dict"] = itself
    wrapped: dict[str, Any] = {"fc.weight": torch.zeros(2)}
    for _ in range(50):
        wrapped = {"model": wrapped}
    return {
        "code": {"fc.weight": _Code()},
        "itself": itself,
        "numbers": {1: torch.zeros(1)},
        "list": [torch.zeros(1)],
        "empty": {},
        "nan": {"fc.weight": torch.full((2,), torch.nan)},
        "names": {ESCAPE: torch.zeros(1), "module.": torch.zeros(1)},
        "wrapped in 50": wrapped,
    }[content]


def _image(chance: random.Random, material: Material) -> Fault:
    suffix = chance.choice(list(FORMATS))
    way = chance.choice(("bytes", "bytes", "bytes", "file", "size", "suffix"))
    command = chance.random() < 0.1

    def run() -> None:
        import numpy as np
        from PIL import Image

        from rkd_deploy.card import Preprocess
        from rkd_deploy.images import to_array

        path = Path(f"x.{chance.choice(list(FORMATS)) if way == 'suffix' else suffix}")
        if way == "file":
            no_file(path, chance)
        else:
            size = chance.choice(((1, 1), (1, 60_000), (60_000, 1), (16_384, 16_384))) if way == "size" else (40, 30)
            with Image.open(material.photo) as photo:
                image = photo.convert("RGB").resize(size) if max(size) < 10_000 else Image.new("L", size)
            written = io.BytesIO()
            try:
                image.save(written, FORMATS[suffix])
            except (OSError, ValueError):  # WebP ends at 16,383 pixels
                return
            path.write_bytes(damaged(written.getvalue(), chance)[0] if way == "bytes" else written.getvalue())
        if command:
            run_command("predict", material.bundle, path)
            return
        pixels = to_array(path, Preprocess(height=224, width=224, mean=(0.0,) * 3, std=(1.0,) * 3))
        if pixels.shape != (224, 224, 3) or pixels.dtype != np.uint8:
            raise WronglyAcceptedError(f"pixels {pixels.dtype} {pixels.shape}")

    return Fault("images", f"{suffix}, {way}", run, command)


def _bundle(chance: random.Random, material: Material) -> Fault:
    files = (path for path in material.bundle.rglob("*") if path.is_file())
    names = sorted(path.relative_to(material.bundle).as_posix() for path in files)
    name, way = chance.choice(names), chance.choice(("bytes", "bytes", "card", "card", "file", "gone", "nested"))
    use = chance.choice(("load", "verify", "info"))

    def run() -> None:
        folder = Path("b")
        shutil.copytree(material.bundle, folder)
        file = folder / name
        original = file.read_bytes()
        sealed = way not in ("card", "nested")
        if way == "bytes":
            file.write_bytes(damaged(original, chance)[0])
        elif sealed:
            file.unlink()
            if way == "file":
                no_file(file, chance)
        else:
            card = json.loads((folder / "model.json").read_text()) | {"checksums": {}}
            text = (
                json.dumps(changed_json(card, chance)[0]) if way == "card" else '{"schema": 1, "name": ' + "[" * 90_000
            )
            (folder / "model.json").write_text(text)
            (folder / "model.onnx").write_bytes(_without_card(folder / "model.onnx"))
        _use_bundle(use, folder)
        intact = file.is_file() and file.read_bytes() == original
        # An app may leave out all files but the model; a proof needs each of them.
        may_lack = use != "verify" and name != "model.onnx" and way in ("gone", "file")
        if sealed and not intact and not may_lack:
            raise WronglyAcceptedError(f"{name} was damaged ({way}), and {use} said nothing")

    return Fault(
        "bundles", f"{use}: {name if way in ('bytes', 'file', 'gone') else 'model.json'}, {way}", run, use != "load"
    )


def _without_card(file: Path) -> bytes:
    import onnx

    model = onnx.load(file)
    del model.metadata_props[:]
    return bytes(model.SerializeToString())


def _use_bundle(use: str, folder: Path) -> None:
    if use != "load":
        words = [use, folder, *(["--backend", "onnxruntime"] if use == "verify" else [])]
        try:
            run_command(*words)
        except SystemExit as error:
            if error.code:
                raise
        return
    import math

    import numpy as np

    from rkd_deploy import load

    with load(folder, threads=1) as classifier:
        for best in classifier.predict_batch([np.zeros((20, 30, 3), np.uint8)] * 2, top=2):
            if not all(0 <= guess.probability <= 1 and math.isfinite(guess.probability) for guess in best):
                raise WronglyAcceptedError(f"probabilities {best}")


def _record(chance: random.Random, material: Material) -> Fault:
    use = chance.choice(("bench-compare", "bench-compare", "read", "facts", "metrics", "report"))
    way = chance.choice(("value", "value", "value", "bytes", "file", "deep"))
    content = json.loads(material.record.read_text())

    def run() -> None:
        name = {"facts": "facts.json", "metrics": "metrics.json"}.get(use, "bench.json")
        source = material.record if name == "bench.json" else material.run / name
        if name != "bench.json":
            shutil.copytree(material.run, "run", ignore=shutil.ignore_patterns("bundle*", "tensorboard"))
            Path("run", name).unlink()
        path = Path(name) if name == "bench.json" else Path("run", name)
        if way == "file":
            no_file(path, chance)
        elif way == "bytes":
            path.write_bytes(damaged(source.read_bytes(), chance)[0])
        elif way == "deep":
            path.write_text(chance.choice(("[", '{"a":')) * 100_000)
        else:
            original = content if name == "bench.json" else json.loads(source.read_text())
            path.write_text(json.dumps(changed_json(original, chance)[0]))
        if use == "bench-compare":
            run_command("bench-compare", *chance.sample([path, material.record], 2))
        elif use == "report":
            run_command("report", path, "--output", "out")
        elif use == "read":
            from rkd_deploy.bench.reading import read_bench

            read_bench(path)
        else:
            from rkd_deploy.train.runs import Run

            getattr(Run(Path("run")), use)

    return Fault("records", f"{use}: {way}", run, use in ("bench-compare", "report"))


def _environment(chance: random.Random, material: Material) -> Fault:
    commands: list[list[object]] = [
        ["--help"],
        ["backends"],
        ["info", material.bundle],
        ["info", material.bundle, "--json"],
        ["predict", material.bundle, material.photo],
        ["verify", material.bundle, "--backend", "onnxruntime"],
        ["bench-compare", material.record, material.record],
        ["bench", "--runs", ESCAPE],
        ["predict", material.bundle, f"{ESCAPE}.jpg"],
        ["train", f"{ESCAPE}.toml"],
    ]
    command = chance.choice(commands)
    changes: dict[str, Callable[[], object]] = {
        "standard output closed": _close_output,
        "standard output full": lambda: _output_to("/dev/full"),
        "standard output a broken pipe": _break_output,
        "standard output in Latin-1": _output_in_latin_1,
        "standard error closed": lambda: setattr(sys, "stderr", None),
        "a current folder that is gone": _leave_folder,
        "no home": lambda: os.environ.update(HOME="/nonexistent"),
        "no temporary folder": lambda: os.environ.update(TMPDIR="/nonexistent"),
        "terminated": lambda: threading.Timer(chance.random() / 4, os.kill, (os.getpid(), signal.SIGTERM)).start(),
        **{f"COLUMNS={width}": _set_columns(width) for width in ("0", "1", "10", "-5", "x", "100000")},
        "a dumb terminal": lambda: os.environ.update(TERM="dumb", NO_COLOR="1"),
        "few open files": _few_files,
    }
    change = chance.choice(list(changes))

    def run() -> None:
        changes[change]()
        run_command(*command)

    return Fault("environment", f"{change}: {' '.join(map(str, command))[:60]!r}", run, by_command=True)


def _set_columns(width: str) -> Callable[[], object]:
    return lambda: os.environ.update(COLUMNS=width)


def _output_in_latin_1() -> None:
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(encoding="latin-1")


def _close_output() -> None:
    os.close(1)
    sys.stdout = None  # as the interpreter has it then


def _output_to(path: str) -> None:
    os.dup2(os.open(path, os.O_WRONLY), 1)


def _break_output() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)


def _leave_folder() -> None:
    Path("gone").mkdir()
    os.chdir("gone")
    os.rmdir("../gone")


def _few_files() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))


def _call(chance: random.Random, material: Material) -> Fault:
    import rkd_deploy
    from rkd_deploy.backends import RunOn
    from rkd_deploy.bench.settings import BenchSettings
    from rkd_deploy.card import Preprocess

    def predict(image: Any, top: Any) -> None:
        with rkd_deploy.load(material.bundle, threads=1) as classifier:
            classifier.predict(image, top)

    def predict_batch(images: Any, top: Any) -> None:
        with rkd_deploy.load(material.bundle, threads=1) as classifier:
            classifier.predict_batch(images, top)

    def load(**options: Any) -> None:
        rkd_deploy.load(options.pop("path", material.bundle), **options).close()

    calls: dict[str, tuple[Callable[..., object], dict[str, Any]]] = {
        "load": (
            load,
            {
                "path": material.bundle,
                "backend": "onnxruntime",
                "device": "cpu",
                "threads": 1,
                "max_batch": 4,
                "exit_threshold": None,
            },
        ),
        "predict": (predict, {"image": material.photo, "top": 2}),
        "predict_batch": (predict_batch, {"images": [material.photo], "top": 2}),
        "Preprocess": (
            Preprocess,
            {"height": 8, "width": 8, "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_fraction": 1.0},
        ),
        "RunOn": (RunOn, {"backend": "onnxruntime", "device": "cpu", "threads": 1, "streams": 1}),
        "BenchSettings": (BenchSettings, {"batches": (1,), "min_seconds": 0.1, "min_runs": 3, "seed": 0}),
        "verify": (rkd_deploy.verify, {"bundle_path": material.bundle, "run_on": "onnxruntime", "tolerance": 0.1}),
        "read_recipe": (
            rkd_deploy.read_recipe,
            {"path": material.run / "recipe.toml", "overrides": ["train.epochs=1"]},
        ),
    }
    name = chance.choice(list(calls))
    function, options = calls[name]
    key = chance.choice(list(options))
    value = chance.choice(CALL_VALUES)
    return Fault("calls", f"{name}({key}={value!r:.40})", lambda: function(**options | {key: value}))


GROUPS: dict[str, Callable[[random.Random, Material], Fault]] = {
    "recipes": _recipe,
    "checkpoints": _checkpoint,
    "images": _image,
    "bundles": _bundle,
    "records": _record,
    "environment": _environment,
    "calls": _call,
}
