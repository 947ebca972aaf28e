"""Which layers hurt when they are quantised, and how few of them must stay in float32.

Harm of a layer: quantise it alone and take the mean squared change of the logits on calibration images. Layers are kept
in the order of their harm, the worst first: 1, 2, 4, 8 .. of them until the gate passes, then by bisection between the
last number that failed and the first that passed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from rkd_deploy.export.int8 import Int8Quantiser
from rkd_deploy.export.judging import answers

IMAGES = 64
"""Calibration images that harm is measured on: it only has to rank."""

Array = npt.NDArray[Any]


def harms(
    quantiser: Int8Quantiser, nodes: dict[str, str], reference: Any, inputs: Array, backend: str
) -> dict[str, float]:
    """Mean squared change of the logits for every layer quantised alone.

    Args:
        quantiser: Of the graph.
        nodes: Name for people to name of the node.
        reference: The float32 graph.
        inputs: Calibration images as the graph takes them.
        backend: What the file is proven on.
    """
    inputs = inputs[:IMAGES]
    expected_NK = answers(reference, [inputs], backend)
    found = {}
    for name, node in nodes.items():
        found_NK = answers(quantiser.quantised(only=[node]), [inputs], backend)
        found[name] = float(np.mean((found_NK - expected_NK) ** 2))
    return found


def fewest(ranked: Sequence[str], passes: Callable[[Sequence[str]], bool]) -> Sequence[str]:
    """The shortest beginning of a ranking that passes.

    Args:
        ranked: Layers, the most harmful first; to keep none of them is known not to pass.
        passes: Whether the gate passes with these layers kept; asked at most 2 log2(len(ranked)) + 2 times.

    Returns:
        The layers to keep, for which `passes` was asked; all of them where even that does not pass.
    """
    failing, passing = 0, 1
    while not passes(ranked[:passing]):
        if passing >= len(ranked):
            return ranked
        failing, passing = passing, min(2 * passing, len(ranked))
    while passing - failing > 1:
        middle = (failing + passing) // 2
        if passes(ranked[:middle]):
            passing = middle
        else:
            failing = middle
    return ranked[:passing]
