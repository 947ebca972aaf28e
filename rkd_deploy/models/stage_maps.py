"""Finds where the stages of an unknown network end, and turns its tensors into maps.

A stage map is the last map at one resolution. "Last" is not the last operation: the first block of the next stage may
still work at the old resolution (the expansion of an inverted residual block, the norm before a strided convolution).
So the network is taken apart only as far as needed: a module in which the resolution changes more than once is opened,
its children and the operations of its own `forward` are looked at one by one; any other module is one unit, of which
only the output counts. The first global pooling ends the search.

Three layouts are understood: [N, C, H, W], [N, H, W, C] (Swin) and tokens [N, L, C] (ViT), of which the first ones
(class, distillation and register tokens) are no part of the map.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor, unflatten
from torch.nn.functional import pad

Size = tuple[int, int]

_MOST_PREFIX_TOKENS = 8
_POOLING = ("AvgPool2d", "avg_pool2d", "mean")


class Step(NamedTuple):
    """One module or operation of a run, and what it gave.

    Attributes:
        name: As `tracing.Trace.names` has it: after the module that it is or stands in.
        what: Name of the module's class or of the function.
        shape: Shape of the tensor that it gave.
        is_module: Whether the tensor is what a module puts out.
    """

    name: str
    what: str
    shape: tuple[int, ...]
    is_module: bool

    @property
    def owner(self) -> str:
        """Path of the module whose `forward` did the step."""
        return self.name.rpartition(".")[0]


class Layout(NamedTuple):
    """How a map lies in a tensor.

    Attributes:
        order: ``"NCHW"``, ``"NHWC"`` or ``"NLC"``.
        grid: Height and width.
        prefix: Tokens before the map's, where they are tokens.
    """

    order: str
    grid: Size
    prefix: int = 0

    def to_map(self, value: Tensor) -> Tensor:
        """The map [N, C, H, W] in a tensor of this layout."""
        if self.order == "NCHW":
            return value
        if self.order == "NHWC":
            return value.permute(0, 3, 1, 2)
        return unflatten(value[:, self.prefix :].transpose(1, 2), 2, self.grid)

    def from_pooled(self, pooled_NC: Tensor) -> Tensor:
        """Pooled channels [N, C] as a map of one position, in this layout; the tokens before it are zeros."""
        if self.order == "NCHW":
            return pooled_NC[:, :, None, None]
        if self.order == "NHWC":
            return pooled_NC[:, None, None, :]
        return pad(pooled_NC[:, None, :], (0, 0, self.prefix, 0))


def layout_of(shape: Sequence[int], image: Size, before: Size | None) -> Layout | None:
    """The layout of a tensor, or None where it is no map.

    Args:
        shape: Shape of the tensor.
        image: Height and width of the image.
        before: Height and width of the map that tokens come of. None: they are taken for a square map's.
    """
    if len(shape) == 4:
        _, first, second, third = shape
        if _fits((second, third), image):
            return Layout("NCHW", (second, third))
        return Layout("NHWC", (first, second)) if _fits((first, second), image) else None
    if len(shape) != 3:
        return None
    tokens = shape[1]
    if before is not None:
        prefix = tokens - before[0] * before[1]
        return Layout("NLC", before, prefix) if 0 <= prefix <= _MOST_PREFIX_TOKENS else None
    side = math.isqrt(tokens)
    if side > 1 and tokens - side**2 <= _MOST_PREFIX_TOKENS and _fits((side, side), image) and image[0] == image[1]:
        return Layout("NLC", (side, side), tokens - side**2)
    return None


def layouts_of(steps: Iterable[Step], image: Size) -> dict[str, Layout]:
    """Layouts of all steps that give a map, by the steps' names."""
    layouts: dict[str, Layout] = {}
    before: Size | None = None
    for step in steps:
        layout = layout_of(step.shape, image, before)
        if layout is None and step.is_module:  # fewer tokens than before: pooled. Loose ones may be class or register
            layout = layout_of(step.shape, image, None)
        if layout is not None and step.name:
            layouts[step.name] = layout
            if layout.order != "NLC" and layout.grid != (1, 1):  # what pools and excites is no map that tokens come of
                before = layout.grid
    return layouts


def find_stages(steps: Sequence[Step], image: Size) -> list[str]:
    """Names of the stages' last steps, deepest last; empty where there is no map.

    Args:
        steps: Steps of the network on one image, in order.
        image: Height and width of the image.
    """
    layouts = layouts_of(steps, image)
    last: dict[Size, str] = {}
    for step in _units(steps, layouts, image):
        grid = layouts[step.name].grid
        last.pop(grid, None)
        last[grid] = step.name
    stages: list[str] = []
    smallest = math.inf
    # The order is that of each size's last step. A decoder or a pyramid comes back to sizes that were left before; only
    # a map smaller than all before it begins a stage.
    for (height, width), name in last.items():
        if height * width < smallest:
            if height * width > smallest / 2:  # padding and cropping change the size too, by little
                stages.pop()
            stages.append(name)
            smallest = height * width
    return stages


def candidates(steps: Sequence[Step], image: Size) -> dict[str, str]:
    """Steps that a user may choose as stages, in order, and the shapes of their maps."""
    layouts = layouts_of(steps, image)
    shapes = {}
    for step in _units(steps, layouts, image):
        order, (height, width), _ = layouts[step.name]
        shapes[step.name] = f"{step.shape[1 if order == 'NCHW' else -1]}x{height}x{width}"
    return shapes


def _units(steps: Sequence[Step], layouts: dict[str, Layout], image: Size) -> Iterator[Step]:
    """Steps whose output is a map, the network taken apart as far as needed, up to the global pooling."""
    opened = _opened(steps, layouts, image)
    pooled_in = None
    for step in steps:
        # Squeeze-and-excitation pools inside of a block as well: only a pooling that ends a unit is the network's last.
        pools = _pools_globally(step, layouts.get(step.name))
        if step.owner not in opened or step.name in opened:
            pooled_in = step.owner if pools else None
            continue
        if pools or step.name == pooled_in:  # the unit is a pooling, or ends in one
            return
        if step.name in layouts and step.shape[1:] != (3, *image):  # not the image itself, rescaled
            yield step


def _opened(steps: Iterable[Step], layouts: dict[str, Layout], image: Size) -> set[str]:
    """Paths of the network and of modules in which the resolution changes more than once, their input's included."""
    sizes: dict[str, set[Size]] = {}
    before = image
    for step in steps:
        layout = layouts.get(step.name)
        if not step.is_module or layout is None or layout.grid == (1, 1):
            continue
        path = step.owner
        while path:
            sizes.setdefault(path, {before}).add(layout.grid)
            path = path.rpartition(".")[0]
        before = layout.grid
    return {"", *(path for path, grids in sizes.items() if len(grids) > 2)}


def _pools_globally(step: Step, layout: Layout | None) -> bool:
    if "adaptive" in step.what.lower() and "pool" in step.what.lower():
        return True
    return step.what in _POOLING and (layout is None or layout.grid == (1, 1))


def _fits(size: Size, image: Size) -> bool:
    """Whether a map of this size can come of an image: no larger, and of its proportions to less than a pixel."""
    (height, width), (whole_height, whole_width) = size, image
    proportional = abs(height * whole_width - width * whole_height) < max(image)
    return proportional and height <= whole_height + 1 and width <= whole_width + 1
