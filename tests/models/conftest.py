"""Costs in closed form: the second opinion on `cost` and `separation`."""

from __future__ import annotations

from collections.abc import Sequence

import pytest


class ClosedForm:
    """Costs of the CIFAR ResNet of a depth; sizes are height and width of the image."""

    def maps(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """Height and width of the three stage maps: a 3x3 convolution with stride 2 and padding 1 rounds up."""
        sizes = [size]
        for _ in range(2):
            height, width = sizes[-1]
            sizes.append(((height + 1) // 2, (width + 1) // 2))
        return sizes

    def macs(self, depth: int, widths: Sequence[int], classes: int | None, size: tuple[int, int] = (32, 32)) -> int:
        """Sum of Kh Kw Cin Cout Hout Wout over all convolutions, and C K for the head."""
        stem, *stages = widths
        total = 3 * 3 * 3 * stem * size[0] * size[1]
        before = stem
        for number, (channels, (height, width)) in enumerate(zip(stages, self.maps(size), strict=True)):
            convolutions = 2 * (depth - 2) // 6
            total += 3 * 3 * before * channels * height * width
            total += 3 * 3 * channels * channels * height * width * (convolutions - 1)
            if number > 0 or before != channels:
                total += before * channels * height * width
            before = channels
        return total + (0 if classes is None else before * classes)

    def parameters(self, depth: int, widths: Sequence[int], classes: int | None) -> int:
        """Weights of convolutions, scale and shift of every batch norm, weights and biases of the head."""
        stem, *stages = widths
        total = 3 * 3 * 3 * stem + 2 * stem
        before = stem
        for number, channels in enumerate(stages):
            convolutions = 2 * (depth - 2) // 6
            total += 9 * before * channels + 9 * channels * channels * (convolutions - 1) + 2 * channels * convolutions
            if number > 0 or before != channels:
                total += before * channels + 2 * channels
            before = channels
        return total + (0 if classes is None else before * classes + classes)

    def adapter(self, unit: str, width: int, channels: int, size: tuple[int, int] = (32, 32)) -> int:
        """A 1x1 convolution without bias on the last map, and batch norm."""
        height, width_of_map = self.maps(size)[-1]
        return width * channels * height * width_of_map if unit == "macs" else width * channels + 2 * channels

    def network(
        self, unit: str, depth: int, widths: Sequence[int], classes: int | None, size: tuple[int, int] = (32, 32)
    ) -> int:
        """In either unit."""
        if unit == "macs":
            return self.macs(depth, widths, classes, size)
        return self.parameters(depth, widths, classes)


@pytest.fixture(scope="session")
def closed_form() -> ClosedForm:
    """Costs computed by hand."""
    return ClosedForm()
