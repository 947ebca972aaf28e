"""S and its assistants as one classifier: z = h(GAP(P_S f_S + P_1 f_1 + .. + P_k f_k)).

After "Residual Knowledge Distillation" (Gao, Shen, Li, Loy, arXiv 2002.09168): the student S imitates the teacher's
feature map, the assistant A learns what S leaves over, and their maps are summed. A chain A_1 .. A_k, each learning
what the sum before it leaves over, is the same with k > 1 (after ResKD, Li et al., arXiv 2006.04719, which chains whole
networks).

P are adapters to the teacher's channels, a 1x1 convolution and batch norm each:

    P f = g (U f - mean) / sqrt(var + eps) + beta          U [C_T, C] at every position; g, beta, mean, var [C_T]
        = U' f + c                                         U' = diag(g / sqrt(var + eps)) U
                                                           c  = beta - g mean / sqrt(var + eps)

Batch norm uses the statistics of the batch while P learns and its running ones afterwards, so P is linear in use and
folds exactly. That a projector needs it, and needs no non-linearity, is the finding of Miles and Mikolajczyk
("Understanding the Role of the Projector in Knowledge Distillation", AAAI 2024, arXiv 2303.11098). Here it must have
none: the residual is signed, so an assistant must not end in a ReLU, and a linear tail folds into one matrix at export
(`rkd_deploy.export.fusion`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from rkd_deploy.models.stage_run import StageRun, joined
from rkd_deploy.models.staged import FeatureNetwork, pool


class Adapter(nn.Module):
    """An adapter P, from the channels of a map to those of T's map.

    Args:
        in_channels: C.
        channels: C_T.
        silent: Start at P f = 0, as an assistant does: the sum then starts at S.
    """

    def __init__(self, in_channels: int, channels: int, *, silent: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        if silent:
            nn.init.zeros_(self.norm.weight)

    def forward(self, f_NCHW: Tensor) -> Tensor:
        """The adapted map P f, [N, C_T, H, W]."""
        return cast(Tensor, self.norm(self.conv(f_NCHW)))

    @torch.no_grad()
    def folded(self) -> nn.Conv2d:
        """The convolution U' with bias c, equal to P in eval mode."""
        norm, U = self.norm, self.conv.weight
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        conv = nn.Conv2d(U.shape[1], U.shape[0], 1, dtype=U.dtype, device=U.device)
        conv.weight.copy_(U * scale[:, None, None, None])
        cast(Tensor, conv.bias).copy_(norm.bias - scale * norm.running_mean)
        return conv


def as_convolution(adapter: nn.Module) -> nn.Conv2d:
    """The 1x1 convolution that an adapter is at inference; a plain convolution as it is."""
    return adapter.folded() if isinstance(adapter, Adapter) else cast(nn.Conv2d, adapter)


def with_norms(state: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Convert a state dict from before adapters had batch norm to one that a module with adapters takes.

    Args:
        state: Tensors by name; one that names batch norms already is given back as it is.
        module: What will load it.

    Returns:
        Each plain convolution as U, with a batch norm that adds its bias and changes nothing else.
    """
    weights = dict(state)
    for name, adapter in module.named_modules():
        if isinstance(adapter, Adapter) and f"{name}.weight" in weights:
            bias = weights.pop(f"{name}.bias")
            weights[f"{name}.conv.weight"] = weights.pop(f"{name}.weight")
            weights[f"{name}.norm.bias"] = bias
            weights[f"{name}.norm.weight"] = torch.ones_like(bias)
            weights[f"{name}.norm.running_mean"] = torch.zeros_like(bias)
            # Batch norm divides by sqrt(var + eps): with this variance by exactly 1.
            weights[f"{name}.norm.running_var"] = torch.full_like(bias, 1 - adapter.norm.eps)
    return weights


class StageAdapters(nn.Module):
    """Adapters to T's channels at stages before the last, for losses there alone: they never ship.

    Args:
        stages: Numbers of S's stages, from 1.
        branches: Channels of every stage map of S, of A_1, ..
        channels: C_T at each of `stages`.
    """

    def __init__(self, stages: Sequence[int], branches: Sequence[Sequence[int]], channels: Sequence[int]) -> None:
        super().__init__()
        self.stages, self.count = tuple(stages), len(branches[0])
        self.adapters = nn.ModuleList(
            nn.ModuleList(
                Adapter(branch_channels[j - 1], C_T, silent=branch > 0) for j, C_T in zip(stages, channels, strict=True)
            )
            for branch, branch_channels in enumerate(branches)
        )

    def forward(self, branch: int, maps: Sequence[Tensor]) -> list[Tensor]:
        """Adapted maps R_b^j f_b^j at every stage j, from all stage maps of branch b = 0 (S), 1, .."""
        adapters = cast(nn.ModuleList, self.adapters[branch])
        return [adapter(maps[j - 1]) for adapter, j in zip(adapters, self.stages, strict=True)]

    def targets(self, maps_T: Sequence[Tensor]) -> list[Tensor]:
        """Maps f_T^j of T at every stage j; T's stages and S's are paired from the deepest."""
        return [maps_T[j - 1 - self.count] for j in self.stages]


class ResidualStudent(nn.Module):
    """S, its assistants, their adapters and one head: the network that ships.

    Args:
        student: S, without a head.
        assistants: A_1 .. A_k without a head; their last maps have the size of S's. None (k = 0): S0 under T's head,
            the control "S0, same losses".
        channels: C_T, channels of the teacher's last stage map.
        num_classes: K.
        head: h, from pooled maps [N, C_T] to logits. Default: a fresh linear layer.
        trunk: First stages that S and the assistants share, whose last map they take (`trunk.py`). Default: each takes
            the images itself.
    """

    def __init__(
        self,
        student: FeatureNetwork,
        assistants: Sequence[FeatureNetwork],
        channels: int,
        num_classes: int,
        head: nn.Module | None = None,
        trunk: StageRun | None = None,
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.student = student
        self.assistants = nn.ModuleList(assistants)
        self.student_adapter = Adapter(student.channels, channels)
        self.assistant_adapters = nn.ModuleList(
            Adapter(assistant.channels, channels, silent=True) for assistant in assistants
        )
        self.head = nn.Linear(channels, num_classes) if head is None else head
        self.stage_adapters: StageAdapters | None = None

    def branches(self) -> list[tuple[FeatureNetwork, Adapter]]:
        """Pairs of network and adapter: (S, P_S), (A_1, P_1), .. (A_k, P_k)."""
        pairs = zip(self.assistants, self.assistant_adapters, strict=True)
        return [(self.student, self.student_adapter), *cast("list[tuple[FeatureNetwork, Adapter]]", list(pairs))]

    def student_network(self) -> FeatureNetwork:
        """S from the images on, with the trunk in front where there is one; the layers are the model's."""
        if self.trunk is None:
            return self.student
        assert isinstance(self.student, StageRun)
        return joined(self.trunk, self.student)

    def parts(self, branch: int) -> list[nn.Module]:
        """The modules of branch b = 0 (S), 1, ..: its network and its adapters; the trunk is S's."""
        adapters = [] if self.stage_adapters is None else [self.stage_adapters.adapters[branch]]
        trunk = [self.trunk] if self.trunk is not None and branch == 0 else []
        return [*trunk, *self.branches()[branch], *adapters]

    def shared(self, x_NCHW: Tensor) -> tuple[Tensor, ...]:
        """Stage maps of the trunk; none where nothing is shared."""
        return () if self.trunk is None else self.trunk.features(x_NCHW)

    def stage_maps(self, branch: int, x_NCHW: Tensor, shared: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """All stage maps of a branch.

        Args:
            branch: b = 0 (S), 1, ..
            x_NCHW: Images.
            shared: What `shared` gives for them: all branches of a pass read the same.
        """
        return (*shared, *self.branches()[branch][0].features(shared[-1] if shared else x_NCHW))

    @torch.no_grad()
    def stage_channels(self, image_size: Sequence[int]) -> list[list[int]]:
        """Channels of every stage map of S, A_1, .., found by running one image of this height and width."""
        was_training, like = self.training, next(self.parameters())
        self.eval()
        x_NCHW = like.new_zeros(1, 3, *image_size)
        shared = self.shared(x_NCHW)
        channels = [
            [stage_map.shape[1] for stage_map in self.stage_maps(b, x_NCHW, shared)]
            for b in range(len(self.branches()))
        ]
        self.train(was_training)
        return channels

    def compared_maps(self, branch: int, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps of a branch that are compared with T's: R^j f^j at the stages asked for, and P f at the last.

        Args:
            branch: b = 0 (S), 1, ..
            maps: All stage maps of the branch.
        """
        early = [] if self.stage_adapters is None else self.stage_adapters(branch, maps)
        return [*early, self.branches()[branch][1](maps[-1])]

    def targets(self, maps_T: Sequence[Tensor]) -> list[Tensor]:
        """Maps of T that `compared_maps` are compared with."""
        early = [] if self.stage_adapters is None else self.stage_adapters.targets(maps_T)
        return [*early, maps_T[-1]]

    def student_map(self, x_NCHW: Tensor) -> Tensor:
        """The adapted map P_S f_S of S, [N, C_T, H', W']."""
        return cast(Tensor, self.student_adapter(self.stage_maps(0, x_NCHW, self.shared(x_NCHW))[-1]))

    def assistant_map(self, x_NCHW: Tensor, number: int = 1) -> Tensor:
        """The adapted map P_i f_i of assistant i = `number`, counted from 1, [N, C_T, H', W']."""
        return cast(Tensor, self.branches()[number][1](self.stage_maps(number, x_NCHW, self.shared(x_NCHW))[-1]))

    def summed_map(self, x_NCHW: Tensor, assistants: int | None = None) -> Tensor:
        """The sum P_S f_S + P_1 f_1 + .., the approximation of T's map, [N, C_T, H', W'].

        Args:
            x_NCHW: Images.
            assistants: How many assistants are summed, from the first. Default: all.
        """
        shared = self.shared(x_NCHW)
        count = 1 + (len(self.assistants) if assistants is None else assistants)
        (_, adapter), *others = self.branches()[:count]
        total = cast(Tensor, adapter(self.stage_maps(0, x_NCHW, shared)[-1]))
        for number, (_, adapter) in enumerate(others, 1):
            total = total + adapter(self.stage_maps(number, x_NCHW, shared)[-1])
        return total

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Logits [N, K] of images [N, 3, H, W]."""
        return cast(Tensor, self.head(pool(self.summed_map(x_NCHW))))


class StudentAlone(nn.Module):
    """S without its assistants, under the same head: z = h(GAP(P_S f_S))."""

    def __init__(self, model: ResidualStudent) -> None:
        super().__init__()
        self.trunk = model.trunk
        self.student = model.student
        self.student_adapter = model.student_adapter
        self.head = model.head

    def branches(self) -> list[tuple[FeatureNetwork, Adapter]]:
        """The only branch: S and its adapter P_S."""
        return [(self.student, self.student_adapter)]

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Logits [N, K] of images [N, 3, H, W]."""
        x_NCHW = x_NCHW if self.trunk is None else self.trunk.features(x_NCHW)[-1]
        return cast(Tensor, self.head(pool(self.student_adapter(self.student.features(x_NCHW)[-1]))))
