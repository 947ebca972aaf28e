"""Says which networks of several runs are the same, or seeds of one, and what each is called."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rkd_deploy.errors import UsageError
from rkd_deploy.recipe import Recipe
from rkd_deploy.storage import sha256_of
from rkd_deploy.train.facts import PartMetrics, PhaseMetrics, RunMetrics
from rkd_deploy.train.networks import PARTS, phase_of
from rkd_deploy.train.runs import Run


@dataclass(frozen=True)
class TrainedNetwork:
    """One trained network of one run."""

    run: Run
    part: str
    weights: tuple[str, ...]
    """Part, SHA-256 of its file, and of S0's where it is held against S0: S alone and S + A lie in the same file."""
    metrics: RunMetrics
    """Results of the run."""

    @property
    def results(self) -> PartMetrics:
        """Results of this network."""
        return self.metrics.parts[self.part]


def networks_of(run: Run) -> Iterable[TrainedNetwork]:
    """The networks of a finished run, with what tells whether two are the same."""
    metrics = run.metrics
    for part in metrics.parts:
        weights = [part, weights_sha256(run, phase_of(run.recipe, part))]
        # The row has points over S0: the same S beside another S0 is another row.
        if part in ("student", "fused", "control") and "s0" in metrics.parts:
            weights.append(weights_sha256(run, phase_of(run.recipe, "s0")))
        yield TrainedNetwork(run, part, tuple(weights), metrics)


def weights_sha256(run: Run, phase: str) -> str:
    """Checksum of the weights that a phase gave; of given weights, that of the run's own copy."""
    return sha256_of(run.weights(phase))


def distinct_networks(networks: Iterable[TrainedNetwork]) -> list[TrainedNetwork]:
    """The networks without those whose weights came before: runs share a T or an S0 that was given to both."""
    known: dict[tuple[str, ...], TrainedNetwork] = {}
    for network in networks:
        known.setdefault(network.weights, network)
    return list(known.values())


def check_same_test(runs: Sequence[Run]) -> None:
    """Refuse runs that were judged on other images: their accuracies are not comparable.

    Raises:
        UsageError: Data, number, size, classes or pixels of their test images differ.
    """
    first, *others = ((run, _judged_on(run)) for run in runs)
    for run, judged_on in others:
        for what, ours in first[1].items():
            theirs = judged_on[what]
            if ours is not None and theirs is not None and ours != theirs:
                raise UsageError(
                    f"{first[0].folder} and {run.folder} were tested on different images: {what} "
                    f"{_short(ours)} and {_short(theirs)}. Compare runs of the same data, data.test_limit and "
                    "data.split_seed."
                )


def _judged_on(run: Run) -> dict[str, Any]:
    """What the accuracies of a run were measured on; None where an older run does not say."""
    facts = run.facts
    return {
        "data": facts.data,
        "number of test images": facts.images.test,
        "image size": facts.image_size,
        "classes": facts.classes,
        "images and labels, SHA-256": run.metrics.test_sha256 or None,
    }


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def recipe_without_seed(network: TrainedNetwork) -> str:
    """The tables that decided how a network was trained, as a key: seeds of one network have the same.

    Given weights count by their content: the same file may lie on two paths, and two files on one path, one after the
    other.
    """
    run, recipe = network.run, network.run.recipe
    # By the key, not by the recipe: what a network does not depend on (of T all of [student], say) must not keep its
    # seeds apart.
    content = dataclasses.asdict(dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, seed=0)))
    for table, phase in (("teacher", "teacher"), ("student", "s0")):
        if content[table]["checkpoint"] is not None and run.weights(phase).is_file():
            content[table]["checkpoint"] = weights_sha256(run, phase)
    tables = {key: content[key] for key in ("data", "train")}
    if network.part == "teacher":
        tables["teacher"] = content["teacher"]
    elif network.part == "s0" and recipe.method.loss == "none":
        tables |= {key: content["student"][key] for key in ("name", "checkpoint")}
    elif network.part == "s0":
        tables |= {"name": content["student"]["name"], "teacher": content["teacher"], "method": content["method"]}
    else:
        tables |= {key: content[key] for key in ("teacher", "student", "method")}
    return json.dumps([network.part, tables], sort_keys=True)


def method_of(recipe: Recipe, part: str) -> str:
    """How a network of a run was trained, in the words of the recipe."""
    method, table = recipe.method, recipe.teacher if part == "teacher" else recipe.student
    if part in ("teacher", "s0") and table.checkpoint is not None:
        return f"{table.name}, given"
    if part == "teacher":
        return table.name
    if part == "s0":
        if not method.residual:
            return method.name
        return "cross_entropy" if method.loss == "none" else f"cross_entropy + {method.loss}"
    chain = f", {recipe.student.assistants} assistants" if recipe.student.assistants > 1 else ""
    head = "" if method.head in (None, "teacher") else f", head {method.head}"
    trunk = ", trunk" if recipe.student.layout == "trunk" and part != "control" else ""
    return method.scheme + ("" if method.loss == "none" else f" + {method.loss}") + chain + trunk + head


def row_order(network: TrainedNetwork) -> tuple[int, str, int]:
    """T, then S0 by cross-entropy, then other S0, then by method S alone beside S + A."""
    part, method = network.part, method_of(network.run.recipe, network.part)
    if part in ("teacher", "s0"):
        plain = method in ("cross_entropy",) or method.endswith("given")
        return ("teacher", "s0").index(part), "" if plain else method, 0
    return 2, method, list(PARTS)[::-1].index(part)


def row_names(networks: Sequence[TrainedNetwork]) -> list[str]:
    """A name for each; where the recipes' words do not tell two apart, the run's name does."""
    names = [f"{PARTS[network.part]}, {method_of(network.run.recipe, network.part)}" for network in networks]
    return [
        f"{name} ({network.run.folder})" if names.count(name) > 1 else name
        for name, network in zip(names, networks, strict=True)
    ]


def phases_of(network: TrainedNetwork) -> list[PhaseMetrics]:
    """The log's summary of the phases that trained a network, in order; none where its weights were given."""
    phases = network.metrics.phases
    if network.part in ("teacher", "s0"):
        return [phases[network.part]] if network.part in phases else []
    controls = {name: phase for name, phase in phases.items() if name.startswith("control")}
    if network.part == "control":
        return list(controls.values())
    of_method = {name: phase for name, phase in phases.items() if name not in ("teacher", "s0", *controls)}
    # S is what phases of its own gave (one, or one a stage), where it is not trained along with A.
    students = [phase for name, phase in of_method.items() if name.endswith("student")]
    return students if network.part == "student" and students else list(of_method.values())
