"""Table `[method]` of a recipe: what is trained, and by which losses."""

from __future__ import annotations

from dataclasses import dataclass

from rkd_deploy.errors import RecipeError
from rkd_deploy.recipe.rules import ReadWhere, check_keys, key, rising

BASE_LOSSES = ("kd", "fitnet", "at", "dkd", "reviewkd", "simkd")
"""Losses of other papers: beside the residual ones for S, or alone for S0."""

SCHEMES = ("sequential", "progressive", "end_to_end")
"""Orders in which S, its assistants and the head are trained."""

HEADS = ("teacher", "trained", "finetuned")
DISTANCE_NAMES = ("relative", "mse", "normalised_mse", "smooth_l1", "cosine")

_RESIDUAL = ReadWhere('with method.name = "residual"', lambda method: method.residual)
_END_TO_END = ReadWhere(f'{_RESIDUAL.words} and method.scheme = "end_to_end"', lambda method: method.end_to_end)
_NOT_PROGRESSIVE = ReadWhere(
    f'{_RESIDUAL.words} and method.scheme = "sequential" or "end_to_end"',
    lambda method: method.residual and method.scheme != "progressive",
)
_SEVERAL_STAGES = ReadWhere(
    f"{_RESIDUAL.words} and two stages or more in method.stages",
    lambda method: method.residual and len(method.stages) > 1,
)
_WITH_LOSS = ReadWhere(
    "with a base loss (method.base) or a baseline's (method.name)", lambda method: method.loss != "none"
)
_WITH_CE = ReadWhere(
    f"{_END_TO_END.words}, or by a baseline with a loss of its own",
    lambda method: method.end_to_end or (method.loss != "none" and not method.residual),
)


def _of_loss(*losses: str) -> ReadWhere:
    return ReadWhere("by " + " and ".join(f'"{loss}"' for loss in losses), lambda method: method.loss in losses)


@dataclass(frozen=True, kw_only=True)
class MethodRecipe:
    """Table `[method]`: what is trained, and how; a key that the method does not read keeps its default."""

    name: str = key("residual", choices=("residual", "cross_entropy", *BASE_LOSSES))
    """residual: S and A within S0's cost. cross_entropy, kd, fitnet, at, dkd, reviewkd, simkd: a baseline, S0 itself
    trained with that loss (simkd ships a projector on top of S0)."""
    scheme: str = key("sequential", choices=SCHEMES, read=_RESIDUAL)
    """sequential: S, then A on what S leaves over, then (if it learns) the head. progressive: the same stage by stage,
    the sum of both maps feeding the next stage; a phase for each stage of each. end_to_end: all losses at once."""
    head: str | None = key(None, choices=HEADS, read=_RESIDUAL)
    """teacher: T's classifier, reused as it is. trained: a fresh one, by cross-entropy on the finished features.
    finetuned: the same, starting from T's. Under end_to_end it learns along with the rest. Default: finetuned in
    end_to_end, else teacher."""
    distance: str = key("relative", choices=DISTANCE_NAMES, read=_RESIDUAL)
    """D: relative (squared error over the mean square of T's map: the share not explained), mse, normalised_mse (image
    by image over its target's square), smooth_l1 or cosine (directions only: lengths are not learnt)."""
    feature_weight: float | None = key(None, low=1e-6, read=_RESIDUAL)
    """w, factor of D in the loss. Default: 1 in end_to_end, beside a task loss of 1, else 5, as in the code of ERA's
    authors."""
    stages: tuple[int, ...] = key((), low=1, read=_NOT_PROGRESSIVE)
    """S0's stages, from 1 and the last among them, at which D is taken, by adapters that do not ship. Default: the last
    alone. Not for progressive, which takes every stage."""
    stage_weight: float = key(1.0, low=0, read=_SEVERAL_STAGES)
    """v, factor of D at the stages before the last, beside w."""
    base: str | None = key(None, choices=("none", *BASE_LOSSES), read=_RESIDUAL)
    """X, a further loss: none, kd, fitnet, at, dkd, reviewkd, simkd. For S, and in end_to_end for the sum; with
    cross-entropy for the control S0. Default: dkd in end_to_end, else none."""
    base_weight: float | None = key(None, low=1e-9, read=_WITH_LOSS)
    """Factor of the base loss, or of the baseline's. Default: the published one."""
    base_warmup_epochs: int | None = key(None, low=0, read=_WITH_LOSS)
    """Epochs over which that factor rises linearly. Default: the published share of all epochs (20 of 240 for dkd and
    reviewkd, else 0)."""
    ce_weight: float | None = key(None, low=0, read=_WITH_CE)
    """c, factor of cross-entropy in end_to_end or in a baseline. Default: the published one of the loss beside it."""
    student_weight: float = key(0.0, low=0, read=_END_TO_END)
    """v, factor of the task loss (cross-entropy and X) on S alone, beside that on the sum, in end_to_end: above 0 for
    early exit, where S answers easy images."""
    assistant_weight: float = key(1.0, low=0, read=_END_TO_END)
    """alpha, factor of the assistants' D beside S's, in end_to_end."""
    step_decay: float = key(0.5, low=0, high=1, read=_END_TO_END)
    """d: the D of assistant i in a chain counts d^(i - 1), in end_to_end."""
    detach: bool = key(True, read=_END_TO_END)
    """Stop the gradient at the residual, in end_to_end: then S does not learn from what A cannot."""
    temperature: float = key(4.0, low=1e-3, read=_of_loss("kd", "dkd"))
    """tau, of kd and dkd."""
    standardise: bool = key(False, read=_of_loss("kd", "dkd"))
    """Standardise logits in kd and dkd; published with temperature = 2 and base_weight = 9."""
    dkd_alpha: float = key(1.0, low=0, read=_of_loss("dkd"))
    """Weight of the target class in dkd."""
    dkd_beta: float = key(2.0, low=0, read=_of_loss("dkd"))
    """Weight of the other classes in dkd; its authors take 2 for ResNet-56 to ResNet-20 and 8 for most other pairs."""
    hint_stage: int = key(2, low=1, read=_of_loss("fitnet"))
    """Stage that fitnet compares, from 1."""
    simkd_factor: int = key(2, low=1, read=_of_loss("simkd"))
    """f, by which simkd's projector is narrower in its middle."""

    def __post_init__(self) -> None:
        situation = f'method.name = "{self.name}"'
        if self.residual:
            situation += f', scheme = "{self.scheme}", base = "{self.loss}"'
        check_keys("method", self, situation)
        rising("method.stages", self.stages)
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
