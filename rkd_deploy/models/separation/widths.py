"""Costs of networks by their widths, and the widest widths that a budget allows.

Letters: F cost, in MACs or parameters; P adapters, h head, k assistants, rho the share that they get. S and A fit when

    F(S) + F(P_S) + k (F(A) + F(P_A)) + F(h) <= F(S0)        k (F(A) + F(P_A)) <= rho F(S0)

"Widest" is a search over multiples of r_i, the least common multiple of `round_to` and what width i must be a multiple
of anyway (`Staged.steps`), in two steps: the largest multiplier m whose widths max(r_i, floor(m w_i / r_i) r_i) fit,
then width by width one more step where it still fits, the relatively narrowest first. So no width of the result can
grow any further, and none exceeds S0's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from rkd_deploy.errors import BudgetError
from rkd_deploy.models.cost import count, count_head
from rkd_deploy.models.progressive import adapter_cost
from rkd_deploy.models.separation.pruning import Pruned
from rkd_deploy.models.staged import Staged, Widths, stage_shapes


class CostModel:
    """The cost F of networks of one topology, in one unit; each is built without data and counted once.

    Args:
        network: S0, or a network of its topology.
        num_classes: Number of classes K of the head.
        size: Height and width of the images in pixels.
        unit: ``"macs"`` or ``"params"``.
        channels: C_T, to which the adapters lead.
        head: h, from C_T channels; None: a linear layer.
        stage_channels: C_T of every stage, where S and A exchange their maps at each.

    Attributes:
        head: F(h).
        fixed: Why some layers cost as much at any widths (`Staged.fixed`).
    """

    def __init__(
        self,
        network: Staged,
        num_classes: int,
        size: tuple[int, int],
        unit: str,
        channels: int,
        head: nn.Module | None = None,
        stage_channels: Sequence[int] | None = None,
    ) -> None:
        self._network, self._size, self._unit, self._channels = network, size, unit, channels
        self._stage_channels, self.fixed = stage_channels, network.fixed
        self._known: dict[tuple[Widths, int | None], tuple[int, int]] = {}
        self._trunks: dict[tuple[Widths, int], int] = {}
        self._tensors: dict[int, frozenset[str]] = {}
        _, height, width = stage_shapes(network, size)[-1]
        self._positions = height * width
        self.head = num_classes * channels + (num_classes if unit == "params" else 0)
        if head is not None:
            cost = count_head(head, channels)
            self.head = cost.macs if unit == "macs" else cost.parameters

    def network(self, widths: Widths, num_classes: int | None) -> int:
        """Cost F of a network of some widths, with a linear head of K classes or (None) without a head."""
        return self._counted(widths, num_classes)[0]

    def trunk(self, widths: Widths, shared_stages: int) -> int:
        """Cost F of the first stages of a network of some widths."""
        key = (widths, shared_stages)
        if isinstance(self._network, Pruned):
            if shared_stages not in self._tensors:
                self._tensors[shared_stages] = self._network.tensors_of(shared_stages)
            macs, params = self._network.pruner.cost_within(widths, self._tensors[shared_stages])
            return macs if self._unit == "macs" else params
        if key not in self._trunks:
            with torch.device("meta"):
                stages = nn.Sequential(*self._network.rebuilt(widths, None).stages()[:shared_stages])
            cost = count(stages, self._size)
            self._trunks[key] = cost.macs if self._unit == "macs" else cost.parameters
        return self._trunks[key]

    def adapter(self, widths: Widths) -> int:
        """Cost F(P) of a branch's adapter to C_T channels; of all its adapters where maps are exchanged."""
        if self._stage_channels is not None:
            with torch.device("meta"), torch.no_grad():
                maps = self._network.rebuilt(widths, None).eval().features(torch.empty(1, 3, *self._size))
            shapes = [(f.shape[1], f.shape[2], f.shape[3]) for f in maps]
            return adapter_cost(shapes, self._stage_channels, self._unit)
        # Batch norm has parameters while P learns and is folded at export: it costs no MACs.
        weights = self._counted(widths, None)[1] * self._channels
        return weights * self._positions if self._unit == "macs" else weights + 2 * self._channels  # U, g and beta

    def branch(self, widths: Widths) -> int:
        """Cost F of a branch: a network of some widths without a head, and its adapter."""
        return self.network(widths, None) + self.adapter(widths)

    def student(self, widths: Widths) -> int:
        """Cost F(S) + F(P_S) + F(h) of a student, which pays for the head."""
        return self.branch(widths) + self.head

    def _counted(self, widths: Widths, num_classes: int | None) -> tuple[int, int]:
        """Cost of a network, and the channels of its last map."""
        key = (widths, num_classes)
        if key not in self._known:
            self._known[key] = self._pruned(*key) if isinstance(self._network, Pruned) else self._built(*key)
        return self._known[key]

    def _built(self, widths: Widths, num_classes: int | None) -> tuple[int, int]:
        with torch.device("meta"):
            network = self._network.rebuilt(widths, num_classes)
        cost = count(network, self._size)
        return cost.macs if self._unit == "macs" else cost.parameters, network.channels

    def _pruned(self, widths: Widths, num_classes: int | None) -> tuple[int, int]:
        # A pruned network's cost follows from its widths in microseconds; building one takes a second.
        assert isinstance(self._network, Pruned)
        macs, params = self._network.pruner.cost(widths)
        channels = self._network.channels_at(widths)
        head = 0 if num_classes is None else channels * num_classes
        bias = num_classes or 0
        return macs + head if self._unit == "macs" else params + head + bias, channels


def widest(cost: Callable[[Widths], int], full: Widths, limit: int, round_to: int | Widths) -> Widths | None:
    """Search the widest widths whose cost is within a limit, as this file's docstring says.

    Args:
        cost: Cost of a network of these widths; rises with every width.
        full: S0's widths, the upper bound.
        limit: What the cost must not exceed.
        round_to: The step of every width, or the step of each.

    Returns:
        The widths, or None when even the narrowest cost too much.
    """
    steps = (round_to,) * len(full) if isinstance(round_to, int) else round_to

    def scaled(numerator: int) -> Widths:
        return tuple(
            min(width, max(step, numerator * width // (1024 * step) * step))
            for width, step in zip(full, steps, strict=True)
        )

    if cost(scaled(0)) > limit:
        return None
    # Multipliers in 1/1024, in whole numbers, so that a budget gives the same widths on every machine. low fits, high
    # does not (or is above 1).
    low, high = 0, 1025
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(scaled(middle)) <= limit else (low, middle)
    widths = scaled(low)
    while True:
        before, growing = widths, set(range(len(full)))
        while growing:
            # The relatively narrowest first: widths stay close to the proportions of S0, which its authors found good.
            index = min(growing, key=lambda i: (widths[i] / full[i], i))
            width = min(full[index], widths[index] + steps[index])
            wider = (*widths[:index], width, *widths[index + 1 :])
            if width > widths[index] and cost(wider) <= limit:
                widths = wider
            else:
                growing.remove(index)  # what does not fit now will not fit beside others that have grown
        if widths == before:  # every width has been tried beside the final values of the others
            return widths


@dataclass(frozen=True)
class WidthBudget:
    """The cost that S and its assistants may have together, and the widest widths within that.

    Attributes:
        costs: F of networks of S0's topology.
        num_classes: K.
        unit: ``"macs"`` or ``"params"``.
        full: Widths of S0, the upper bound of every other.
        steps: What each width is a multiple of, unless S0's own is smaller.
        limit: F(S0).
        share: rho, the part of the limit that all assistants and their adapters may take.
        assistants: k.
    """

    costs: CostModel
    num_classes: int
    unit: str
    full: Widths
    steps: Widths
    limit: int
    share: float
    assistants: int

    @property
    def narrowest(self) -> Widths:
        """The narrowest widths: one step each, or S0's own where that is less."""
        return tuple(map(min, self.full, self.steps))

    def narrowed_to(self, s0_widths: Widths) -> WidthBudget:
        """The budget of an S0 of narrower widths."""
        return replace(self, full=s0_widths, limit=self.costs.network(s0_widths, self.num_classes))

    def s0_within(self, fraction: float) -> Widths:
        """Widths of the widest S0 that costs at most a fraction of the limit.

        Raises:
            BudgetError: Even the narrowest costs more.
        """
        limit = int(fraction * self.limit)
        widths = widest(self._s0_cost, self.full, limit, self.steps)
        if widths is None:
            raise BudgetError(
                f"The model costs {self.limit:,} {self.unit}, and fraction = {fraction} of it is {limit:,}; at the "
                f"narrowest widths it costs {self._s0_cost(self.narrowest):,}. "
                "Raise student.fraction, or lower student.round_to."
            )
        return widths

    def split(self, limit: int) -> tuple[Widths, Widths]:
        """Widths of S and A as two branches from the image on, the widest that together cost at most `limit`.

        Where the limit is less than S0 costs, because latency asks for it, the narrowest A may take more than its share
        of the limit, and no more than its share of S0: the limit alone leaves nothing that could be narrower.

        Raises:
            BudgetError: Even the narrowest S and A cost more.
        """
        assistant = self._assistant(limit, self.full)
        # What the steps leave over of A's share goes to S, of whose larger widths a step is a smaller part.
        rest = limit - self.assistants * self.costs.branch(assistant)
        student = widest(self.costs.student, self.full, rest, self.steps)
        if student is None:
            raise self._too_small(limit, "the student with what the assistant left")
        return student, assistant

    def side_by_side(self, fraction: float) -> tuple[Widths, Widths]:
        """Widths of S and A whose layers, side by side, are as wide as those of an S0 of a fraction of the limit.

        Merged into one network they then take as long as that S0, zeros included. A has its share of that fraction, and
        is nowhere wider than S. Where S0 has no room even for the narrowest of each, they are wider than it.

        Raises:
            BudgetError: Even the narrowest S and A cost more than S0.
        """
        merged = self.s0_within(fraction)
        room = tuple(
            max(low, width // (self.assistants + 1) // step * step)
            for low, width, step in zip(self.narrowest, merged, self.steps, strict=True)
        )
        limit = self._s0_cost(merged)
        assistant = self._assistant(limit, room)
        rest = tuple(
            max(low, (width - self.assistants * taken) // step * step)
            for low, width, taken, step in zip(self.narrowest, merged, assistant, self.steps, strict=True)
        )
        # Half of the merged layers' weights are zeros that cost time and no MACs: widths bind here before MACs do, and
        # the whole of S0's budget is allowed.
        left = self.limit - self.assistants * self.costs.branch(assistant)
        student = widest(self.costs.student, rest, left, self.steps)
        if student is None:
            raise self._too_small(limit, "the student with what the assistant left")
        return student, assistant

    def side_by_side_behind(self, fraction: float, shared: Sequence[int], shared_stages: int) -> tuple[Widths, Widths]:
        """Widths of S and A on one trunk whose ends lie side by side: together an S0 of a fraction of the limit.

        Args:
            fraction: As for `side_by_side`, whose widths the ends have.
            shared: Indices of the widths that the trunk has; there both are as wide as that S0.
            shared_stages: j.

        Raises:
            BudgetError: They cost more than S0, adapters included.
        """
        merged = self.s0_within(fraction)
        student, assistant = (
            tuple(merged[index] if index in shared else width for index, width in enumerate(widths))
            for widths in self.side_by_side(fraction)
        )
        if sum(self.account(student, assistant, shared_stages=shared_stages).values()) > self.limit:
            raise self._too_small(self.limit, "S and A on one trunk")
        return student, assistant

    def parted(self, limit: int, shared_stages: int, shared: Sequence[int]) -> tuple[Widths, Widths]:
        """Widths of S and A on one trunk, the widest that together cost no more than S0.

        A's end gets the widths that its share pays for behind a trunk as wide as S0's. Trunk and S get what is left,
        A's end priced behind that trunk: it is no wider, so A keeps within its share.

        Args:
            limit: In `unit`, S0's cost or less.
            shared_stages: j.
            shared: Indices of the widths that the trunk has; A's are those of S there.

        Raises:
            BudgetError: Even the narrowest S and A cost more.
        """
        ends = [index for index in range(len(self.full)) if index not in shared]

        def behind(trunk: Widths, end: Widths) -> Widths:
            end_widths = dict(zip(ends, end, strict=True))
            return tuple(end_widths.get(index, width) for index, width in enumerate(trunk))

        def end_cost(widths: Widths) -> int:
            return self.costs.branch(widths) - self.costs.trunk(widths, shared_stages)

        full, steps = (tuple(values[index] for index in ends) for values in (self.full, self.steps))
        allowed = int(self.share / self.assistants * limit)
        end = widest(lambda end_widths: end_cost(behind(self.full, end_widths)), full, allowed, steps)
        if end is None:
            least = end_cost(behind(self.full, tuple(map(min, full, steps))))
            raise BudgetError(
                f"The budget is too small for the assistant's end behind the trunk: the limit is {limit:,}, of which "
                f"assistant_share = {self.share} gives {allowed:,} to each of {self.assistants}, and the narrowest end "
                f"(steps of {_few(tuple(dict.fromkeys(steps)))}) costs {least:,}."
            )

        def whole_cost(widths: Widths) -> int:
            return self.costs.student(widths) + self.assistants * end_cost(behind(widths, end))

        student = widest(whole_cost, self.full, limit, self.steps)
        if student is None:
            raise self._too_small(limit, "the trunk and the student with what the assistant left")
        return student, behind(student, end)

    def account(self, student: Widths, assistant: Widths, *, shared_stages: int = 0) -> dict[str, int]:
        """Cost F of each part of S + A, the assistants' of all k together; a trunk of `shared_stages` is S's."""
        costs, k = self.costs, self.assistants
        trunk = costs.trunk(assistant, shared_stages) if shared_stages else 0
        return {
            "student": costs.network(student, None),
            "assistant": k * (costs.network(assistant, None) - trunk),
            "student_adapter": costs.adapter(student),
            "assistant_adapter": k * costs.adapter(assistant),
            "head": costs.head,
        }

    def _assistant(self, limit: int, room: Widths) -> Widths:
        share = self.share / self.assistants
        allowed = max(int(share * limit), min(self.costs.branch(self.narrowest), int(share * self.limit)))
        assistant = widest(self.costs.branch, room, allowed, self.steps)
        if assistant is None:
            raise self._too_small(limit, "the assistant alone")
        return assistant

    def _s0_cost(self, widths: Widths) -> int:
        return self.costs.network(widths, self.num_classes)

    def _too_small(self, limit: int, part: str) -> BudgetError:
        branch, k = self.costs.branch(self.narrowest), self.assistants
        return BudgetError(
            f"The budget is too small for {part}: S0 costs {limit:,}, of which assistant_share = {self.share} "
            f"gives {'the assistant' if k == 1 else f'each of {k} assistants'} {int(self.share * limit / k):,}; "
            f"at the narrowest widths {_few(self.narrowest)} (steps of {_few(tuple(dict.fromkeys(self.steps)))}) an "
            f"assistant costs {branch:,} and a student with the head {branch + self.costs.head:,}."
            f"{_why_fixed(self.costs.fixed)}"
        )


def _why_fixed(reasons: Sequence[str]) -> str:
    if not reasons:
        return ""
    more = f", and {len(reasons) - 3} more like these" if len(reasons) > 3 else ""
    return f" Layers whose sizes stand in the network's code keep them: {'; '.join(reasons[:3])}{more}."


def _few(numbers: Widths) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    return f"({', '.join(map(str, numbers[:9]))}{', ...' if len(numbers) > 9 else ''})"
