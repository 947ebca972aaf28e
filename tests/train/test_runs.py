from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from rkd_deploy.errors import CheckpointError, ModelFileError, StorageError, UsageError
from rkd_deploy.recipe import Recipe, TrainRecipe, read_recipe
from rkd_deploy.train.log import RunLog, read_log
from rkd_deploy.train.networks import load_part
from rkd_deploy.train.runs import Run, create_run, newest_run, open_run


def begun(run: Run, seconds: float) -> Run:
    os.utime(run.folder / "recipe.toml", (seconds, seconds))
    return run


def finish(run: Run) -> Run:
    run.metrics_path.write_text("{}")
    return run


def test_runs_are_numbered_by_recipe(tmp_path: Path) -> None:
    a, b = Recipe(name="a"), Recipe(name="b[1]*")
    names = [create_run(tmp_path / "runs", recipe).folder.name for recipe in (a, b, a, b)]
    assert names == ["a-001", "b[1]*-001", "a-002", "b[1]*-002"]
    (tmp_path / "runs" / "a-041").mkdir()
    assert create_run(tmp_path / "runs", a).folder.name == "a-042"


def test_a_number_that_another_process_took_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, 2, 3):
        (tmp_path / f"a-00{number}").mkdir()
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [])  # as if they appeared after the look
    assert create_run(tmp_path, Recipe(name="a")).folder.name == "a-004"


def test_the_recipe_is_in_the_folder_and_comes_back(tmp_path: Path) -> None:
    recipe = Recipe(name="a", train=TrainRecipe(lr=0.25, seed=7))
    run = create_run(tmp_path, recipe)
    assert run.recipe == open_run(run.folder).recipe == recipe == read_recipe(run.folder / "recipe.toml")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(StorageError, match=rf"Could not write {re.escape(str(tmp_path))}/runs/a-001: "):
        create_run(tmp_path / "runs", Recipe(name="a"))


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is no run folder: it holds no recipe\.toml"):
        open_run(tmp_path)


def test_the_newest_is_the_one_begun_last(tmp_path: Path) -> None:
    runs = [
        begun(create_run(tmp_path, Recipe(name=name)), when) for name, when in (("a", 30.0), ("b", 50.0), ("c", 40.0))
    ]
    assert newest_run(tmp_path, finished=False) == runs[1]
    finish(runs[0])
    finish(runs[2])
    assert newest_run(tmp_path, finished=True) == runs[2]
    assert newest_run(tmp_path, finished=False) == runs[1]


def test_runs_begun_in_the_same_moment_go_by_number(tmp_path: Path) -> None:
    runs = [begun(create_run(tmp_path, Recipe(name="a")), 10.0) for _ in range(3)]
    assert newest_run(tmp_path, finished=False) == runs[2]


def test_without_a_run_the_way_to_one_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"There is no finished run in .*Make one with: rkd-deploy train"):
        newest_run(tmp_path / "absent", finished=True)
    run = create_run(tmp_path, Recipe(name="a"))
    with pytest.raises(ModelFileError, match=rf"finish it with rkd-deploy train {run.folder} --resume"):
        newest_run(tmp_path, finished=True)
    finish(run)
    with pytest.raises(ModelFileError, match=r"There is no unfinished run to resume in "):
        newest_run(tmp_path, finished=False)


def test_a_file_of_the_run_that_is_not_there_is_named(tmp_path: Path) -> None:
    run = create_run(tmp_path, Recipe(name="a"))
    with pytest.raises(ModelFileError, match=r"facts\.json cannot be read .*The run is not finished: .* --resume"):
        run.read_json("facts.json")
    finish(run)
    (run.folder / "facts.json").write_text('{"cut of')
    with pytest.raises(ModelFileError, match=r"facts\.json cannot be read \(.*\)\.$"):
        run.read_json("facts.json")


# The log


def test_the_log_is_one_object_a_line(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl")
    assert (log.size(), read_log(log.path)) == (0, [])
    log.append("epoch", phase="s0", val_top1=None)
    log.append("epoch", phase="s0", val_top1=12.5)
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert lines == read_log(log.path) == [{"event": "epoch", "phase": "s0", "val_top1": v} for v in (None, 12.5)]
    assert log.size() == log.path.stat().st_size


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl")
    log.append("epoch", epoch=1)
    with log.path.open("a") as stream:
        stream.write('{"event": "epo')
    assert read_log(log.path) == [{"event": "epoch", "epoch": 1}]


def test_rewinding_forgets_what_came_after(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl")
    log.rewind(10)  # nothing there yet
    log.append("epoch", epoch=1)
    size = log.size()
    log.append("epoch", epoch=2)
    log.rewind(size + 10_000)
    assert [row["epoch"] for row in read_log(log.path)] == [1, 2]
    log.rewind(size)
    assert [row["epoch"] for row in read_log(log.path)] == [1]


@pytest.mark.parametrize(("phase", "left"), [("s0", ["teacher"]), ("student", ["teacher", "s0", "s0"])])
@pytest.mark.parametrize("tail", ["", '{"event": "epoch", "pha'])
def test_a_phase_is_forgotten_and_those_before_it_are_not(
    tmp_path: Path, phase: str, left: list[str], tail: str
) -> None:
    log = RunLog(tmp_path / "log.jsonl")
    log.forget(phase)  # nothing there yet
    for name in ("teacher", "s0", "s0"):
        log.append("epoch", phase=name)
    with log.path.open("a") as stream:
        stream.write(tail)
    log.forget(phase)
    log.append("epoch", phase="next")
    assert [row["phase"] for row in read_log(log.path)] == [*left, "next"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_an_error_of_storage() -> None:
    with pytest.raises(StorageError, match=r"Could not write /dev/full: No space left on device"):
        RunLog(Path("/dev/full")).append("epoch", epoch=1)


# Typed readers: whatever a file of a run may hold, one error that names it


@pytest.mark.parametrize("content", ["[]", "null", "{}", '"x"', "[" * 100_000, '{"parts": NaN}'])
@pytest.mark.parametrize("name", ["facts", "metrics"])
def test_a_file_without_what_it_must_have_is_one_error(tmp_path: Path, name: str, content: str) -> None:
    run = create_run(tmp_path, Recipe(name="a"))
    (run.folder / f"{name}.json").write_text(content)
    with pytest.raises(ModelFileError, match=rf"{name}\.json cannot be read \("):
        getattr(run, name)


def test_facts_and_metrics_come_back_as_they_were_written(tiny_run: Run) -> None:
    for name in ("facts", "metrics"):
        text = (tiny_run.folder / f"{name}.json").read_text()
        assert json.loads(json.dumps(getattr(tiny_run, name).to_json())) == json.loads(text)


def test_facts_and_metrics_of_an_older_run_are_read(tiny_run: Run, tmp_path: Path) -> None:
    """Runs of earlier versions have no hashes; baselines have no separation."""
    shutil.copytree(tiny_run.folder, tmp_path / "old")
    for name, keys in (("metrics", ("test_sha256", "files")), ("facts", ("separation", "given"))):
        content = json.loads((tmp_path / "old" / f"{name}.json").read_text())
        for key in keys:
            content.pop(key, None)
        (tmp_path / "old" / f"{name}.json").write_text(json.dumps(content))
    old = Run(tmp_path / "old")
    assert old.facts.separation is None
    assert old.metrics.parts["fused"].test_top1 == tiny_run.metrics.parts["fused"].test_top1


def test_a_file_that_changed_since_the_run_ended_is_refused(tiny_run: Run, tmp_path: Path) -> None:
    """One bit of the weights, or a class of another name: the accuracy in metrics.json is no longer that of the run."""
    for name in ("weights/teacher.safetensors", "weights/assistant.safetensors", "facts.json"):
        shutil.copytree(tiny_run.folder, tmp_path / name / "run")
        run = Run(tmp_path / name / "run")
        for part in ("teacher", "fused"):
            load_part(run, part)
        content = bytearray((run.folder / name).read_bytes())
        content[-20] ^= 1
        (run.folder / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"{name} is not the file that this run ended with"):
            load_part(Run(run.folder), "teacher" if "teacher" in name else "fused")
