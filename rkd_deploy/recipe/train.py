"""Table `[train]` of a recipe: the loop, what makes it fast, and what it leaves behind."""

from __future__ import annotations

from dataclasses import dataclass

from rkd_deploy.errors import RecipeError
from rkd_deploy.fields import MOST_THREADS
from rkd_deploy.recipe.rules import check_keys, key, rising


@dataclass(frozen=True, kw_only=True)
class TrainRecipe:
    """Table `[train]`: the training loop of every phase."""

    epochs: int = key(10, low=1)
    """Epochs of every phase that has no number of its own."""
    assistant_epochs: int | None = key(None, low=1)
    """Epochs of A. Default: epochs."""
    head_epochs: int | None = key(None, low=1)
    """Epochs of a trained head. Default: epochs."""
    batch_size: int = key(64, low=2)
    """Images per update, over all processes and all pieces of `accumulate` together."""
    accumulate: int = key(1, low=1)
    """Pieces a batch is cut into, one after the other, to fit the memory. Same update, but batch norm sees a piece."""
    lr: float = key(0.1, low=1e-9)
    """Peak learning rate of SGD."""
    momentum: float = key(0.9, low=0, high=0.9999)
    """Momentum of SGD."""
    nesterov: bool = False
    """Whether the momentum is Nesterov's."""
    weight_decay: float = key(5e-4, low=0)
    """Weight decay of SGD; not applied to batch norm or biases."""
    clip_norm: float | None = key(None, low=1e-9)
    """Gradients are scaled down to this global L2 norm where they exceed it; the log has the norm before as grad_norm.
    Default: not clipped."""
    schedule: str = key("cosine", choices=("cosine", "step", "constant"))
    """cosine (to zero), step (times lr_decay at each of milestones) or constant."""
    warmup_epochs: float = key(0.0, low=0)
    """Linear warm-up from zero."""
    milestones: tuple[int, ...] = key((150, 180, 210), low=1)
    """Epochs at which the step schedule decays."""
    lr_decay: float = key(0.1, low=0, high=1)
    """Factor of the learning rate at each milestone of the step schedule."""
    ema_decay: float | None = key(None, low=0, high=0.999999)
    """Keep an exponential moving average of weights and batch-norm statistics too: at each update ema moves 1 - decay
    of the way to the weights. Default: none is kept."""
    ship: str = key("last", choices=("last", "ema"))
    """Which weights each phase hands on and export ships: last (of the last update) or ema. The others are kept beside
    them, and both are evaluated."""
    seed: int = key(0, low=0, high=2**31 - 1)
    """Seed of weights, batches and augmentation; runs of one seed are the same to the bit on one machine."""
    amp: bool = False
    """bfloat16 autocast of the forward passes. Of use on GPUs, and on CPUs with AMX or AVX512-BF16."""
    channels_last: bool = False
    """Keep maps and weights as NHWC in memory, which tensor cores want: for GPUs with amp. Recorded steps (cuda_graphs)
    measure both layouts, and this takes the choice from them."""
    compile: bool = False
    """torch.compile of the method's forward and backward passes. Costs a minute per phase at the start and needs a C++
    compiler on a CPU; of use for long runs. With recorded steps (cuda_graphs), of the passes of S, A and S0 alone."""
    cuda_graphs: bool | None = None
    """Record a whole training step as a CUDA graph and replay it, frozen networks folded, in the layout that is faster
    by measurement; best with amp. Only on CUDA, one process, accumulate = 1. A step that cannot be recorded is made
    eagerly, and the log says why. Default: wherever all that holds."""
    sync_batchnorm: bool = False
    """Batch norm over the images of all processes instead of each one's share. Only on CUDA."""
    device: str = "auto"
    """auto (cuda where there is one), cpu, cuda, cuda:1, ..."""
    threads: int | None = key(None, low=1, high=MOST_THREADS)
    """CPU threads of PyTorch. Default: its own choice."""
    checkpoint_minutes: float = key(10.0, low=0)
    """Save in the middle of an epoch too, when the last checkpoint is so old; each epoch ends with one anyway."""
    curves: bool = True
    """Draw curves.png into the run folder after every phase."""
    tensorboard: bool | None = None
    """Write the log into the run's folder tensorboard/ too. Default: where the package tensorboard is installed."""

    def __post_init__(self) -> None:
        check_keys("train", self, f'train.schedule = "{self.schedule}"')
        self._check_together()

    def _check_together(self) -> None:
        rising("train.milestones", self.milestones)
        if self.nesterov and self.momentum == 0:
            raise RecipeError("train.nesterov = true needs train.momentum above 0.")
        if self.batch_size % self.accumulate:
            raise RecipeError(
                f"train.batch_size = {self.batch_size} cannot be cut into train.accumulate = {self.accumulate} equal "
                "pieces. Set one to a multiple of the other."
            )
        if self.ship == "ema" and self.ema_decay is None:
            raise RecipeError('train.ship = "ema" needs an average to ship: set train.ema_decay, e.g. 0.999.')
        if self.cuda_graphs:
            self._check_graphs()

    def records_steps(self, device: str, processes: int) -> bool:
        """Whether steps are recorded as CUDA graphs on a device of this type, "cpu" or "cuda"."""
        if self.cuda_graphs is not None:
            return self.cuda_graphs
        return device == "cuda" and processes == 1 and self.accumulate == 1

    def _check_graphs(self) -> None:
        if self.device == "cpu":
            raise RecipeError('train.cuda_graphs = true needs CUDA, and train.device = "cpu". Leave one of them out.')
        if self.accumulate > 1:
            raise RecipeError("train.cuda_graphs = true does not go with train.accumulate. Leave one of them out.")
