"""A rung of the ladder on one GPU: rows that learn at the same time share their batches and T's pass over them.

    PYTHONPATH=. python3 benchmarks/ladder_joint.py --data FOLDER --teacher cifar100_resnet56.pth --out FOLDER

First the settings are chosen (ladder_rows.py): short trainings on 45,000 training images of CIFAR-100, judged by the
other 5,000, for S0 with S + A's losses and for S + A alike. Then every row is trained with three seeds on all 50,000,
and the test images are classified once by each finished network. Networks and losses are the package's; what stands
here is a loop that records a step of each row as one CUDA graph and replays all of them on streams of their own. The
rows of a seed see the same images in the same order, so their differences are paired.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from ladder_loop import BATCH, MEAN, STD, Images, Joint, Learner, shipped_macs
from ladder_rows import BASELINES, EARLY, SAME_TRUNK, SEARCH, Row
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.datasets import CIFAR100

from rkd_deploy.bench.machine import provenance
from rkd_deploy.models import zoo
from rkd_deploy.models.residual import ResidualStudent, StudentAlone
from rkd_deploy.storage import write_json

SPLIT_SEED, HELD_OUT = 20261126, 5000


@torch.inference_mode()
def right(network: nn.Module, split: Split, device: torch.device) -> Tensor:
    """Which images a network in eval mode classifies right, in float32."""
    mean, std = (torch.tensor(v, device=device)[:, None, None] * 255 for v in (MEAN, STD))
    network.eval()
    answers = []
    for pixels in split.pixels.split(1000):  # type: ignore[no-untyped-call]
        x = (pixels.to(device).permute(0, 3, 1, 2).float() - mean) / std
        answers.append(network(x).argmax(1).cpu())
    return torch.cat(answers) == split.labels


@dataclass(frozen=True)
class Split:
    """Images as uint8 [N, 32, 32, 3] and labels [N]."""

    pixels: Tensor
    labels: Tensor

    def __getitem__(self, which: Tensor | slice) -> Split:
        return Split(self.pixels[which], self.labels[which])


@dataclass(frozen=True)
class Rung:
    """A pair of networks, its images, and where things go.

    Attributes:
        pair: T and S0 by name.
        T: On the device.
        train: All training images.
        kept: Those that are trained on while settings are chosen.
        held: Those that judge then.
        test: Classified once by each finished network.
        device: Where everything runs.
        out: Folder of the record and of weights.
        together: Rows that learn at the same time.
        batch: Images a step.
    """

    pair: str
    T: nn.Module
    train: Split
    kept: Split
    held: Split
    test: Split
    device: torch.device
    out: Path
    together: int
    batch: int

    @property
    def s0(self) -> str:
        """Name of S0."""
        return self.pair.split("_")[1]

    def joint(self, rows: Sequence[Row], seed: int, split: Split) -> Joint:
        """Rows about to learn."""
        return Joint(rows, self.s0, seed, self.T, Images(split.pixels, split.labels, self.device, self.batch))

    def macs(self, row: Row) -> int:
        """MACs of a row as it ships."""
        return shipped_macs(row, self.s0, cast(nn.Module, self.T.fc))


def search(rung: Rung, rows: Sequence[Row], epochs: int, until: float) -> list[dict[str, Any]]:
    """Held-out accuracy of every row, after a short training with seed 0."""
    lines: list[dict[str, Any]] = []
    for start in range(0, len(rows), rung.together):
        if time.time() > until:
            break
        began = time.perf_counter()
        joint = rung.joint(rows[start : start + rung.together], 0, rung.kept)
        recorded = time.perf_counter() - began
        seconds = [s for _, s in joint.train(epochs)]
        for learner in joint.learners:
            top1 = right(learner.network, rung.held, rung.device).float().mean().item() * 100
            line = {**asdict(learner.row), "kind": learner.row.kind, "held_out": top1, "macs": rung.macs(learner.row)}
            loss = learner.loss.item() / joint.images.steps
            lines.append(line | {"loss": loss if math.isfinite(loss) else None})  # JSON has no NaN
            print(f"{top1:6.2f} held out  {line['macs'] / 1e6:6.2f} MMAC  {learner.row.name}", flush=True)
        print(f"recorded in {recorded:.1f} s; epochs took {[round(s, 2) for s in seconds]} s", flush=True)
    return lines


def best(lines: Sequence[dict[str, Any]], kind: str, limit: float) -> list[Row]:
    """The row of a kind with the highest held-out accuracy, no dearer than a limit; none where there is no such row."""
    rivals = [line for line in lines if line["kind"] == kind and line["macs"] <= limit]
    if not rivals:
        return []
    fields = Row.__dataclass_fields__
    line = max(rivals, key=lambda rival: float(rival["held_out"]))
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in line.items() if k in fields}
    return [Row(**values)]


def final(rung: Rung, rows: Sequence[Row], seed: int, epochs: int, split: Split) -> list[dict[str, Any]]:
    """Train rows with one seed; classify the test images once."""
    joint = rung.joint(rows, seed, split)
    seconds = [s for _, s in joint.train(epochs)]
    print(f"seed {seed}: {epochs} epochs of {len(rows)} rows took {sum(seconds):.1f} s", flush=True)
    return [_judged(rung, learner, seed, seconds) for learner in joint.learners]


def _judged(rung: Rung, learner: Learner, seed: int, seconds: Sequence[float]) -> dict[str, Any]:
    row, network = learner.row, learner.network
    line = {**asdict(row), "kind": row.kind, "seed": seed, "epochs": len(seconds), "seconds": sum(seconds)}
    line |= {"macs": rung.macs(row), "parameters": sum(p.numel() for p in network.parameters())}
    line |= {"test_images": len(rung.test.labels)}
    parts: dict[str, nn.Module] = {"sum": network}
    if row.assistant is not None:
        parts["student"] = StudentAlone(cast(ResidualStudent, network))
    for part, judged in parts.items():
        ok = right(judged, rung.test, rung.device)
        line[f"{part}_top1"] = ok.float().mean().item() * 100
        line[f"{part}_right"] = np.packbits(ok.numpy()).tobytes().hex()  # for intervals of pairs
    if not row.own_head:
        state = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
        name = "".join(c if c.isalnum() else "_" for c in row.name)
        save_file(state, rung.out / f"{rung.pair}_{name}_{len(seconds)}_{seed}.safetensors")
    alone = f"{line['student_top1']:6.2f} S alone" if "student_top1" in line else " " * 14
    print(f"{line['sum_top1']:6.2f} test {alone}  {line['macs'] / 1e6:6.2f} MMAC  seed {seed}  {row.name}", flush=True)
    return line


def split_of(root: str, train: bool, limit: int | None) -> Split:
    """CIFAR-100."""
    images = CIFAR100(root, train=train, download=False)
    return Split(torch.from_numpy(images.data), torch.tensor(images.targets))[slice(limit)]


def rung_of(how: argparse.Namespace) -> Rung:
    """What the command line asks for."""
    device = torch.device(how.device)
    teacher, _ = how.pair.split("_")
    T = zoo.create(teacher, 100)
    T.load_state_dict(torch.load(how.teacher, map_location="cpu", weights_only=True))
    train, test = split_of(how.data, True, how.limit), split_of(how.data, False, how.limit)
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    count_held = min(HELD_OUT, len(order) // 4)
    held, kept = train[order[:count_held]], train[order[count_held:]]
    T = T.eval().to(device).to(memory_format=torch.channels_last)
    return Rung(how.pair, T, train, kept, held, test, device, how.out, how.together, how.batch)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pair", choices=SEARCH, default="resnet56_resnet20")
    parser.add_argument("--data", required=True, help="folder with cifar-100-python/")
    parser.add_argument("--teacher", required=True, help="its weights")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=7.0, help="no training begins that would end later")
    parser.add_argument("--search-epochs", type=int, default=9)
    parser.add_argument("--search-minutes", type=float, default=2.5)
    parser.add_argument("--epochs", type=int, default=18)
    parser.add_argument("--batch", type=int, default=BATCH, help="images a step; the rates follow it")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--together", type=int, default=8)
    parser.add_argument("--limit", type=int, help="fewer images, to try it out")
    parser.add_argument("--chosen", type=Path, help="record of a search that is done: it is not done again")
    parser.add_argument("--kinds", nargs="*", default=["sum", "timed", "control", "no A", "same trunk", "baseline"])
    parser.add_argument(
        "--early",
        nargs="*",
        metavar="PART",
        help="train what early exit is judged by, too: rows with one of these in their name",
    )
    return parser.parse_args()


def main() -> None:
    """Choose, train, judge, write."""
    how, began = arguments(), time.time()
    torch.backends.cudnn.benchmark = True
    how.out.mkdir(parents=True, exist_ok=True)
    rung = rung_of(how)
    record: dict[str, Any] = {"theme": "ladder_joint", "provenance": asdict(provenance()), "batch": how.batch}
    record["settings"] = {
        key: value.name if isinstance(value, Path) else str(value)
        for key, value in vars(how).items()
        if key not in ("data", "teacher", "out")
    }

    def write() -> None:
        write_json(how.out / f"ladder_joint_{how.pair}.json", record)

    if how.chosen:
        record["search"] = json.loads(how.chosen.read_text())["search"]
    else:
        record["search"] = search(rung, SEARCH[how.pair], how.search_epochs, began + 60 * how.search_minutes)
    write()
    limit = rung.macs(Row("S0", own_head=True)) * 1.001
    fixed = {"baseline": BASELINES, "same trunk": SAME_TRUNK[how.pair]}
    chosen = [row for kind in how.kinds for row in fixed.get(kind) or best(record["search"], kind, limit)]
    record["rows"], took = [], 0.0
    plans = [(chosen, rung.train, seed) for seed in how.seeds]
    if how.early is not None:
        early = [row for row in EARLY if not how.early or any(part in row.name for part in how.early)]
        plans = [*plans[:1], *((early, rung.kept, seed) for seed in how.seeds), *plans[1:]]
    for rows, split, seed in plans:
        if not rows or (start := time.time()) + took > began + 60 * how.minutes:
            continue
        record["rows"] += final(rung, rows, seed, how.epochs, split)
        took = time.time() - start
        write()
    print(f"ended after {time.time() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
