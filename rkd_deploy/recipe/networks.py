"""Tables `[teacher]` and `[student]` of a recipe: T, S0, and how S and A are cut from it."""

from __future__ import annotations

from dataclasses import dataclass

from rkd_deploy.errors import RecipeError
from rkd_deploy.fields import MOST_THREADS
from rkd_deploy.recipe.rules import LARGEST_DEVIATION, ReadWhere, check_keys, key, three_channels


def _with_file(table: str) -> ReadWhere:
    return ReadWhere(
        f"with {table}.checkpoint, the file that it is about", lambda network: network.checkpoint is not None
    )


_LATENCY = ReadWhere('with student.budget = "latency"', lambda student: student.budget == "latency")
_NARROWED = ReadWhere('with student.name = "teacher"', lambda student: student.name == "teacher")
_TRUNK = ReadWhere('with student.layout = "trunk"', lambda student: student.layout == "trunk")


@dataclass(frozen=True, kw_only=True)
class TeacherRecipe:
    """Table `[teacher]`: the network T that is imitated."""

    name: str = "resnet20"
    """A family's (resnet56), tv:NAME of torchvision, timm:NAME, or your own nn.Module as package.module:attribute."""
    checkpoint: str | None = None
    """File of T's weights (.safetensors, or .pth/.pt read with weights_only). Default: T is trained here first."""
    checkpoint_key: str | None = key(None, read=_with_file("teacher"))
    """Which of several sets of weights in the checkpoint, e.g. "ema". Default: state_dict or model, else the first."""
    labels: str | None = key(None, read=_with_file("teacher"))
    """File with the checkpoint's classes, one a line, in the order of its logits. Default: as it says itself, else the
    order of the data. timm sorts folder 2 before 10."""
    pretrained: bool = False
    """Start from the weights that torchvision or timm publish. With other classes than theirs T is trained on here."""
    stages: tuple[str, ...] | None = None
    """Where the stages of a tv:, timm: or module:attribute network end, deepest last. Default: found by running it."""
    epochs: int | None = key(None, low=1)
    """Epochs to train T for when there is no checkpoint. Default: train.epochs."""
    lr: float | None = key(None, low=1e-9)
    """Peak learning rate of T's training, where T's family wants another one than S0's. Default: train.lr."""
    mean: tuple[float, ...] | None = key(None, low=-LARGEST_DEVIATION, high=LARGEST_DEVIATION)
    """Mean per channel that T was trained with, where it is known: checked against that of the data."""
    std: tuple[float, ...] | None = key(None, low=1 / LARGEST_DEVIATION, high=LARGEST_DEVIATION)
    """Standard deviation per channel that T was trained with, as `mean`."""

    def __post_init__(self) -> None:
        check_keys("teacher", self, f'teacher.name = "{self.name}"')
        _external("teacher", self)
        three_channels("teacher", self.mean, self.std)


@dataclass(frozen=True, kw_only=True)
class StudentRecipe:
    """Table `[student]`: the given network S0, and how S and A are cut from its cost."""

    name: str = "resnet8"
    """S0, named as T is; or teacher: S0 is the teacher's own network, narrowed to `fraction` of its cost, its weights
    inherited."""
    fraction: float | None = key(None, low=0.01, high=1, read=_NARROWED)
    """What S0 costs in units of T, by `budget`."""
    checkpoint: str | None = None
    """Trained weights of S0, for the baseline and to be inherited. Default: S0 is trained here."""
    checkpoint_key: str | None = key(None, read=_with_file("student"))
    """Which of several sets of weights in the checkpoint, as for T."""
    labels: str | None = key(None, read=_with_file("student"))
    """File with the checkpoint's classes, as for T."""
    weights: str | None = key(None, choices=("inherited", "fresh"))
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
    """Train the control "S0, same losses" too, beside the baseline: S0 whole under an adapter and T's head, by all of
    S's losses, without A. What S + A has over it is what A adds. Not for progressive."""
    budget: str = key("macs", choices=("macs", "params", "latency"))
    """What must not exceed S0's: macs, params, or latency, which is measured on this machine before training."""
    layout: str | None = key(None, choices=("branches", "side_by_side", "trunk"))
    """branches: S and A are two branches. side_by_side: their widths add up to S0's, so that level wide of fusion,
    which export then takes, has S0's own operators and shapes, and its speed on any machine; of S0's MACs they have
    about half. trunk: they share S0's first stages and part behind them. Default: branches; with budget = "latency"
    whichever of the first two leaves them more."""
    shared_stages: int | None = key(None, low=1, read=_TRUNK)
    """How many of S0's stages S and A share, from the first. Default: all but the last."""
    backend: str | None = key(None, choices=("onnxruntime", "onnxruntime:cuda-graphs", "openvino"), read=_LATENCY)
    """What runs the networks, onnxruntime, openvino, or onnxruntime:cuda-graphs. Default: onnxruntime."""
    latency_device: str | None = key(None, read=_LATENCY)
    """Where they run: cpu, cuda, cuda:1, ... Default: the backend's own, the CPU but for onnxruntime:cuda-graphs."""
    latency_batches: tuple[int, ...] | None = key(None, low=1, read=_LATENCY)
    """S + A are no slower than S0 at each of these batch sizes. Default: 1 and 8."""
    latency_threads: int | None = key(None, low=1, high=MOST_THREADS, read=_LATENCY)
    """CPU threads of the backend. Default: its own choice. With 1, CPU time counts: what else the machine does then
    hardly matters."""
    assistant_share: float = key(0.2, low=0.01, high=0.9)
    """Share of the budget that all assistants and their adapters may take; S gets what is left."""
    assistants: int = key(1, low=1, high=16)
    """Length k of the chain A_1 .. A_k, each learning what the sum before it leaves over; they share equally."""
    round_to: int = key(8, low=1, high=256)
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
        layout = "" if self.layout is None else f', layout = "{self.layout}"'
        check_keys("student", self, f'student.name = "{self.name}", budget = "{self.budget}"{layout}')
        if self.name != "teacher":
            _external("student", self)
        self._check_source()
        if self.latency_batches == ():
            raise RecipeError("student.latency_batches = [] names no batch size. Leave it out for 1 and 8.")

    def _check_source(self) -> None:
        is_teacher = self.name == "teacher"
        if is_teacher and self.fraction is None:
            raise RecipeError(
                'student.name = "teacher" narrows the teacher\'s own network, and nothing says to what. Set '
                "student.fraction, e.g. 0.5."
            )
        for name in ("checkpoint", "pretrained", "stages"):
            if is_teacher and (value := getattr(self, name)):
                raise RecipeError(
                    f'student.{name} = {value!r} is about an S0 of its own, and student.name = "teacher" cuts S0 from '
                    f"the teacher. Leave one of them out; the teacher has a key teacher.{name}."
                )
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


def _external(table: str, network: TeacherRecipe | StudentRecipe) -> None:
    """Refuse keys that are about networks of others, where the network is a family's, and two sources of weights."""
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
    if network.pretrained and network.checkpoint is not None:
        raise RecipeError(
            f"{table}.pretrained = true and {table}.checkpoint = {network.checkpoint!r} both give weights. "
            "Leave one of them out."
        )
