"""S + A on real photos, end to end: T, S0, S + A in each layout, and the small networks a reader would take instead.

    PYTHONPATH=. python3 benchmarks/photos.py --data imagenette-224-subset.tar --out FOLDER --minutes 5 --jobs 3
    PYTHONPATH=. python3 benchmarks/photos.py --data imagenette-224-subset.tar --out FOLDER --minutes 5 --resume FOLDER
    uv run python benchmarks/photos.py --latency FOLDER/photos.json

First, on a GPU: every network learns from 800 photos of ten classes from scratch, T and S0 too, since no pretrained
weights are here; 200 photos of the train split choose T and every kind's own settings, by the first seed; the test
photos are classified once by each finished network. Rows that learn at the same time in one process share batches and
T's pass (photos_loop.py); --jobs processes run side by side, because building networks and small kernels leave a GPU
idle. FOLDER/photos.json is written anew after each of them, with T beside it, and --resume goes on. `--device cpu
--tiny` tries the whole path anywhere in minutes. Then, on a quiet CPU, --latency times each network as it ships
(photos_latency.py) and writes the record.
"""

from __future__ import annotations

import argparse
import base64
import copy
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Container
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from photos_loop import Builder, Joint, Photos, exits, logits
from photos_rows import TINY, Group, Row, Study, as_json, chosen_teacher, from_json, groups, row_of
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rkd_deploy.bench.machine import provenance
from rkd_deploy.data.sources import load_images
from rkd_deploy.data.splits import ImageSet, Split
from rkd_deploy.errors import RkdError
from rkd_deploy.export.fusion import fuse
from rkd_deploy.models.cost import count
from rkd_deploy.models.staged import FeatureNetwork
from rkd_deploy.recipe import DataRecipe
from rkd_deploy.storage import write_json

RECORD = "photos.json"
SPLIT_SEED, HELD_OUT = 0, 0.2
GRACE = 20
"""Seconds after the end in which a group that takes longer than others did may still be done."""
MOST_BROKEN = 1
"""Rows of a group that may be trained step by step, because no CUDA graph can be made of them."""
_LARGEST_FILE = 15 * 2**20
"""Bytes of one file of T's weights: what comes back from a lent machine comes in pieces."""


@dataclass(frozen=True)
class Scale:
    """How large the study is.

    Attributes:
        pixels: Side of the photos.
        epochs: Of every row.
        teacher_epochs: Of T.
        batch: Photos of an update.
        limit: Training photos; None: all of them.
    """

    pixels: int
    epochs: int
    teacher_epochs: int
    batch: int
    limit: int | None = None


@dataclass(frozen=True)
class Running:
    """A process that trains a group.

    Attributes:
        child: The process.
        group: What it trains.
        result: File that it writes in the end.
        began: When it began, by `time.time`.
    """

    child: subprocess.Popen[bytes]
    group: Group
    result: Path
    began: float


def main() -> None:
    """Train what is left to train; in a child process, one group."""
    how = arguments()
    if how.latency:
        from photos_latency import measure

        measure(how.latency)
    elif how.group:
        learn(how, from_json(json.loads(how.group.read_text(encoding="utf-8"))))
    else:
        conduct(how)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--latency", type=Path, metavar="RECORD", help="time the networks of a record on this CPU")
    parser.add_argument("--data", type=Path, help="folder of photos, or a tar file of it")
    parser.add_argument("--out", type=Path, default=Path("photos-record"), help="folder of the record")
    parser.add_argument("--resume", type=Path, help="folder of a record to go on with")
    parser.add_argument("--minutes", type=float, default=5.0, help="no training begins that would end later")
    parser.add_argument("--jobs", type=int, default=3, help="processes side by side")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--pixels", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--teacher-epochs", type=int, default=240)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tiny", action="store_true", help="the least of everything: figures mean nothing")
    parser.add_argument("--group", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def scale_of(how: argparse.Namespace) -> Scale:
    """The study's scale, as the command line has it."""
    if how.tiny:
        return Scale(64, 1, 1, 8, limit=30)
    return Scale(how.pixels, how.epochs, how.teacher_epochs, how.batch)


def conduct(how: argparse.Namespace) -> None:
    """Run groups of rows in processes of their own, by worth, until the time is over."""
    ends, out = time.time() + 60 * how.minutes, how.out
    out.mkdir(parents=True, exist_ok=True)
    source = how.resume or out
    record = begun(source)
    if record is None:
        record = {"theme": "photos", "groups": {}, "lines": [], "refused": {}, "calls": []}
        record["scale"] = asdict(scale_of(how))
    else:  # one scale a record, whatever this call says
        how.pixels, how.epochs, how.teacher_epochs, how.batch = (
            record["scale"][key] for key in ("pixels", "epochs", "teacher_epochs", "batch")
        )
    if source != out:
        for file in source.glob("teacher-*.safetensors"):
            (out / file.name).write_bytes(file.read_bytes())
    record["calls"].append(asdict(provenance()))
    study = TINY if how.tiny else Study()
    with tempfile.TemporaryDirectory(prefix="rkd-photos-") as scratch:
        folder = Path(scratch)
        how.data = unpacked(how.data, folder)
        running: dict[str, Running] = {}
        try:
            while time.time() < ends + GRACE:
                for key, process in list(running.items()):
                    if process.child.poll() is not None:
                        del running[key]
                        collect(record, study, process, out)
                waiting = startable(record, study, running, ends)
                for group in waiting[: max(0, how.jobs - len(running))]:
                    running[group.key] = start(how, group, folder, out)
                if not running and not startable(record, study, running, ends):
                    break
                time.sleep(0.2)
        finally:
            for process in running.values():
                process.child.kill()
                process.child.wait()
                print(f"cut off: {process.group.key}", flush=True)
    planned = [group.key for group in groups(study, record["lines"], record["groups"])]
    left = [key for key in planned if key not in record["groups"]]
    print(json.dumps({"record": str(out / RECORD), "left": left}), flush=True)


def begun(folder: Path) -> dict[str, Any] | None:
    """The record in a folder, without what failed or was refused: another version may do what this one could not."""
    if not (folder / RECORD).exists():
        return None
    record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    record["groups"] = {key: group for key, group in record["groups"].items() if group["trained"]}
    return record


def startable(record: dict[str, Any], study: Study, running: Container[str], ends: float) -> list[Group]:
    """Groups that can be trained now, by worth, and would be done in time as far as that is known."""
    T = bool(record.get("teacher"))
    took = [group["seconds"] for group in record["groups"].values() if group["trained"] > 1]
    if time.time() + (statistics.median(took) if took else 0) > ends:
        return []
    return [
        group
        for group in groups(study, record["lines"], record["groups"])
        if group.key not in record["groups"] and group.key not in running and (T or not group.needs_teacher)
    ]


def file_name(key: str) -> str:
    """A group's key as a file name."""
    return "".join(sign if sign.isalnum() else "_" for sign in key)


def unpacked(data: Path, folder: Path) -> Path:
    """The folder of photos."""
    if data.is_dir():
        return data.resolve()
    with tarfile.open(data) as archive:
        archive.extractall(folder / "data", filter="data")
    (inside,) = (folder / "data").iterdir()
    return inside


def start(how: argparse.Namespace, group: Group, folder: Path, out: Path) -> Running:
    """A process that trains a group."""
    name = file_name(group.key)
    (folder / f"{name}.group").write_text(json.dumps(as_json(group)), encoding="utf-8")
    command = [sys.executable, str(Path(__file__).resolve()), "--data", str(how.data), "--out", str(out.resolve())]
    command += ["--group", str(folder / f"{name}.group"), "--result", str(folder / f"{name}.result")]
    command += ["--device", how.device, "--pixels", str(how.pixels), "--epochs", str(how.epochs)]
    command += ["--teacher-epochs", str(how.teacher_epochs), "--batch", str(how.batch)]
    command += ["--tiny"] if how.tiny else []
    paths = [str(Path(__file__).resolve().parent.parent), *filter(None, os.environ.get("PYTHONPATH", "").split(":"))]
    environment = {**os.environ, "PYTHONPATH": ":".join(paths), "PYTHONUNBUFFERED": "1"}
    print(f"begins: {group.key}, {len(group.rows)} rows", flush=True)
    child = subprocess.Popen(command, env=environment, cwd=folder)
    return Running(child, group, folder / f"{name}.result", time.time())


def collect(record: dict[str, Any], study: Study, process: Running, out: Path) -> None:
    """Take a group's lines into the record; one that failed is not tried again in this call."""
    group, file, took = process.group, process.result, time.time() - process.began
    result: dict[str, Any] = {"lines": [], "refused": {}, "error": "it ended without a result"}
    if file.exists():
        result = json.loads(file.read_text(encoding="utf-8"))
    result["trained"] = len(result["lines"])
    record["scale"]["train"] = result.pop("train", None) or record["scale"].get("train")
    record["lines"] += result.pop("lines")
    record["labels"] = result.pop("labels", None) or record.get("labels")
    record["refused"] |= result.pop("refused")
    record["groups"][group.key] = result | {"seconds": took}
    if group.key == "T":
        T = chosen_teacher(study, record["lines"])
        record["teacher"] = None if T is None else asdict(T)
        if T is not None:
            keep_teacher(file.parent / f"candidate-{group.rows.index(T)}.safetensors", out)
    write_json(out / RECORD, record)
    print(f"ended: {group.key} after {took:.0f} s {result.get('error', '')}", flush=True)


def keep_teacher(file: Path, out: Path) -> None:
    """Keep T's weights beside the record, in half precision and in pieces."""
    state, pieces, size = load_file(file), [{}], 0  # type: ignore[var-annotated]
    for name, value in state.items():
        half = value.half() if value.is_floating_point() else value
        if size + (nbytes := half.numel() * half.element_size()) > _LARGEST_FILE:
            pieces, size = [*pieces, {}], 0
        pieces[-1][name] = half
        size += nbytes
    for place, piece in enumerate(pieces):
        save_file(piece, out / f"teacher-{place}.safetensors")


def images_of(how: argparse.Namespace, scale: Scale) -> ImageSet:
    """The photos, decoded once by the package; `val` is held out of the training photos."""
    recipe = DataRecipe(
        name="imagefolder",
        root=str(how.data),
        image_size=scale.pixels,
        val_fraction=HELD_OUT,
        train_limit=scale.limit,
        test_limit=scale.limit,
        cache="memory",
    )
    return load_images(recipe, SPLIT_SEED)


def learn(how: argparse.Namespace, group: Group) -> None:
    """Train the rows of a group and classify the held-out and the test photos once with each."""
    torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = True, 4
    torch.backends.cudnn.allow_tf32 = False
    torch.set_num_threads(1)  # where processes share cores, threads that wait for each other cost a hundredfold
    began, scale, device = time.time(), scale_of(how), torch.device(how.device)
    result: dict[str, Any] = {"lines": [], "refused": {}}
    try:
        images = images_of(how, scale)
        held, test = (cast(Split, split).labels_N.tolist() for split in (images.val, images.test))
        result["labels"] = {"held": held, "test": test}
        result["train"] = len(images.train)
        photos = Photos(images, scale.batch, device)
        builder, T = Builder(scale.pixels, len(images.classes)), None
        if group.needs_teacher:
            record = json.loads((how.out / RECORD).read_text(encoding="utf-8"))
            T = teacher(how.out, builder, row_of({"row": record["teacher"]}))
            builder = Builder(scale.pixels, len(images.classes), T)
        joint, macs = Joint(photos, copy.deepcopy(T)), {}
        for place in dict.fromkeys(row.place for row in group.rows):
            rows = [row for row in group.rows if row.place == place]
            try:
                network = builder(rows[0], group.seed)
                macs[place] = count(fuse(network, "tail"), scale.pixels).macs
            except RkdError as error:
                result["refused"][place] = str(error)
                print(f"refused: {place}: {str(error)[:200]}", flush=True)
                continue
            for row in rows:  # one seed: the same weights at first, whatever the settings
                joint.add(row, copy.deepcopy(network))
        broken = {learner.row.name: learner.broken for learner in joint.learners if learner.broken}
        if len(broken) > MOST_BROKEN:  # step by step they would take the time of all that comes after them
            raise RuntimeError(f"{len(broken)} steps cannot be recorded as CUDA graphs: {broken}")
        built = time.time() - began
        epochs = group.epochs or (scale.teacher_epochs if group.of_teacher else scale.epochs)
        seconds = joint.train(group.seed, epochs) if joint.learners else [0.0]
        result |= {"built_s": built, "epoch_s": statistics.median(seconds), "epochs": epochs, "broken": broken}
        torch.backends.cudnn.benchmark = False
        for learner in joint.learners:
            line = {"row": asdict(learner.row), "seed": group.seed, "epochs": epochs, "macs": macs[learner.row.place]}
            line["parameters"] = sum(p.numel() for p in learner.network.parameters())
            line["loss"] = learner.loss.item() / photos.steps
            result["lines"].append(line | judged(learner.network, images, photos))
            print(f"{line_in_words(result['lines'][-1])}", flush=True)
            if group.key == "T":
                save(learner.network, how.result.parent / f"candidate-{group.rows.index(learner.row)}.safetensors")
        print(f"{group.key}: built in {built:.1f} s, an epoch took {result['epoch_s']:.2f} s", flush=True)
    except Exception as error:
        traceback.print_exc()
        result["error"] = f"{type(error).__name__}: {error}"
    write_json(how.result, result)


def teacher(folder: Path, builder: Builder, row: Row) -> FeatureNetwork:
    """T with the weights that lie beside the record."""
    T = builder.create(row.network)
    state: dict[str, Tensor] = {}
    for file in sorted(folder.glob("teacher-*.safetensors")):
        state |= load_file(file)
    T.load_state_dict(state)
    return T.eval()


def save(network: nn.Module, file: Path) -> None:
    """The weights of a network."""
    save_file({key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}, file)


def judged(network: nn.Module, images: ImageSet, photos: Photos) -> dict[str, Any]:
    """Held-out accuracy, and logits of the held-out and the test photos, which nobody has looked at yet."""
    answers: dict[str, Any] = {}
    for split, name in ((images.val, "held"), (images.test, "test")):
        for part, module in exits(network).items():
            z = logits(module, cast(Split, split), photos)
            answers[f"{part}_{name}"] = encoded(z)
            if name == "held":
                right = z.argmax(1) == cast(Split, split).labels_N
                answers["held_out" if part == "sum" else "held_out_student"] = right.float().mean().item() * 100
    return answers


def encoded(z: Tensor) -> str:
    """Logits as text, in half precision."""
    return base64.b64encode(z.half().numpy().tobytes()).decode()


def line_in_words(line: dict[str, Any]) -> str:
    """A line of the record for people."""
    alone = f"{line['held_out_student']:6.2f} S alone" if "held_out_student" in line else " " * 14
    what = f"{line['macs'] / 1e6:7.1f} MMAC  loss {line['loss']:.3f}  seed {line['seed']}"
    return f"{line['held_out']:6.2f} held out {alone} {what}  {row_of(line).name}"


if __name__ == "__main__":
    main()
