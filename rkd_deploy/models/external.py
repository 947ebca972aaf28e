"""Any classifier through its stage maps: torchvision's, timm's, or a user's own.

The network is wrapped, not rewritten: its modules, weights and names stay, its logits are its own. Where its stages end
is found by running it once (`stage_maps.py`) or named by the user. The maps come from its traced graph (`tracing.py`);
from hooks on its modules (`hooks.py`) where it cannot be traced, and then only modules can be stages.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from rkd_deploy.errors import UsageError
from rkd_deploy.models.foreign import check_classifier, plain
from rkd_deploy.models.hooks import Hooked
from rkd_deploy.models.stage_maps import Layout, Size, Step, candidates, find_stages, layouts_of
from rkd_deploy.models.staged import FeatureNetwork, in_mode, pool
from rkd_deploy.models.tracing import Holder, Traced

_NO_TRUNK = 'Use student.layout = "branches", or name other stages.'
_ENLARGED = 64
"""Least height and width in pixels at which stages are looked for: on smaller images the deep maps of several
resolutions all come down to one position."""


class External(FeatureNetwork):
    """Stage maps and head of a classifier that this package has not written.

    A pruned copy of the network is seen in the same way: ``External(pruned, original.stages, input_size=...)``, with
    ``head=False`` where the copy is one of `without_head`.

    Args:
        network: RGB images [N, 3, H, W] to logits [N, K]. Not copied.
        stages: Where the stages end, deepest last: names of modules, or of operations as torchvision's feature
            extraction has them. Default: the last map of each resolution.
        input_size: Height and width of the images in pixels, or one number for both.
        head: Whether it classifies; False for a feature extractor, of which nothing after the last stage is run.
        layouts: How the maps of these stages lie, where another network of this topology has shown it; else found.

    Attributes:
        network: The wrapped classifier itself, not a copy.
        stages: Names of the stages.
        layouts: How their maps lie in the network's tensors.
        input_size: Height and width.
        stage_channels: Channels of every stage map.
        num_classes: K, or None without a head.

    Raises:
        UsageError: The network does not run on such images or gives no logits; a stage that is not there or is no map;
            no stage could be found.
    """

    def __init__(
        self,
        network: nn.Module,
        stages: Sequence[str] | None = None,
        *,
        input_size: int | tuple[int, int] = 224,
        head: bool = True,
        layouts: tuple[Layout, ...] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.training = network.training
        self.input_size = (input_size, input_size) if isinstance(input_size, int) else input_size
        _materialise(network, self.input_size)
        source = _source(network)
        x_NCHW = _images(network, self.input_size)
        with torch.no_grad():
            if stages is None:
                self.stages, layouts = _stages(source, x_NCHW)
            else:
                self.stages = tuple(stages)
            self.layouts = layouts or _layouts(source, x_NCHW, self.stages, head)
            self._read_maps = source.reader(self.stages, answer=False)
            self._read_all = source.reader(self.stages, answer=True) if head else None
            if head:
                values, logits_NK = self._answer(network, x_NCHW)
                self.num_classes: int | None = self._checked(source, x_NCHW, logits_NK)
                self._head = self._proven_head(source, values, logits_NK)
            else:
                with in_mode(self, False):
                    values = list(self._read_maps(self, x_NCHW))
                self.num_classes, self._head = None, None
            self.stage_channels = tuple(stage_map.shape[1] for stage_map in self._as_maps(values))

    @property
    def channels(self) -> int:
        """Channels of the last stage map."""
        return self.stage_channels[-1]

    @property
    def fc(self) -> nn.Module | None:
        """The classifier on the pooled last map, where the logits are a function of it: proven by value, not by name.

        The network's own linear layer where that is all; else (a norm before it, a small perceptron) everything that
        the network does after its last map, as a module of its own that shares the network's weights.
        """
        return self.network.get_submodule(self._head) if isinstance(self._head, str) else self._head and self._head[0]

    def features(self, x_NCHW: Tensor) -> tuple[Tensor, ...]:
        """The stage maps, [N, C_i, H_i, W_i], deepest last, whatever the network's own layout."""
        return self._as_maps(self._read_maps(self, x_NCHW))

    def maps_and_logits(self, x_NCHW: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Stage maps of one pass, and the logits [N, K] as the network itself computes them."""
        assert self._read_all is not None
        *values, logits_NK = self._read_all(self, x_NCHW)
        return self._as_maps(values), logits_NK

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Logits [N, K] as the network itself computes them, or the pooled last map [N, C] without a head."""
        return pool(self.features(x_NCHW)[-1]) if self._read_all is None else cast(Tensor, self.network(x_NCHW))

    def without_head(self) -> External:
        """A feature extractor with a copy of the weights: modules that no stage map needs become identities.

        Raises:
            UsageError: Its forward pass needs the head's own weights.
        """
        whole = plain(self.network)
        with torch.no_grad():
            used = _source(whole).used_modules(_images(whole, self.input_size), self.stages)
        network = _copy_of_used(whole, used)
        try:
            return External(network, self.stages, input_size=self.input_size, head=False)
        except UsageError as error:
            raise UsageError(
                f"The layers after the last map of the network {type(whole).__name__} cannot be left out: its forward "
                f"reads the weights of some itself and does not call them ({error.__cause__ or error}). Write its head "
                "as modules that are called; as a teacher it may stay as it is."
            ) from error

    def last_map(self, network: nn.Module, x_NCHW: Tensor) -> Tensor:
        """The last stage map [N, C, H, W] of another network of this topology, in eval mode; nothing after it runs."""
        return self._as_maps(self._read_maps(Holder(network).eval(), x_NCHW))[-1]

    def rewrapped(self, network: nn.Module) -> External:
        """Another network of the same topology, e.g. a pruned copy of this one's, seen in the same way."""
        has_head = self._read_all is not None
        return External(network, self.stages, input_size=self.input_size, head=has_head, layouts=self.layouts)

    def parts(self) -> tuple[nn.Module, ...]:
        """The network cut after every stage map: the first part takes images, each gives its map.

        One after the other they are `features`; they share the network's layers, each holding those that it uses.

        Raises:
            UsageError: The network cannot be traced, or what follows one of its maps needs more than that map.
        """
        source, name = _source(self.network), type(self.network).__name__
        if isinstance(source, Hooked):
            raise UsageError(f"{name} cannot be cut into stages: its forward pass looks at values. {_NO_TRUNK}")
        parts: list[nn.Module] = []
        for start, end, layout in zip((None, *self.stages), self.stages, self.layouts, strict=False):
            part = source.part(start, end)
            if part is None or layout.order != "NCHW":
                reason = f"needs more than the map of {start}" if part is None else f"gives no map but {layout.order}"
                raise UsageError(f"{name} cannot be cut into stages: what leads to {end} {reason}. {_NO_TRUNK}")
            parts.append(part.train(self.training))
        self._check_parts(parts)
        return tuple(parts)

    @torch.no_grad()
    def _check_parts(self, parts: Sequence[nn.Module]) -> None:
        """Refuse parts that do not give the maps of the whole, or overwrite the map that they take."""
        with in_mode(self, False):
            value = _images(self.network, self.input_size)
            expected = [value.clone(), *(stage_map.clone() for stage_map in self.features(value))]
            for part, stage, before, after in zip(parts, self.stages, expected, expected[1:], strict=False):
                given = before.clone()
                with in_mode(part, False):
                    same = torch.equal(part(given), after)
                if not (same and torch.equal(given, before)):
                    raise UsageError(
                        f"{type(self.network).__name__} cannot be cut into stages: what leads to stage {stage} "
                        f"overwrites the map that it takes, or depends on more than that. {_NO_TRUNK}"
                    )

    def _as_maps(self, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(layout.to_map(value) for layout, value in zip(self.layouts, values, strict=True))

    def _checked(self, source: Source, x_NCHW: Tensor, logits_NK: Any) -> int:
        """Number of classes K of an answer, once it is known to be logits."""
        shape = tuple(logits_NK.shape) if isinstance(logits_NK, Tensor) else ()
        if len(shape) != 2 or shape[0] != len(x_NCHW) or not source.single_output:
            raise UsageError(
                f"{_name(source)} must give logits [N, K] in training as in evaluation, one row for each image; for "
                f"{len(x_NCHW)} images it gave {f'a tensor {shape}' if shape else 'something else, or more'}. "
                "Wrap it in a module that gives the logits alone."
            )
        check_classifier(source.network, x_NCHW, _name(source))
        return shape[1]

    def _proven_head(self, source: Source, values: list[Tensor], logits_NK: Tensor) -> str | tuple[nn.Module] | None:
        """The head that reproduces the logits: path of a linear layer, or a module; None where there is none.

        The module comes in a tuple, because its weights are registered with the network already.
        """
        x_NCHW = _images(self.network, self.input_size)
        with torch.no_grad():
            network = self.network
            if torch.allclose(logits_NK[0], logits_NK[1]):
                # Some networks start with a head of zeros, with which every claim agrees: judged by other weights.
                network = _shaken(self.network)
                values, logits_NK = self._answer(network, x_NCHW)
            pooled_NC = pool(self.layouts[-1].to_map(values[-1]))

            def right(head: nn.Module) -> bool:
                try:
                    answer_NK = head(pooled_NC)
                except Exception:  # whatever a foreign layer raises: one behind a flattened map takes no pooled one
                    return False
                tolerance = 1e-4 * float(logits_NK.abs().max())
                return answer_NK.shape == logits_NK.shape and torch.allclose(answer_NK, logits_NK, 1e-4, tolerance)

            shape = (logits_NK.shape[1], pooled_NC.shape[1])
            # From the end: of several layers that give these logits the last one is the head, by its own right.
            for path, module in reversed(list(network.named_modules())):
                if type(module) is nn.Linear and module.weight.shape == shape and right(module):
                    return str(path)
            tail = _source(network).tail(self.stages[-1])
            if tail is None or not right(PooledHead(tail, self.layouts[-1]).eval()):
                return None
        return (PooledHead(cast(nn.Module, source.tail(self.stages[-1])), self.layouts[-1]),)

    def _answer(self, network: nn.Module, x_NCHW: Tensor) -> tuple[list[Tensor], Any]:
        """Stage values and answer of a network of this topology, in eval mode."""
        assert self._read_all is not None
        with in_mode(network, False):
            *values, logits_NK = self._read_all(Holder(network).eval(), x_NCHW)
        return values, logits_NK


class PooledHead(nn.Module):
    """The layers after a network's last map, as a function of that map's average: [N, C] to [N, K].

    Args:
        tail: From the last map, in the network's own layout, to the logits.
        layout: How the last map lies in the network's tensor.
    """

    def __init__(self, tail: nn.Module, layout: Layout) -> None:
        super().__init__()
        self.tail, self.layout = tail, layout

    def forward(self, pooled_NC: Tensor) -> Tensor:
        """Logits of pooled maps: pooling a map of one position changes nothing."""
        return cast(Tensor, self.tail(self.layout.from_pooled(pooled_NC)))


Source = Traced | Hooked


def _source(network: nn.Module) -> Source:
    try:
        return Traced(network)
    except Exception:  # symbols break a forward that looks at values in any way that Python code can break
        return Hooked(network)


def _images(network: nn.Module, size: Size) -> Tensor:
    """A batch of two noise images, always the same: of one, its axis would look like other axes of size 1."""
    like = next(network.parameters(), torch.empty(0))
    x_NCHW = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    return x_NCHW.to(like)


def _size(x_NCHW: Tensor) -> Size:
    height, width = x_NCHW.shape[-2:]
    return height, width


def _materialise(network: nn.Module, size: Size) -> None:
    """Let layers that wait for their first input, such as nn.LazyLinear, take their shape from images of this size."""
    if any(nn.parameter.is_lazy(tensor) for tensor in (*network.parameters(), *network.buffers())):
        with torch.no_grad(), in_mode(network, False):
            try:
                network(torch.zeros(2, 3, *size))
            except Exception as error:
                raise _does_not_run(network, size, error) from error


def _stages(source: Source, x_NCHW: Tensor) -> tuple[tuple[str, ...], tuple[Layout, ...] | None]:
    """Where the stages end, and how their maps lie where the same run shows it."""
    size = _size(x_NCHW)
    factor = math.ceil(_ENLARGED / min(size))
    if factor > 1:
        with contextlib.suppress(Exception):  # a network for one size only
            larger = interpolate(x_NCHW, scale_factor=factor)
            if stages := find_stages(source.steps(larger, (), answer=True), _size(larger)):
                return tuple(stages), None
    steps = _steps(source, x_NCHW, (), answer=True)
    if stages := find_stages(steps, size):
        layouts = layouts_of(steps, size)
        return tuple(stages), tuple(layouts[stage] for stage in stages)
    raise UsageError(
        f"No stage map was found in {_name(source)}: nothing that it computes has the layout [N, C, H, W], "
        "[N, H, W, C] or [N, tokens, C] and the proportions of its images. Name its stages, or give another network."
    )


def _layouts(source: Source, x_NCHW: Tensor, stages: tuple[str, ...], head: bool) -> tuple[Layout, ...]:
    size = _size(x_NCHW)
    known = [stage for stage in stages if source.knows(stage)]
    layouts = layouts_of(steps := _steps(source, x_NCHW, known, head), size)
    wrong = [stage for stage in stages if stage not in layouts]
    if wrong or not stages:
        choices = ", ".join(f"{name} {shape}" for name, shape in candidates(steps, size).items())
        raise UsageError(
            f"stages = {list(stages)}: {wrong or 'an empty list'} of {_name(source)} names no feature map. The maps of "
            f"one image, deepest last: {choices}. Choose from these, or name maps inside of them."
        )
    return tuple(layouts[stage] for stage in stages)


def _steps(source: Source, x_NCHW: Tensor, stages: Sequence[str], answer: bool) -> list[Step]:
    try:
        return source.steps(x_NCHW, stages, answer)
    except Exception as error:
        raise _does_not_run(source.network, _size(x_NCHW), error) from error


def _does_not_run(network: nn.Module, size: Size, error: Exception) -> UsageError:
    # torch.fx tells after an empty line which of its nodes it was at, which says nothing of the user's code.
    reason = str(error).partition("\n\nWhile executing")[0] or type(error).__name__
    return UsageError(
        f"the network {type(network).__name__} does not run on RGB images of {size[0]} x {size[1]} pixels: {reason}. "
        "Give it images of the size that it was made for."
    )


def _name(source: Source) -> str:
    return f"the network {type(source.network).__name__}"


def _shaken(network: nn.Module) -> nn.Module:
    """A copy of a network with a little noise added to all its weights."""
    shaken = copy.deepcopy(network).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in shaken.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=0.02)
    return shaken


def _copy_of_used(network: nn.Module, used: set[str]) -> nn.Module:
    """A copy of a network with identities in the place of layers that hold weights and are not used.

    What these layers stand in keeps its attributes. A layer may have children that hold no weights, as timm's norms
    have an activation. What runs after the last stage runs on other channels then, so no layer that counts them may be
    left there.
    """
    unused = {}
    for path, module in network.named_modules():
        within_used = any(path == name or path.startswith(f"{name}.") for name in used)
        holds_used = any(name.startswith(f"{path}.") for name in used)
        layer = path and list(module.parameters(recurse=False))
        if layer and not within_used and not holds_used:
            unused[id(module)] = nn.Identity()
    return copy.deepcopy(network, unused)
