"""Draws faulty files: recipes, checkpoints, images, bundles and records.

Preparation happens inside of `run`, in the folder of the fault.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from damage import (
    ESCAPE,
    FORMATS,
    TOML_VALUES,
    Fault,
    Material,
    WronglyAcceptedError,
    changed_json,
    damaged,
    no_file,
    run_command,
)


def faulty_recipe(chance: random.Random, material: Material) -> Fault:
    """A recipe that is changed, damaged or no file, or an override that no key takes."""
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


def faulty_checkpoint(chance: random.Random, material: Material) -> Fault:
    """Weights that are damaged, no file, or hold something else."""
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


def faulty_image(chance: random.Random, material: Material) -> Fault:
    """An image that is damaged, no file, of a strange size or called by another format."""
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


def faulty_bundle(chance: random.Random, material: Material) -> Fault:
    """A bundle in which one file is damaged, gone or no file, or whose card is changed."""
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


def faulty_record(chance: random.Random, material: Material) -> Fault:
    """A record of a bench or a run that is changed, damaged or no file."""
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
