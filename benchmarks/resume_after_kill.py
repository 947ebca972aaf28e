"""Kills training at random moments, resumes it, and compares with a run left alone.

    uv run python benchmarks/resume_after_kill.py [KILLS]

Every scheme of residual distillation, with a checkpoint after each epoch only and after each step, weight averages and
all. A process trains tiny networks on digits, is killed, another one goes on, and so on. In the end weights, log and
accuracies must be those of a run without a kill; the record counts what differs.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import FOLDER, Claim, save

from rkd_deploy.recipe import Recipe, read_recipe
from rkd_deploy.recipe.method import SCHEMES
from rkd_deploy.train.log import read_log
from rkd_deploy.train.runs import newest_run

NURSERY = FOLDER.parent / "tests" / "support" / "nursery.py"
EPOCH_ONLY, EACH_STEP = 60.0, 0.0


def main() -> None:
    """Kill and resume trainings, compare them, and write the record."""
    wanted = int(sys.argv[1]) if len(sys.argv) > 1 else 24
    variants = [(scheme, minutes) for scheme in SCHEMES for minutes in (EPOCH_ONLY, EACH_STEP)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parent)}
    with subprocess.Popen(
        [sys.executable, str(NURSERY)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as nursery:
        assert nursery.stdout is not None
        assert nursery.stdout.readline().strip() == "ready"
        claims = [_variant(nursery, *variant, -(-wanted // len(variants))) for variant in variants]
        assert nursery.stdin is not None
        nursery.stdin.close()
    kills = sum(int(claim.samples["kills"][0]) for claim in claims)
    save("resume_after_kill", [Claim("kill -9 in all", kills, "kills", None), *claims])


def _variant(nursery: subprocess.Popen[str], scheme: str, minutes: float, kills: int) -> Claim:
    """One scheme and one spacing of checkpoints, killed so many times."""
    recipe = _recipe(scheme, minutes)
    chance = random.Random(f"{scheme} {minutes}")
    moments: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        _, seconds = _train(nursery, recipe, whole, None, 0)
        while len(moments) < kills:
            after = chance.uniform(0, 1.6 * seconds / kills)
            code, _ = _train(nursery, recipe, killed, signal.SIGKILL, after)
            if code == -signal.SIGKILL:
                moments.append(after)
            elif code == 0:  # it was through before the signal: a fresh run, for the kills that are left
                killed = killed.with_name(f"killed-{len(moments)}")
            else:
                sys.exit(f"{scheme}: exit code {code} after {len(moments)} kills")
        while _train(nursery, recipe, killed, None, 0)[0] != 0:
            pass
        ends = [_outcome(root) for root in Path(folder).glob("killed*")]
        differing = [name for end in ends for name in _differences(end, _outcome(whole))]
    often = "each step" if minutes == EACH_STEP else "each epoch"
    what = f"files that differ after kills: {scheme}, a checkpoint {often}"
    print(f"{what}: {differing or 0} after {len(moments)} kills", file=sys.stderr)
    return Claim(what, len(differing), "files", 0, {"kills": [len(moments)], "killed_after_s": moments})


def _recipe(scheme: str, minutes: float) -> Recipe:
    values = {
        "name": "tiny",
        "data.image_size": 8,
        "data.train_limit": 100,
        "data.test_limit": 50,
        "data.crop_padding": 1,
        "teacher.name": "resnet8",
        "student.name": "resnet8",
        "method.scheme": scheme,
        "method.head": "trained",
        "train.epochs": 2,
        "train.batch_size": 16,
        "train.lr": 0.05,
        "train.ema_decay": 0.9,
        "train.clip_norm": 1.0,
        "train.device": "cpu",
        "train.threads": 1,
        "train.checkpoint_minutes": minutes,
    }
    return read_recipe(None, [f"{key}={value}" for key, value in values.items()])


def _train(
    nursery: subprocess.Popen[str], recipe: Recipe, root: Path, number: signal.Signals | None, after: float
) -> tuple[int, float]:
    """Train, or go on, in a process of its own; gives its exit code and how many seconds it trained."""
    assert nursery.stdin is not None
    assert nursery.stdout is not None
    task = {"root": str(root), "recipe": recipe.to_toml(), "signal": number, "after": after}
    print(json.dumps(task), file=nursery.stdin, flush=True)
    code, seconds = json.loads(nursery.stdout.readline())
    return code, seconds


def _outcome(root: Path) -> dict[str, Any]:
    """All that must not depend on kills, by file."""
    run = newest_run(root, finished=True)
    rows = read_log(run.log.path)
    files: dict[str, Any] = {path.name: path.read_bytes() for path in (run.folder / "weights").iterdir()}
    assert len(files) >= 4
    return files | {
        "log.jsonl": [{k: v for k, v in row.items() if k not in ("seconds", "images_per_s")} for row in rows],
        "metrics.json": run.read_json("metrics.json")["parts"],
        "facts.json": run.read_json("facts.json"),
        "recipe.toml": (run.folder / "recipe.toml").read_bytes(),
        "folder": sorted(path.name for path in run.folder.iterdir() if path.suffix != ".tmp"),
    }


def _differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    return [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]


if __name__ == "__main__":
    main()
