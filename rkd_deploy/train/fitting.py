"""`fit`: trains what a recipe asks for, phase after phase, into one run folder.

A phase (`phases.py`) whose weights are in the run folder is done and is loaded; the first one that is not goes on from
the checkpoint. The test images are used once, at the end.
"""

from __future__ import annotations

import dataclasses
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rkd_deploy.bench.accuracy import top1
from rkd_deploy.bench.machine import provenance
from rkd_deploy.data.loader import Loader, Normaliser, Share, train_loader
from rkd_deploy.data.sources import AnySplit, ImageSet, load_images, on_device
from rkd_deploy.errors import InterruptedTraining, RecipeError, UsageError
from rkd_deploy.models.adapters import with_norms
from rkd_deploy.models.cost import count
from rkd_deploy.recipe import Recipe, TrainRecipe
from rkd_deploy.signals import StopRequest
from rkd_deploy.storage import write_json
from rkd_deploy.train import networks
from rkd_deploy.train.display import Silent, draw_curves, with_tensorboard
from rkd_deploy.train.distributed import Group, process_group, restarted
from rkd_deploy.train.evaluation import SplitHash, batches, predictions
from rkd_deploy.train.facts import PartMetrics, PhaseMetrics, RunFacts, RunMetrics, WeightsFacts
from rkd_deploy.train.log import read_epochs
from rkd_deploy.train.loop import Display, train_phase
from rkd_deploy.train.networks import Networks, Originals
from rkd_deploy.train.phases import Plan, Planner
from rkd_deploy.train.preparation import check_named_files, data_of, gather_facts
from rkd_deploy.train.runs import DEFAULT_ROOT, Run, RunLock, Series, create_run, runs_of
from rkd_deploy.train.starting_weights import (
    load_published_weights,
    load_weights_from,
    refuse_guessing,
    teacher_warning,
)
from rkd_deploy.train.state import Phase
from rkd_deploy.train.verdict import CONTROLS, pairs_of
from rkd_deploy.train.weights import load_tensors, load_weights, save_tensors


def fit(recipe: Recipe, *, root: Path = DEFAULT_ROOT, display: Display | None = None) -> Run:
    """Train what a recipe asks for.

    Under torchrun every process calls this, and only the first one writes and shows anything (docs/distributed.md). A
    command that torchrun or Slurm started again goes on with the run that it began.

    Args:
        recipe: What to train (`rkd_deploy.recipe`).
        root: The run folder is made in here.
        display: Shown to a person; default: nothing.

    Returns:
        The finished run.

    Raises:
        RkdError: What is wrong with the recipe, the data or a checkpoint; found before a run folder is made, where
            that can be.
    """
    with process_group() as group:
        if group.any(restarted()) and (
            begun := group.on_main(lambda: [run for run in runs_of(root, recipe) if not run.finished])
        ):
            return resume(begun[-1], display=display)
        device = _device(recipe.train, group)
        group.on_main(lambda: check_named_files(recipe))
        images = _load_images(recipe, group)
        display = display or Silent()
        originals = _originals(recipe, images)
        # By one process: widths that come of a latency measured twice would differ from process to process.
        facts = group.on_main(lambda: gather_facts(recipe, images, originals, display.note))
        # Loads the named weights, so that bad ones leave no run behind.
        trainer = _Trainer(recipe, facts, originals, images, device, group, display.note)
        run = group.on_main(lambda: create_run(root, recipe))
        with _held(run, group):
            group.on_main(lambda: _write_facts(run, facts))
            return trainer.run(run, display)


def resume(run: Run, *, display: Display | None = None) -> Run:
    """Go on with an unfinished run where its checkpoint stands; a finished one is given back as it is."""
    with process_group() as group:
        if group.on_main(lambda: run.finished):
            return run
        with _held(run, group):
            if group.on_main(lambda: run.finished):  # by another process, just now
                return run
            recipe = run.recipe
            images = _load_images(recipe, group, run)
            display = display or Silent()
            originals = _originals(recipe, images)
            facts = group.on_main(lambda: _facts(run, images, originals, display))
            trainer = _Trainer(recipe, facts, originals, images, _device(recipe.train, group), group, display.note)
            return trainer.run(run, display)


@contextmanager
def _held(run: Run, group: Group) -> Iterator[None]:
    """Keep other commands from training the run while the block runs; one lock for all processes of this command."""
    lock = RunLock(run)
    group.on_main(lock.acquire)
    try:
        yield
    finally:
        lock.release()


def _load_images(recipe: Recipe, group: Group, run: Run | None = None) -> ImageSet:
    data = group.on_main(lambda: data_of(recipe, run if run and (run.folder / "facts.json").exists() else None))
    if group.size > 1:  # the first one alone, so that data which are not there are downloaded once
        group.on_main(lambda: bool(load_images(data, recipe.train.seed)))
    return load_images(data, recipe.train.seed)


def _originals(recipe: Recipe, images: ImageSet) -> Originals:
    return networks.build_originals(recipe, len(images.classes), images.image_size)


def _facts(run: Run, images: ImageSet, originals: Originals, display: Display) -> RunFacts:
    if not (run.folder / "facts.json").exists():  # killed in its first moments
        _write_facts(run, gather_facts(run.recipe, images, originals, display.note))
    return run.facts


def _write_facts(run: Run, facts: RunFacts) -> None:
    write_json(run.folder / "environment.json", dataclasses.asdict(provenance()))
    write_json(run.folder / "facts.json", facts.to_json())


class _Trainer:
    """Holds the networks and the data of one `fit`."""

    def __init__(
        self,
        recipe: Recipe,
        facts: RunFacts,
        originals: Originals,
        images: ImageSet,
        device: torch.device,
        group: Group,
        note: Callable[[str], None],
    ) -> None:
        if recipe.train.threads is not None:
            torch.set_num_threads(recipe.train.threads)
        self.recipe, self.facts, self.device, self.group = recipe, facts, device, group
        self.normalise = Normaliser(images.mean, images.std, device)
        self.train, self.val, self.test = (
            on_device(split, device) for split in (images.train, images.val, images.test)
        )
        self.nets = networks.build_networks(recipe, facts, originals, device)
        _check_pieces(recipe.train, len(self.train), group, self.nets)
        self.planner = Planner(recipe, facts, self.nets)
        self.planner.check()
        self.ready: dict[str, nn.Module] = {}
        self._load_starting_weights(note if group.rank == 0 else lambda text: None)

    def run(self, run: Run, display: Display) -> Run:
        """Train every phase that is not done yet, then evaluate; returns the finished run."""
        display = with_tensorboard(display, run, self.recipe.train) if self.group.rank == 0 else Silent()
        for name, module in self.ready.items():
            self.group.on_main(partial(self._keep_starting_weights, run, name, module))
        with StopRequest() as stop:
            for plan in self.planner.plans(set(self.ready)):
                self._phase(plan, run, display, stop)
        self.group.on_main(lambda: self._finish(run, display))
        return run

    def _phase(self, plan: Plan, run: Run, display: Display, stop: StopRequest) -> None:
        if not self.group.on_main(lambda: run.weights(plan.name).exists()):
            # A seed for each phase: a resumed run skips those that are done, and draws for this one what it would have.
            torch.manual_seed(networks.derived_seed(self.recipe.train.seed, plan.name))
            phase = Phase(plan.name, plan.method(), plan.product, plan.epochs, self._val_top1)
            how = self.recipe.train if plan.lr is None else replace(self.recipe.train, lr=plan.lr)
            average = train_phase(phase, self._loader(plan.name), how, run, display, stop, self.group)
            self.group.on_main(lambda: self._keep_phase(run, plan, average, display))
        # Also after training: statistics of batch norm are those of rank 0 on all of them, and what ships is built on.
        state, _ = self.group.on_main(lambda: load_tensors(run.weights(plan.name)))
        load_weights(plan.product, with_norms(state, plan.product), str(run.weights(plan.name)), plan.name)

    def _loader(self, phase: str) -> Loader:
        return train_loader(
            self.recipe.data,
            self.train,
            self.normalise,
            classes=len(self.facts.classes),
            batch_size=self.recipe.train.batch_size,
            seed=networks.derived_seed(self.recipe.train.seed, phase),
            share=Share(self.group.rank, self.group.size),
        )

    def _load_starting_weights(self, note: Callable[[str], None]) -> None:
        recipe = self.recipe
        if recipe.student.checkpoint is not None and self.nets.s0 is None:
            raise RecipeError("student.checkpoint is set and student.baseline is false: set one of them otherwise.")
        for table, part, module in (
            ("teacher", "teacher", self.nets.teacher),
            ("student", "s0", self.nets.s0),
        ):
            settings = getattr(recipe, table)
            if module is not None and settings.pretrained:
                complete = load_published_weights(module, table, settings.name, self.facts)
                if complete and part == "teacher":  # S0's go on being trained: it is what S and A are compared with
                    self.ready[part] = module
                    self._check_sanity(module, table, f"{settings.name}, pretrained", True)
            checkpoint = settings.checkpoint
            if checkpoint is None or module is None:
                continue
            known = load_weights_from(module, table, checkpoint, recipe, self.facts, note)
            self.ready[part] = module
            self._check_sanity(module, table, checkpoint, known)

    def _check_sanity(self, module: nn.Module, table: str, checkpoint: str, known: bool) -> None:
        split = self.val or self.train
        split = split.take(torch.arange(min(1000, len(split))))
        refuse_guessing(f"{table} {checkpoint}", self._top1(module, split, name=table), len(split), self.facts, known)

    def _val_top1(self, module: nn.Module | None) -> float | None:
        if module is None or not len(self.val):
            return None
        return self._top1(module, self.val)

    def _top1(self, module: nn.Module, split: AnySplit, name: str | None = None) -> float:
        return top1(predictions(module, split, self.normalise, name=name).numpy(), split.labels_N.cpu().numpy())

    def _keep_starting_weights(self, run: Run, name: str, module: nn.Module) -> None:
        if not run.weights(name).exists():
            self._keep(run, name, module.state_dict())

    def _keep_phase(self, run: Run, plan: Plan, average: dict[str, torch.Tensor] | None, display: Display) -> None:
        """Write the weights of a finished phase: those that ship last, because a phase that has them is done."""
        last = plan.product.state_dict()
        if average is not None:
            ships, other = (average, last) if self.recipe.train.ship == "ema" else (last, average)
            self._keep(run, f"{plan.name}_{networks.other_weights(self.recipe)}", other)
            last = ships
        draw_curves(run, self.recipe)
        if plan.name == "teacher":
            self._warn_of_guessing(run, display)
        self._keep(run, plan.name, last)

    def _warn_of_guessing(self, run: Run, display: Display) -> None:
        last_epoch = read_epochs(run.log.path)[-1]
        if warning := teacher_warning(last_epoch, len(self.val), self.facts.classes, self.recipe):
            run.log.append("warning", **warning)
            display.note(f"Warning: {warning['text']}")

    def _keep(self, run: Run, name: str, state: Mapping[str, torch.Tensor]) -> None:
        facts = WeightsFacts(network=name, classes=self.facts.classes, mean=self.facts.mean, std=self.facts.std)
        save_tensors(run.weights(name), state, dataclasses.asdict(facts))

    def _finish(self, run: Run, display: Display) -> None:
        run.checkpoint.unlink(missing_ok=True)  # before the run counts as finished: a kill in between leaves no rest
        write_json(run.metrics_path, self._metrics(run, display).to_json())

    def _metrics(self, run: Run, display: Display) -> RunMetrics:
        began, names = time.perf_counter(), networks.parts_of(self.recipe)
        display.phase("test", 1, len(names) * batches(self.test), 0)
        right: dict[str, npt.NDArray[np.bool_]] = {}
        judged = SplitHash(self.test.image_size)
        parts = {}
        for part in names:
            # All parts are judged on the same images, which are decoded anew for each: hashed along with the first.
            add = judged.add if part == names[0] else lambda images_NCHW: None
            parts[part] = self._tested(run, part, display, right, add)
        phases = _phases(run)
        pairs = {}
        if (fused := right.get("fused")) is not None:
            pairs = {part: pairs_of(fused.tolist(), right[part].tolist()) for part in CONTROLS if part in right}
        return RunMetrics(
            parts=parts,
            pairs=pairs,
            phases=phases,
            training_seconds=sum(phase.seconds for phase in phases.values()),
            evaluation_seconds=time.perf_counter() - began,
            peak_memory_mb=_peak_memory_mb(self.device),
            test_sha256=judged.finish(self.test.labels_N),
            files=run.sealed_files(),
        )

    def _tested(
        self,
        run: Run,
        part: str,
        display: Display,
        right: dict[str, npt.NDArray[np.bool_]],
        add: Callable[[torch.Tensor], None],
    ) -> PartMetrics:
        def step(images_NCHW: torch.Tensor) -> None:
            add(images_NCHW)
            display.step()

        module = networks.load_part(run, part).to(self.device)
        cost = count(module, self.facts.image_size)
        predicted = predictions(module, self.test, self.normalise, step, networks.PARTS[part]).numpy()
        labels = self.test.labels_N.cpu().numpy()
        right[part] = predicted == labels
        metrics = PartMetrics(
            test_top1=top1(predicted, labels),
            test_images=len(self.test),
            parameters=cost.parameters,
            macs=cost.macs,
            unsupported_operators=tuple(cost.unsupported),
        )
        other = networks.other_weights(self.recipe)
        if other is None or not run.weights(f"{networks.phase_of(self.recipe, part)}_{other}").exists():
            return metrics
        module = networks.load_part(run, part, other).to(self.device)
        top1_of_other = self._top1(module, self.test, name=networks.PARTS[part])
        return (
            replace(metrics, test_top1_ema=top1_of_other)
            if other == "ema"
            else replace(metrics, test_top1_last=top1_of_other)
        )


def _phases(run: Run) -> dict[str, PhaseMetrics]:
    """Results of every phase, from the log: its last epoch, which ships, and its best on the held-out images."""
    phases: dict[str, PhaseMetrics] = {}
    for row in read_epochs(run.log.path):
        phase = phases.get(row.phase, PhaseMetrics(epochs=0, seconds=0.0))
        top1 = row.val_top1
        phase = replace(
            phase,
            epochs=row.epoch,
            seconds=phase.seconds + row.seconds,
            val_top1_last=top1,
            val_top1_ema_last=row.val_top1_ema,
        )
        if top1 is not None and top1 > (-1.0 if phase.val_top1_best is None else phase.val_top1_best):
            phase = replace(phase, val_top1_best=top1, best_epoch=row.epoch)
        phases[row.phase] = phase
    return phases


def _peak_memory_mb(device: torch.device) -> float:
    """Largest memory used on the GPU, or by this process on a CPU, in 10^6 bytes; of a resumed run, since then."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def _device(recipe: TrainRecipe, group: Group) -> torch.device:
    """The device of this process.

    Raises:
        RecipeError: No such device; or the recipe asks for what only CUDA does, on another.
    """
    name = recipe.device
    if name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{group.local_rank}" if group.size > 1 else "cuda"
    try:
        device = torch.device("cpu" if name == "auto" else name)
    except RuntimeError as error:
        raise RecipeError(f"train.device = {name!r} is no PyTorch device; write auto, cpu, cuda or cuda:1.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RecipeError(f"train.device = {name!r}, and PyTorch sees no CUDA device here. Write auto or cpu.")
    if device.type == "cuda" and group.size > 1:
        torch.cuda.set_device(device)
    _check_device(recipe, device, group)
    return device


def _check_device(recipe: TrainRecipe, device: torch.device, group: Group) -> None:
    for key in ("cuda_graphs", "sync_batchnorm"):
        if getattr(recipe, key) and device.type != "cuda" and (key == "cuda_graphs" or group.size > 1):
            raise RecipeError(f"train.{key} = true works on CUDA only, and this runs on {device.type}. Leave it out.")
    if recipe.cuda_graphs and group.size > 1:
        raise RecipeError(f"train.cuda_graphs = true is for one process, and there are {group.size}. Leave it out.")


def _check_pieces(recipe: TrainRecipe, images: int, group: Group, nets: Networks) -> None:
    """Refuse batches that cannot be cut into pieces, or into pieces too small for batch norm.

    Raises:
        RecipeError: The batch is no multiple of the pieces, or a piece is one image and a network has batch norm.
    """
    pieces, batch = group.size * recipe.accumulate, min(recipe.batch_size, images)
    if batch % pieces:
        raise RecipeError(
            f"train.batch_size = {batch} counts the images of all processes: {group.size} processes with "
            f"train.accumulate = {recipe.accumulate} need a multiple of {pieces}."
        )
    trained = (nets.teacher, nets.s0, nets.model, nets.control)
    norms = (m for net in trained if net is not None for m in net.modules() if isinstance(m, _BatchNorm))
    # The variance of one value is nothing: PyTorch refuses it where maps are 1 x 1, and else normalises image by image.
    if batch == pieces and not recipe.sync_batchnorm and next(norms, None) is not None:
        raise RecipeError(
            f"train.batch_size = {batch} in {pieces} pieces (processes times train.accumulate = {recipe.accumulate}) "
            f"leaves one image in each, and batch norm needs two or more. Set train.batch_size to {2 * pieces} or "
            "more, or train.accumulate to less."
        )


def fit_series(
    recipe: Recipe,
    seeds: Sequence[int],
    *,
    root: Path = DEFAULT_ROOT,
    display: Display | None = None,
    resumed: bool = False,
) -> Series:
    """Train a recipe once with each seed; train.seed is replaced.

    Args:
        recipe: What to train (`rkd_deploy.recipe`).
        seeds: Two or more, each once.
        root: Folder of runs.
        display: Shows each run in turn.
        resumed: Go on with a series that was interrupted: runs of this recipe and these seeds that are finished are
            taken as they are, unfinished ones are resumed.

    Raises:
        UsageError: Fewer than two seeds, or one of them twice.
        RkdError: As `fit`.
    """
    if len(seeds) < 2 or len(set(seeds)) < len(seeds):
        raise UsageError(f"seeds {list(seeds)}: a standard deviation needs two or more, each once, e.g. --seeds 0,1,2.")
    recipes = [dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, seed=seed)) for seed in seeds]
    with process_group() as group:
        runs = []
        for seeded in recipes:
            begun = group.on_main(partial(runs_of, root, seeded)) if resumed else []
            try:
                runs.append(resume(begun[-1], display=display) if begun else fit(seeded, root=root, display=display))
            except InterruptedTraining as error:
                raise InterruptedTraining(f"{error} (or the whole series: the same command with --resume)") from error
        return group.on_main(lambda: _summed_up(tuple(seeds), tuple(runs), root))


def _summed_up(seeds: tuple[int, ...], runs: tuple[Run, ...], root: Path) -> Series:
    parts = {}
    for part, first in runs[0].metrics.parts.items():
        accuracies = [run.metrics.parts[part].test_top1 for run in runs]
        parts[part] = {
            "test_top1": accuracies,
            "mean": mean(accuracies),
            "std": stdev(accuracies),
            "test_images": first.test_images,
            "macs": first.macs,
            "parameters": first.parameters,
        }
    series = Series(seeds, runs, parts, root / f"series-{runs[0].folder.name}.json")
    write_json(series.path, series.to_dict())
    return series
