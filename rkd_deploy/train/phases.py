"""Which phases a recipe asks for, in order, and what each one trains.

teacher      T by cross-entropy, where the recipe gives no checkpoint and something imitates T
s0           S0: the control at the same cost, or the baseline itself
control      S0 by S's losses, under T's head: it tells what A adds; then control_head, where there is a phase head
student      scheme sequential: S imitates T's map
assistant    A_1 learns what S leaves over; then assistant_2, ...
head         a head of its own, where the recipe asks for one
end_to_end   scheme end_to_end: S, the assistants and the head at once
stage_1_student, stage_1_assistant, stage_2_student, ..
             scheme progressive: the stages before the last; the last one's phases are student, assistant, ..
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

from rkd_deploy.models.progressive import ProgressiveStudent
from rkd_deploy.models.residual import ResidualStudent
from rkd_deploy.models.separation.inheritance import inherit_weights
from rkd_deploy.models.staged import FeatureNetwork
from rkd_deploy.recipe import Recipe
from rkd_deploy.train import networks
from rkd_deploy.train.facts import RunFacts
from rkd_deploy.train.methods import base_loss
from rkd_deploy.train.methods.base import Method, WeightedLoss
from rkd_deploy.train.methods.baseline import CrossEntropy, Distilled
from rkd_deploy.train.methods.end_to_end import EndToEnd, Weights
from rkd_deploy.train.methods.progressive import ProgressiveStep
from rkd_deploy.train.methods.residual import DISTANCES, AssistantStep, HeadStep, StudentStep
from rkd_deploy.train.methods.simkd import ReusedClassifier


@dataclass(frozen=True)
class PlannedPhase:
    """A phase that is yet to be built: building it freezes and unfreezes, so it waits for its turn."""

    name: str
    product: nn.Module
    epochs: int
    method: Callable[[], Method]
    lr: float | None = None
    """Peak learning rate. Default: that of the recipe's loop."""


@dataclass(frozen=True)
class Planner:
    """Turns a recipe and its networks into phases.

    Attributes:
        recipe: What is asked for.
        facts: Facts of the run (`preparation.gather_facts`).
        nets: Networks of the run.
    """

    recipe: Recipe
    facts: RunFacts
    nets: networks.Networks

    def plans(self, ready: set[str]) -> Iterator[PlannedPhase]:
        """The phases in order, but for the networks that are ready."""
        recipe, nets, epochs = self.recipe, self.nets, self.recipe.train.epochs
        if nets.teacher is not None and "teacher" not in ready:
            method = functools.partial(CrossEntropy, nets.teacher)
            yield PlannedPhase("teacher", nets.teacher, recipe.teacher.epochs or epochs, method, recipe.teacher.lr)
        if nets.s0 is not None and "s0" not in ready:
            yield PlannedPhase("s0", nets.s0, epochs, functools.partial(self._s0, nets.s0))
        if nets.control is not None:
            yield from self._control(nets.control)
        if nets.model is not None:
            first, *others = self._residual(nets.model)
            # Inheriting belongs to the first phase's method, which is built at its turn: S0, the source, may be trained
            # before.
            yield dataclasses.replace(first, method=functools.partial(self._begun, nets.model, first.method))
            yield from others

    def _control(self, model: ResidualStudent) -> Iterator[PlannedPhase]:
        method, train = self.recipe.method, self.recipe.train
        learn = functools.partial(self._end_to_end if method.end_to_end else self._student, model)
        yield PlannedPhase("control", model, train.epochs, functools.partial(self._begun, model, learn))
        if networks.phase_of(self.recipe, "control") == "control_head":
            head = functools.partial(self._head, model)
            yield PlannedPhase("control_head", model, train.head_epochs or train.epochs, head)

    def _begun(self, model: ResidualStudent | ProgressiveStudent, method: Callable[[], Method]) -> Method:
        """The first method of S and A, built after they inherited weights: their source may be trained in this run."""
        # Between the stages of scheme progressive lie fresh adapters, behind which trained weights are worth nothing.
        if self.recipe.student.inherits and isinstance(model, ResidualStudent):
            source = self._teacher() if self.recipe.student.fraction is not None else self.nets.s0
            assert isinstance(source, FeatureNetwork)
            branches = [model.student_network(), *(branch for branch, _ in model.branches()[1:])]
            inherit_weights(branches, source, self.facts.image_size, self.facts.shared_stages or 0)
        return method()

    def check(self) -> None:
        """Build the borrowed loss once for nothing, so that one which does not fit these networks leaves no run behind.

        Raises:
            RecipeError: It does not fit.
        """
        with networks.seeded(self.recipe.train.seed, "check"):
            if self.nets.model is not None:
                self._base_of(self.nets.model)
            elif self.recipe.method.loss != "none" and self.nets.s0 is not None:
                self._borrowed(self.nets.s0)

    def _residual(self, model: ResidualStudent | ProgressiveStudent) -> Iterator[PlannedPhase]:
        recipe, epochs = self.recipe, self.recipe.train.epochs
        if isinstance(model, ProgressiveStudent):
            yield from self._progressive(model)
        elif recipe.method.scheme == "end_to_end":
            yield PlannedPhase("end_to_end", model, epochs, functools.partial(self._end_to_end, model))
            return
        else:
            yield from self._sequential(model)
        if recipe.method.classifier != "teacher":
            yield PlannedPhase("head", model, recipe.train.head_epochs or epochs, functools.partial(self._head, model))

    def _sequential(self, model: ResidualStudent) -> Iterator[PlannedPhase]:
        epochs = self.recipe.train.epochs
        yield PlannedPhase("student", model, epochs, functools.partial(self._student, model))
        for number in range(1, self.recipe.student.assistants + 1):
            method = functools.partial(self._assistant, model, number)
            yield PlannedPhase(
                networks.assistant_phase(number), model, self.recipe.train.assistant_epochs or epochs, method
            )

    def _progressive(self, model: ProgressiveStudent) -> Iterator[PlannedPhase]:
        epochs, stages = self.recipe.train.epochs, len(model.steps)
        for stage in range(1, stages + 1):
            for branch in range(self.recipe.student.assistants + 1):
                name = networks.assistant_phase(branch) if branch else "student"
                yield PlannedPhase(
                    name if stage == stages else f"stage_{stage}_{name}",
                    model,
                    (self.recipe.train.assistant_epochs or epochs) if branch else epochs,
                    functools.partial(self._step, model, stage, branch),
                )

    def _s0(self, s0: FeatureNetwork) -> Method:
        method = self.recipe.method
        if self.recipe.student.fraction is not None and self.recipe.student.inherits:
            narrowed = s0.backbone if isinstance(s0, ReusedClassifier) else s0
            inherit_weights([narrowed], self._teacher(), self.facts.image_size)
        if method.loss == "none":
            return CrossEntropy(s0)
        if isinstance(s0, ReusedClassifier):
            s0.fc.load_state_dict(self._teacher_head().state_dict())
        base = self._borrowed(s0)
        # A baseline is the published loss in its published balance, so that its row can be held against the paper's.
        ce_weight = base.loss.ce_weight if method.ce_weight is None else method.ce_weight
        # As a control S0 has a head of its own, which SimKD would leave untrained: its published weight of CE is 0.
        if method.residual:
            ce_weight = base.loss.ce_weight or 1.0
        return Distilled(self._teacher(), s0, base, ce_weight)

    def _student(self, model: ResidualStudent) -> Method:
        # Reused as it is, or until a head of its own is trained: S's progress can be read as an accuracy either way.
        if networks.needs_teacher_head(self.recipe) or type(self._teacher().fc) is nn.Linear:
            model.head.load_state_dict(self._teacher_head().state_dict())
        method = self.recipe.method
        return StudentStep(
            self._teacher(),
            model,
            method.distance_weight,
            distance=DISTANCES[method.distance],
            stage_weight=method.stage_weight,
            base=self._base_of(model),
        )

    def _step(self, model: ProgressiveStudent, stage: int, branch: int) -> Method:
        model.head.load_state_dict(self._teacher_head().state_dict())
        method = self.recipe.method
        return ProgressiveStep(
            self._teacher(),
            model,
            method.distance_weight,
            stage=stage,
            branch=branch,
            distance=DISTANCES[method.distance],
            base=None if branch else self._base_of(model),
        )

    def _assistant(self, model: ResidualStudent, number: int) -> Method:
        method = self.recipe.method
        return AssistantStep(
            self._teacher(),
            model,
            method.distance_weight,
            distance=DISTANCES[method.distance],
            stage_weight=method.stage_weight,
            number=number,
        )

    def _head(self, model: ResidualStudent | ProgressiveStudent) -> Method:
        if self.recipe.method.classifier == "trained":
            self._freshen(model.head)
        return HeadStep(model)

    def _end_to_end(self, model: ResidualStudent) -> Method:
        method, base = self.recipe.method, self._base_of(model)
        if method.classifier == "trained":  # drawn anew, so that a resumed run starts the head from the same weights
            self._freshen(model.head)
        else:
            model.head.load_state_dict(self._teacher_head().state_dict())
        ce_weight = method.ce_weight
        if ce_weight is None:  # the published one, but for losses that leave the classifier to another loss
            ce_weight = (base.loss.ce_weight if base is not None else 1.0) or 1.0
        return EndToEnd(
            self._teacher(),
            model,
            DISTANCES[method.distance],
            Weights(
                feature=method.distance_weight,
                assistant=method.assistant_weight,
                ce=ce_weight,
                student=method.student_weight,
                step_decay=method.step_decay,
                stage=method.stage_weight,
            ),
            detach=method.detach,
            train_head=method.classifier != "teacher",
            base=base,
        )

    def _base_of(self, model: ResidualStudent | ProgressiveStudent) -> WeightedLoss | None:
        if self.recipe.method.loss == "none":
            return None
        student = model.student_network() if isinstance(model, ResidualStudent) else model
        return self._borrowed(student)

    def _borrowed(self, network: nn.Module) -> WeightedLoss:
        recipe = self.recipe
        return base_loss(recipe.method, self._teacher(), network, self.facts.image_size, recipe.train.epochs)

    def _freshen(self, head: nn.Module) -> None:
        assert isinstance(head, nn.Linear)
        with networks.seeded(self.recipe.train.seed, "init/head"):
            head.reset_parameters()

    def _teacher(self) -> FeatureNetwork:
        assert self.nets.teacher is not None
        return self.nets.teacher

    def _teacher_head(self) -> nn.Module:
        head = self._teacher().fc
        assert head is not None
        return head
