"""Two real processes that speak through gloo, against one that does all the work alone.

They are forked from a server that has the imports and nothing else: a process in which other tests ran their backward
passes may hold threads of autograd's, and PyTorch refuses to go on in a fork of such a one.
"""

from __future__ import annotations

import json
import multiprocessing
import operator
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
from torch import Tensor, nn

from rkd_deploy.data.loader import DeviceLoader, Normaliser, Share
from rkd_deploy.data.sources import Split
from rkd_deploy.errors import InterruptedTraining, RecipeError, RkdError, StorageError
from rkd_deploy.models import zoo
from rkd_deploy.models.residual import ResidualStudent
from rkd_deploy.models.trunk import parted
from rkd_deploy.recipe import Recipe, TrainRecipe
from rkd_deploy.signals import StopRequest
from rkd_deploy.train import fitting
from rkd_deploy.train.display import Silent
from rkd_deploy.train.distributed import ALONE, Group, StopVote, process_group, restarted
from rkd_deploy.train.log import read_log
from rkd_deploy.train.loop import train_phase
from rkd_deploy.train.methods.end_to_end import EndToEnd, Weights
from rkd_deploy.train.methods.residual import AssistantStep, mse
from rkd_deploy.train.networks import Networks
from rkd_deploy.train.runs import Run, create_run
from rkd_deploy.train.state import Phase
from rkd_deploy.train.weights import load_tensors

IMAGES, BATCH, EPOCHS = 24, 8, 2

SERVER = multiprocessing.get_context("forkserver")
# DistributedDataParallel imports torch._dynamo, which takes seconds: there once, not in every process.
SERVER.set_forkserver_preload(["torch._dynamo", "rkd_deploy.train.fitting"])
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the other processes cannot import tests


class ByValue:
    """Any function, a closure too, as what it does; arrives as the function itself."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __reduce__(self) -> tuple[Any, ...]:
        return cloudpickle.loads, (cloudpickle.dumps(self.function),)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def together(work: Callable[[Group], Any], folder: Path, seconds: float = 60) -> list[Any]:
    """What two processes give or raise, as (kind, value); one that has not ended by then fails the test."""
    port = free_port()

    def child(rank: int) -> None:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        try:
            with process_group() as group:
                outcome = ("value", work(group))
        except RkdError as error:
            outcome = (type(error).__name__, str(error))
        except BaseException:
            outcome = ("crash", traceback.format_exc())
        torch.save(outcome, folder / f"outcome-{rank}.pt")
        os._exit(0)

    processes = [SERVER.Process(target=operator.call, args=(ByValue(child), rank)) for rank in range(2)]
    for process in processes:
        process.start()
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
        if process.exitcode is None:
            process.kill()
            process.join()
            pytest.fail(f"a process hung for {seconds} s")
    return [torch.load(folder / f"outcome-{rank}.pt", weights_only=False) for rank in range(2)]


class Typed:
    """Another loader's batches in another floating type."""

    def __init__(self, loader: Any, dtype: torch.dtype) -> None:
        self.loader, self.dtype = loader, dtype

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, number: int, first_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for x_NCHW, y_N in self.loader.epoch(number, first_batch):
            yield x_NCHW.to(self.dtype), y_N


def without_batchnorm(module: nn.Module) -> nn.Module:
    """Its statistics are each process's own, so no sharing of a batch can equal the whole: group norm in its place."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.GroupNorm(1, child.num_features))
        else:
            without_batchnorm(child)
    return module


def end_to_end(dtype: torch.dtype, *, trunk: bool = False) -> EndToEnd:
    """S, A and the head learn at once from a frozen teacher, whose batch norm stays as it is."""
    torch.manual_seed(1)
    teacher, s0 = zoo.create("resnet8", 4), zoo.create("resnet8", 4)
    parts = [s0.rebuilt((8, 8, 8, 8), None) for _ in range(2)]
    join = (lambda *of: parted(*of[:2], 2, *of[2:])) if trunk else ResidualStudent
    model = join(parts[0], [parts[1]], teacher.channels, 4)
    without_batchnorm(model)
    weights = Weights(feature=1.0, assistant=1.0, ce=1.0, student=1.0, step_decay=0.5)
    return EndToEnd(teacher.to(dtype), model.to(dtype), mse, weights, detach=True, train_head=True)


def assistant_on_a_trunk(dtype: torch.dtype) -> AssistantStep:
    """A's end alone learns: the trunk runs and stands still."""
    joint = end_to_end(dtype, trunk=True)
    return AssistantStep(joint.teacher, joint.model, 1.0, distance=mse)


class StopAt(Silent):
    """Asks to stop in a step."""

    def __init__(self, stop: StopRequest, step: int) -> None:
        self.stop, self.left = stop, step

    def step(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.stop.signal_name = "SIGTERM"


def train(
    run: Run, group: Group, dtype: torch.dtype, stop_at: int = -1, make: Any = end_to_end, **how: Any
) -> dict[str, Tensor]:
    """Train for two epochs; the weights at the end, and the averaged ones."""
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (IMAGES, 3, 8, 8), dtype=torch.uint8, generator=generator)
    split = Split(images_NCHW=pixels, labels_N=torch.arange(IMAGES) % 4)
    normalise = Normaliser((0.5,) * 3, (0.25,) * 3, torch.device("cpu"))
    share = Share(group.rank, group.size)
    loader = DeviceLoader(
        split, normalise, batch_size=BATCH, augmentations=("flip",), crop_padding=0, seed=0, share=share
    )
    recipe = TrainRecipe(batch_size=BATCH, lr=0.05, weight_decay=1e-2, clip_norm=0.5, ema_decay=0.5, **how)
    method = make(dtype)
    phase = Phase("end_to_end", method, method.model, EPOCHS, lambda module: 42.0)
    stop = StopRequest()
    average = train_phase(phase, Typed(loader, dtype), recipe, run, StopAt(stop, stop_at), stop, group)
    assert average is not None
    return {
        **{key: value.clone() for key, value in method.model.state_dict().items()},
        **{f"average/{key}": value.clone() for key, value in average.items()},
        **{f"teacher/{key}": value.clone() for key, value in method.teacher.state_dict().items()},
    }


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("dtype", "tolerance", "how"),
    [
        (torch.float64, 1e-12, {}),
        (torch.float32, 2e-6, {}),
        (torch.float64, 1e-12, {"accumulate": 2}),
        (torch.float64, 1e-12, {"make": partial(end_to_end, trunk=True)}),
        (torch.float64, 1e-12, {"make": assistant_on_a_trunk}),
    ],
    ids=["float64", "float32", "accumulate", "trunk", "assistant on a trunk"],
)
def test_two_processes_equal_one(tmp_path: Path, dtype: torch.dtype, tolerance: float, how: dict[str, Any]) -> None:
    alone, shared = (create_run(tmp_path, Recipe(name=name)) for name in ("alone", "shared"))
    make = how.get("make", end_to_end)
    whole = train(alone, ALONE, dtype, make=make)
    untrained = make(dtype).model.state_dict()
    assert max((whole[key] - value).abs().max().item() for key, value in untrained.items()) > 1e-3  # it did learn
    outcomes = together(lambda group: train(shared, group, dtype, **how), tmp_path)
    for kind, weights in outcomes:
        assert kind == "value", weights
        assert_close(weights, whole, tolerance)
    timeless = [
        [{k: v for k, v in row.items() if k not in ("seconds", "images_per_s")} for row in read_log(run.log.path)]
        for run in (shared, alone)
    ]
    assert len(timeless[0]) == EPOCHS
    for ours, theirs in zip(*timeless, strict=True):
        assert (ours.pop("event"), ours.pop("phase")) == (theirs.pop("event"), theirs.pop("phase"))
        # A ratio of two means over a batch: of halves of it, the mean of ratios is another one.
        assert ours.pop("explained") == pytest.approx(theirs.pop("explained"), rel=0.1)
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_one_rank_that_is_asked_to_stop_stops_all_at_the_same_step(tmp_path: Path) -> None:
    """And what they leave is taken up by one process, which ends where one that never shared anything does."""
    alone, shared = (create_run(tmp_path, Recipe(name=name)) for name in ("alone", "shared"))
    outcomes = together(lambda group: train(shared, group, torch.float64, 1 if group.rank == 1 else -1), tmp_path)
    assert [kind for kind, _ in outcomes] == ["InterruptedTraining"] * 2
    assert "Stopped by a signal to another process" in outcomes[0][1]
    assert "Stopped by SIGTERM" in outcomes[1][1]
    _, facts = load_tensors(shared.checkpoint)
    assert (facts["epoch"], facts["batch"], facts["images"]) == (0, 2, 2 * BATCH)  # asked in step 1, heard after 2
    assert_close(train(shared, ALONE, torch.float64), train(alone, ALONE, torch.float64), 1e-12)
    rows = [read_log(run.log.path)[0] for run in (shared, alone)]
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-12)


def test_what_one_process_left_is_taken_up_by_two(tmp_path: Path) -> None:
    alone, shared = (create_run(tmp_path, Recipe(name=name)) for name in ("alone", "shared"))
    with pytest.raises(InterruptedTraining):
        train(shared, ALONE, torch.float64, 4)
    whole = train(alone, ALONE, torch.float64)
    for kind, weights in together(lambda group: train(shared, group, torch.float64), tmp_path):
        assert kind == "value", weights
        assert_close(weights, whole, 1e-12)
    assert read_log(shared.log.path)[1]["loss"] == pytest.approx(read_log(alone.log.path)[1]["loss"], rel=1e-12)


def test_a_rank_that_fails_does_not_leave_the_other_waiting(tmp_path: Path) -> None:
    class Broken(RuntimeError):
        pass

    def work(group: Group) -> None:
        run = group.on_main(lambda: create_run(tmp_path, Recipe(name="a")))
        if group.rank == 1:
            raise Broken
        train(run, group, torch.float32)

    began = time.monotonic()
    outcomes = together(work, tmp_path)
    assert [kind for kind, _ in outcomes] == ["crash", "crash"]
    assert "Broken" in outcomes[1][1]
    assert time.monotonic() - began < 30


def test_what_the_first_one_finds_reaches_all(tmp_path: Path) -> None:
    def fails(group: Group) -> None:
        def write() -> None:
            assert group.rank == 0
            raise StorageError("disk full")

        group.on_main(write)

    assert together(fails, tmp_path) == [("StorageError", "disk full")] * 2
    assert together(lambda group: group.on_main(lambda: {"rank": group.rank}), tmp_path) == [("value", {"rank": 0})] * 2


def test_votes_are_heard_by_all_after_the_same_step(tmp_path: Path) -> None:
    def work(group: Group) -> list[int]:
        stop_vote = StopVote(group)
        heard = [stop_vote.vote(wish) for wish in ([0, 2, 0, 0], [1, 0, 0, 0])[group.rank]]
        return [*heard, stop_vote.finish((0, 2)[group.rank]), stop_vote.finish(0)]

    assert together(work, tmp_path) == [("value", [0, 1, 2, 0, 2, 0])] * 2
    alone = StopVote(ALONE)
    assert [alone.vote(2), alone.vote(0), alone.finish(1)] == [2, 0, 1]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"batch_size": 9}, r"train\.batch_size = 9 counts the images of all processes: 2 processes .* multiple of 2"),
        ({"batch_size": 6, "accumulate": 3}, r"2 processes with train\.accumulate = 3 need a multiple of 6"),
    ],
)
def test_a_batch_that_cannot_be_shared_equally_is_refused(how: dict[str, Any], message: str) -> None:
    if "accumulate" in how:
        how = how | {"batch_size": 9}
    with pytest.raises(RecipeError, match=message):
        fitting._check_pieces(TrainRecipe(**how), 1000, Group(0, 2), Networks(None, None, None, None))


@pytest.mark.parametrize("key", ["cuda_graphs", "sync_batchnorm"])
def test_what_only_cuda_does_is_refused_elsewhere(key: str) -> None:
    with pytest.raises(RecipeError, match=rf"train\.{key} = true works on CUDA only, and this runs on cpu"):
        fitting._check_device(TrainRecipe(**{key: True}), torch.device("cpu"), Group(0, 2))


def test_a_restart_that_one_rank_knows_of_is_known_to_all(tmp_path: Path) -> None:
    """Each machine's torchrun counts the restarts that its own processes made necessary."""
    assert together(lambda group: group.any(group.rank == 1), tmp_path) == [("value", True)] * 2
    assert together(lambda group: group.any(False), tmp_path) == [("value", False)] * 2
    assert (ALONE.any(True), ALONE.any(False)) == (True, False)


@pytest.mark.parametrize("name", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_command_that_was_started_again_knows_it(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert not restarted()
    monkeypatch.setenv(name, "0")
    assert not restarted()
    monkeypatch.setenv(name, "1")
    assert restarted()


@pytest.mark.slow
def test_torchrun_starts_a_killed_rank_again(tmp_path: Path, tiny_recipe: Callable[..., Recipe]) -> None:
    """The whole way: two ranks, one run; a rank is killed, torchrun starts both again, and they finish that run."""
    recipe = tmp_path / "tiny.toml"
    how = ("student.baseline=false", "teacher.epochs=6", "train.epochs=1", "train.checkpoint_minutes=0.0")
    recipe.write_text(tiny_recipe(*how).to_toml())
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
    command += [f"--master-port={free_port()}", "-m", "rkd_deploy.cli", "train", str(recipe), "--json"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while not list(tmp_path.glob("runs/*/checkpoint.safetensors")):
            assert process.poll() is None
            time.sleep(0.01)
        workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
        os.kill(int(workers.stdout.split()[-1]), signal.SIGKILL)
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, err
    results = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert len(results) == 1  # rank 0 alone is_main_process
    (folder,) = (tmp_path / "runs").iterdir()
    run = Run(folder)
    assert run.finished
    epochs = {"teacher": 6, "student": 1, "assistant": 1}
    assert [(row["phase"], row["epoch"]) for row in read_log(run.log.path)] == [
        (phase, epoch + 1) for phase, count in epochs.items() for epoch in range(count)
    ]
    assert results[0]["parts"]["teacher"]["test_top1"] > 20  # chance is 10
