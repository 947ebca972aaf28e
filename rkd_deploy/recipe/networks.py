"""Tables `[teacher]` and `[student]` of a recipe: the networks, and how S and A are cut from S0's cost."""

from __future__ import annotations

from dataclasses import dataclass

from rkd_deploy.errors import RecipeError
from rkd_deploy.recipe.rules import MOST, MOST_THREADS, check_types, choice, in_range, normalisation


@dataclass(frozen=True, kw_only=True)
class TeacherRecipe:
    """Table `[teacher]`: the network T that is imitated."""

    name: str = "resnet20"
    """A family's (resnet56), tv:NAME of torchvision, timm:NAME, or your own nn.Module as package.module:attribute."""
    checkpoint: str | None = None
    """Its weights (.safetensors, or .pth/.pt read with weights_only). Default: T is trained here first."""
    checkpoint_key: str | None = None
    """Which of several sets of weights in that file, e.g. "ema". Default: state_dict or model, else the first."""
    labels: str | None = None
    """File with that checkpoint's classes, one a line, in the order of its logits. Default: as it says itself, else the
    order of the data. timm sorts folder 2 before 10."""
    pretrained: bool = False
    """Start from the weights that torchvision or timm publish. With other classes than theirs T is trained on here."""
    stages: tuple[str, ...] | None = None
    """Where the stages of a tv:, timm: or module:attribute network end, deepest last. Default: found by running it."""
    epochs: int | None = None
    """Epochs to train T for when there is no checkpoint. Default: train.epochs."""
    lr: float | None = None
    """Peak learning rate of that training, where T's family wants another one than S0's. Default: train.lr."""
    mean: tuple[float, ...] | None = None
    """Mean per channel that T was trained with, where it is known: checked against that of the data."""
    std: tuple[float, ...] | None = None
    """Standard deviation per channel that T was trained with, as `mean`."""

    def __post_init__(self) -> None:
        check_types("teacher", self)
        if self.epochs is not None:
            in_range("teacher.epochs", self.epochs, 1, MOST)
        if self.lr is not None:
            in_range("teacher.lr", self.lr, 1e-9, MOST)
        _external("teacher", self)
        normalisation("teacher", self.mean, self.std)


@dataclass(frozen=True, kw_only=True)
class StudentRecipe:
    """Table `[student]`: the given network S0, and how S and A are cut from its cost."""

    name: str = "resnet8"
    """As for T; or teacher: S0 is the teacher's own network, narrowed to `fraction` of its cost, weights inherited."""
    fraction: float | None = None
    """Only where name = "teacher": what S0 costs in units of T, by `budget`."""
    checkpoint: str | None = None
    """Trained weights of S0, for the baseline and to be inherited. Default: S0 is trained here."""
    checkpoint_key: str | None = None
    """Which of several sets of weights in that file, as for T."""
    labels: str | None = None
    """File with that checkpoint's classes, as for T."""
    weights: str | None = None
    """inherited: S and A (and S0 where name = "teacher") begin with the most important channels of the trained network
    they are cut from. fresh: they begin at random. Default: inherited where there is a trained one (scheme
    progressive always begins at random)."""
    pretrained: bool = False
    """Start S0's training from the weights that torchvision or timm publish."""
    stages: tuple[str, ...] | None = None
    """Where the stages of a tv:, timm: or module:attribute network end, deepest last. Default: found by running it."""
    baseline: bool = True
    """Train (or load) S0 itself as the control: same data and loop, cross-entropy, and S's base loss."""
    control: bool = True
    """Train the control "S0, same losses" too, beside that baseline: S0 whole under an adapter and T's head, by all of
    S's losses, without A. What S + A has over it is what A adds. Not for progressive."""
    budget: str = "macs"
    """What must not exceed S0's: macs, params, or latency, which is measured on this machine before training."""
    layout: str | None = None
    """branches: S and A are two branches. side_by_side: their widths add up to S0's, so that level wide of fusion,
    which export then takes, has S0's own operators and shapes, and its speed on any machine; of S0's MACs they have
    about half. trunk: they share S0's first stages and part behind them. Default: branches; with budget = "latency"
    whichever of the first two leaves them more."""
    shared_stages: int | None = None
    """Only for layout = "trunk": how many of S0's stages S and A share, from the first. Default: all but the last."""
    backend: str | None = None
    """Only for budget = "latency": what runs the networks, onnxruntime or openvino. Default: onnxruntime."""
    latency_batches: tuple[int, ...] | None = None
    """Only for budget = "latency": S + A are no slower than S0 at each of these batch sizes. Default: 1 and 8."""
    latency_threads: int | None = None
    """Only for budget = "latency": CPU threads of the backend. Default: its own choice. With 1, CPU time counts:
    what else the machine does then hardly matters."""
    assistant_share: float = 0.2
    """Share of the budget that all assistants and their adapters may take; S gets what is left."""
    assistants: int = 1
    """Length k of the chain A_1 .. A_k, each learning what the sum before it leaves over; they share equally."""
    round_to: int = 8
    """Channel counts are multiples of this. 8 fits AVX2 and tensor cores, CPUs with AVX-512 compute in blocks of 16;
    widths that fit no block run slower at equal MACs."""

    @property
    def inherits(self) -> bool:
        """Whether S and A begin with weights of a trained network."""
        return (self.weights or ("inherited" if self._trained else "fresh")) == "inherited"

    @property
    def _trained(self) -> bool:
        return self.name == "teacher" or self.checkpoint is not None or self.pretrained

    def __post_init__(self) -> None:
        check_types("student", self)
        self._check_ranges()
        choice("student.budget", self.budget, ("macs", "params", "latency"))
        if self.name != "teacher":
            _external("student", self)
        self._check_source()
        self._check_latency()
        if self.layout is not None:
            choice("student.layout", self.layout, ("branches", "side_by_side", "trunk"))
        self._check_trunk()

    def _check_ranges(self) -> None:
        in_range("student.assistant_share", self.assistant_share, 0.01, 0.9)
        in_range("student.assistants", self.assistants, 1, 16)
        in_range("student.round_to", self.round_to, 1, 256)
        for name, low, high in (
            ("fraction", 0.01, 1),
            ("shared_stages", 1, MOST),
            ("latency_threads", 1, MOST_THREADS),
        ):
            if (value := getattr(self, name)) is not None:
                in_range(f"student.{name}", value, low, high)
        for size in self.latency_batches or ():
            in_range("student.latency_batches", size, 1, MOST)

    def _check_trunk(self) -> None:
        if self.layout != "trunk":
            if self.shared_stages is not None:
                raise RecipeError(
                    f"student.shared_stages = {self.shared_stages} says where S and A part, and student.layout = "
                    f'{self.layout!r}. Leave it out, or set student.layout = "trunk".'
                )
            return
        if self.budget == "latency":
            raise RecipeError(
                'student.layout = "trunk" has no search by latency yet, and student.budget = "latency". Set '
                'student.budget = "macs" or "params".'
            )
        if self.inherits:
            raise RecipeError(
                'student.layout = "trunk" begins with fresh weights: an assistant inherits the channels behind S\'s, '
                'and on a trunk it has S\'s own. Set student.weights = "fresh".'
            )

    def _check_source(self) -> None:
        is_teacher = self.name == "teacher"
        if is_teacher != (self.fraction is not None):
            raise RecipeError(
                f'student.fraction = {self.fraction} and student.name = "{self.name}": the fraction says what the '
                'teacher\'s own network is narrowed to. Set both, e.g. name = "teacher" and fraction = 0.5, or neither.'
            )
        for name in ("checkpoint", "pretrained", "stages"):
            if is_teacher and (value := getattr(self, name)):
                raise RecipeError(
                    f'student.{name} = {value!r} is about an S0 of its own, and student.name = "teacher" cuts S0 from '
                    f"the teacher. Leave one of them out; the teacher has a key teacher.{name}."
                )
        if self.weights is not None:
            choice("student.weights", self.weights, ("inherited", "fresh"))
        if self.weights == "inherited" and not self._trained:
            raise RecipeError(
                'student.weights = "inherited" needs a trained network to inherit from: set student.checkpoint or '
                'student.pretrained, or student.name = "teacher".'
            )
        if self.inherits and not is_teacher and not self.baseline:
            raise RecipeError(
                "student.baseline = false leaves S0 out, and S and A are to inherit its weights. Leave that key out, "
                'or set student.weights = "fresh" and give no weights of S0.'
            )

    def _check_latency(self) -> None:
        for name in ("backend", "latency_batches", "latency_threads"):
            if (value := getattr(self, name)) is not None and self.budget != "latency":
                raise RecipeError(
                    f'student.{name} = {value!r} says how latency is measured, and student.budget = "{self.budget}". '
                    'Leave it out, or set student.budget = "latency".'
                )
        if self.backend is not None:
            choice("student.backend", self.backend, ("onnxruntime", "openvino"))
        if self.latency_batches == ():
            raise RecipeError("student.latency_batches = [] names no batch size. Leave it out, or write e.g. [1, 8].")


def _external(table: str, network: TeacherRecipe | StudentRecipe) -> None:
    """Keys that only networks of others have."""
    name = f"{table}.name = {network.name!r}"
    if network.stages is not None and ":" not in network.name:
        raise RecipeError(f"{table}.stages names stages of {name}, and those of a family are given. Leave it out.")
    if network.stages == ():
        raise RecipeError(f"{table}.stages = [] names no stage. Leave it out, and they are found.")
    if network.pretrained and not network.name.startswith(("tv:", "timm:")):
        raise RecipeError(
            f"{table}.pretrained = true, and {name}: only tv:NAME and timm:NAME have published weights. "
            f"Give a file with {table}.checkpoint, or leave it out."
        )
    for key in ("checkpoint_key", "labels"):
        if (value := getattr(network, key)) is not None and network.checkpoint is None:
            raise RecipeError(
                f"{table}.{key} = {value!r} is about the file {table}.checkpoint, which is not set. Leave it out."
            )
    if network.pretrained and network.checkpoint is not None:
        raise RecipeError(
            f"{table}.pretrained = true and {table}.checkpoint = {network.checkpoint!r} both give weights. "
            "Leave one of them out."
        )
