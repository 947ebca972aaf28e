"""Table `[method]` of a recipe, and which of its keys goes with which. Standard library only."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from rkd_deploy.errors import RecipeError
from rkd_deploy.recipe.rules import MOST, check_types, choice, in_range, rising, toml_value

BASE_LOSSES = ("kd", "fitnet", "at", "dkd", "reviewkd", "simkd")
"""Losses of other papers: beside the residual ones for S, or alone for S0."""

SCHEMES = ("sequential", "progressive", "end_to_end")
"""Orders in which S, its assistants and the head are trained."""

_WITH_RESIDUAL = 'with method.name = "residual"'
_WITH_END_TO_END = f'{_WITH_RESIDUAL} and method.scheme = "end_to_end"'
_WITH_LOSS = "with a base loss (method.base) or a baseline's (method.name)"
_READ_WHERE = {
    **dict.fromkeys(("scheme", "head", "distance", "feature_weight", "base"), _WITH_RESIDUAL),
    **dict.fromkeys(("base_weight", "base_warmup_epochs"), _WITH_LOSS),
    "stages": f'{_WITH_RESIDUAL} and method.scheme = "sequential" or "end_to_end"',
    "stage_weight": f"{_WITH_RESIDUAL} and two stages or more in method.stages",
    "ce_weight": f"{_WITH_END_TO_END}, or by a baseline with a loss of its own",
    **dict.fromkeys(("student_weight", "assistant_weight", "step_decay", "detach"), _WITH_END_TO_END),
    "temperature": 'by "kd" and "dkd"',
    "standardise": 'by "kd" and "dkd"',
    **dict.fromkeys(("dkd_alpha", "dkd_beta"), 'by "dkd"'),
    "hint_stage": 'by "fitnet"',
    "simkd_factor": 'by "simkd"',
}


@dataclass(frozen=True, kw_only=True)
class MethodRecipe:
    """Table `[method]`: what is trained, and how. A key that the method has no use for must keep its default."""

    name: str = "residual"
    """residual: S and A within S0's cost. cross_entropy, kd, fitnet, at, dkd, reviewkd, simkd: a baseline, S0 itself
    trained with that loss (simkd ships a projector on top of S0)."""
    scheme: str = "sequential"
    """sequential: S, then A on what S leaves over, then (if it learns) the head. progressive: the same stage by stage,
    the sum of both maps feeding the next stage; a phase for each stage of each. end_to_end: all losses at once."""
    head: str | None = None
    """teacher: T's classifier, reused as it is. trained: a fresh one, by cross-entropy on the finished features.
    finetuned: the same, starting from T's. Under end_to_end it learns along with the rest. Default: finetuned in
    end_to_end, else teacher."""
    distance: str = "relative"
    """D: relative (squared error over the mean square of T's map: the share not explained), mse, normalised_mse (image
    by image over its target's square), smooth_l1 or cosine (directions only: lengths are not learnt)."""
    feature_weight: float | None = None
    """w, factor of D in the loss. Default: 1 in end_to_end, beside a task loss of 1, else 5, as in the code of ERA's
    authors."""
    stages: tuple[int, ...] = ()
    """S0's stages, from 1 and the last among them, at which D is taken, by adapters that do not ship. Default: the last
    alone. Not for progressive, which takes every stage."""
    stage_weight: float = 1.0
    """v, factor of D at those before the last, beside w."""
    base: str | None = None
    """X, a further loss: none, kd, fitnet, at, dkd, reviewkd, simkd. For S, and in end_to_end for the sum; with
    cross-entropy for the control S0. Default: dkd in end_to_end, else none."""
    base_weight: float | None = None
    """Factor of the base loss, or of the baseline's. Default: the published one."""
    base_warmup_epochs: int | None = None
    """Epochs over which that factor rises linearly. Default: the published share of all epochs (20 of 240 for dkd and
    reviewkd, else 0)."""
    ce_weight: float | None = None
    """c, factor of cross-entropy in end_to_end or in a baseline. Default: the published one of the loss beside it."""
    student_weight: float = 0.0
    """v, factor of the task loss (cross-entropy and X) on S alone, beside that on the sum, in end_to_end: above 0 for
    early exit, where S answers easy images."""
    assistant_weight: float = 1.0
    """alpha, factor of the assistants' D beside S's, in end_to_end."""
    step_decay: float = 0.5
    """d: the D of assistant i in a chain counts d^(i - 1), in end_to_end."""
    detach: bool = True
    """Stop the gradient at the residual, in end_to_end: then S does not learn from what A cannot."""
    temperature: float = 4.0
    """tau, of kd and dkd."""
    standardise: bool = False
    """Standardise logits in kd and dkd; published with temperature = 2 and base_weight = 9."""
    dkd_alpha: float = 1.0
    """Weight of the target class in dkd."""
    dkd_beta: float = 8.0
    """Weight of the other classes in dkd; its authors take 2 for ResNet-56 to ResNet-20."""
    hint_stage: int = 2
    """Stage that fitnet compares, from 1."""
    simkd_factor: int = 2
    """f, by which simkd's projector is narrower in its middle."""

    def __post_init__(self) -> None:
        check_types("method", self)
        choice("method.name", self.name, ("residual", "cross_entropy", *BASE_LOSSES))
        choice("method.scheme", self.scheme, SCHEMES)
        choice("method.head", self.classifier, ("teacher", "trained", "finetuned"))
        choice("method.distance", self.distance, ("relative", "mse", "normalised_mse", "smooth_l1", "cosine"))
        choice("method.base", self.base or "none", ("none", *BASE_LOSSES))
        for name, low in (("feature_weight", 1e-6), ("base_weight", 1e-9), ("base_warmup_epochs", 0), ("ce_weight", 0)):
            if (value := getattr(self, name)) is not None:
                in_range(f"method.{name}", value, low, MOST)
        rising("method.stages", self.stages, 1, MOST)
        for name in ("stage_weight", "student_weight", "assistant_weight", "dkd_alpha", "dkd_beta"):
            in_range(f"method.{name}", getattr(self, name), 0, MOST)
        in_range("method.step_decay", self.step_decay, 0, 1)
        in_range("method.temperature", self.temperature, 1e-3, MOST)
        in_range("method.hint_stage", self.hint_stage, 1, MOST)
        in_range("method.simkd_factor", self.simkd_factor, 1, MOST)
        self._check_use()
        self._check_progressive()
        self._check_that_heads_learn()

    @property
    def residual(self) -> bool:
        """Whether S and A are trained; else S0 alone."""
        return self.name == "residual"

    @property
    def end_to_end(self) -> bool:
        """Whether S, A and the head learn at once."""
        return self.residual and self.scheme == "end_to_end"

    @property
    def classifier(self) -> str:
        """What the head is: teacher, trained or finetuned."""
        return self.head if self.head is not None else "finetuned" if self.end_to_end else "teacher"

    @property
    def distance_weight(self) -> float:
        """Factor of D in the loss: where D stands alone it may be larger than beside a task loss of 1."""
        return self.feature_weight if self.feature_weight is not None else 1.0 if self.end_to_end else 5.0

    @property
    def loss(self) -> str:
        """The borrowed loss, be it a base or a baseline's: a name of `BASE_LOSSES`, or none."""
        if self.residual:
            return self.base if self.base is not None else "dkd" if self.end_to_end else "none"
        return "none" if self.name == "cross_entropy" else self.name

    def _check_use(self) -> None:
        """A setting that nothing reads is a misunderstanding: say so before hours of training."""
        end_to_end, borrowed = self.end_to_end, self.loss != "none"
        read = {
            "name": True,
            "scheme": self.residual,
            "head": self.residual,
            "distance": self.residual,
            "feature_weight": self.residual,
            "stages": self.residual and self.scheme != "progressive",
            "stage_weight": self.residual and len(self.stages) > 1,
            "base": self.residual,
            "base_weight": borrowed,
            "base_warmup_epochs": borrowed,
            "ce_weight": end_to_end or (borrowed and not self.residual),
            "student_weight": end_to_end,
            "assistant_weight": end_to_end,
            "step_decay": end_to_end,
            "detach": end_to_end,
            "temperature": self.loss in ("kd", "dkd"),
            "standardise": self.loss in ("kd", "dkd"),
            "dkd_alpha": self.loss == "dkd",
            "dkd_beta": self.loss == "dkd",
            "hint_stage": self.loss == "fitnet",
            "simkd_factor": self.loss == "simkd",
        }
        for key in dataclasses.fields(self):
            value = getattr(self, key.name)
            if value == key.default or read[key.name]:
                continue
            what = f'method.name = "{self.name}"'
            if self.residual:
                what += f', scheme = "{self.scheme}", base = "{self.loss}"'
            default = "" if key.default is None else f", or --set method.{key.name}={toml_value(key.default)}"
            raise RecipeError(
                f"method.{key.name} = {toml_value(value)} has no effect with {what}: it is read only "
                f"{_READ_WHERE[key.name]}. Leave it out{default}."
            )

    def _check_progressive(self) -> None:
        """A stage is finished before the next one learns: a loss that spans stages comes too late for the first."""
        if self.residual and self.scheme == "progressive" and self.loss in ("fitnet", "reviewkd"):
            raise RecipeError(
                f'method.base = "{self.loss}" mixes maps of several stages, and method.scheme = "progressive" trains '
                "stage after stage. Use base none, kd, dkd, at or simkd, or another scheme."
            )

    def _check_that_heads_learn(self) -> None:
        if self.ce_weight != 0:
            return
        if self.residual and self.classifier != "teacher" and self.loss not in ("kd", "dkd"):
            raise RecipeError(
                f'method.ce_weight = 0 and method.base = "{self.loss}" leave nothing that trains a {self.classifier} '
                'head. Set method.ce_weight above 0, method.base = "kd" or "dkd", or method.head = "teacher".'
            )
        if self.name in ("fitnet", "at", "reviewkd"):
            raise RecipeError(
                f'method.ce_weight = 0 leaves nothing that trains the classifier: "{self.name}" compares feature maps. '
                "Set it above 0."
            )
