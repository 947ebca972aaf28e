"""Looks into S + A for one image: the feature maps of T, S and A, and what A corrects.

Maps are compared as they are in training: P_S f_S and the sums s_i in T's channels, at the smaller height and width of
both (`methods/base.py`). A map [C, H, W] is shown by the root of the mean square over its channels at each position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from rkd_deploy.card import Preprocess
from rkd_deploy.errors import UsageError
from rkd_deploy.images import ImageLike, normalise, to_array
from rkd_deploy.models.residual import ResidualStudent
from rkd_deploy.models.staged import FeatureNetwork
from rkd_deploy.train.methods.base import match_size
from rkd_deploy.train.networks import PARTS, load_part
from rkd_deploy.train.runs import Run

_MOST_LIKELY = 3

Strengths = npt.NDArray[np.float32]
"""A map [H, W]: the root of the mean square over the channels at each position."""


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What the networks of a run make of one image.

    Attributes:
        pixels_HWC: The image as the networks see it, uint8.
        maps: By name, in the order of the method: T's map, S's, what S leaves over, A's, what the sum leaves over.
        explained: Share of the mean square of T's map that S explains, and that the sum does; below 0 where zeros would
            be nearer.
        answers: By network, its most likely classes with their probabilities.
    """

    pixels_HWC: npt.NDArray[np.uint8]
    maps: Mapping[str, Strengths]
    explained: Mapping[str, float]
    answers: Mapping[str, tuple[tuple[str, float], ...]]


def explain(run: Run, image: ImageLike) -> Explanation:
    """Run T, S and A of a finished run on one image.

    Args:
        run: With S + A of scheme sequential or end_to_end, and T.
        image: A path, a PIL image, or a uint8 array.

    Raises:
        UsageError: The run has no T, or no S + A whose maps are summed once.
        ImageError: The image cannot be read.
    """
    # Outside of inference mode: narrowing a network by its graph, as S0 was cut, needs gradients.
    T, model, student = (load_part(run, part) for part in ("teacher", "fused", "student"))
    if not isinstance(model, ResidualStudent) or not isinstance(T, FeatureNetwork):
        raise UsageError(
            f"{run.folder} was trained by scheme progressive, where S and A exchange their maps at every stage: there "
            "is no one map that A corrects. Explain a run of scheme sequential or end_to_end."
        )
    with torch.inference_mode():
        return _explanation(run, image, T, model, student)


def _explanation(
    run: Run, image: ImageLike, T: FeatureNetwork, model: ResidualStudent, student: nn.Module
) -> Explanation:
    facts = run.facts
    crop = 1.0 if facts.crop_fraction is None else facts.crop_fraction
    height, width = facts.image_size
    preprocess = Preprocess(height=height, width=width, mean=facts.mean, std=facts.std, crop_fraction=crop)
    pixels_HWC = to_array(image, preprocess)
    x_NCHW = torch.from_numpy(normalise(pixels_HWC[None], preprocess))
    maps_T, z_T = T.maps_and_logits(x_NCHW)
    networks: dict[str, nn.Module] = {"student": student, "fused": model}
    logits = {"teacher": z_T} | {part: cast(Tensor, network(x_NCHW)) for part, network in networks.items()}
    f_T, s = match_size(maps_T[-1], model.student_map(x_NCHW))
    _, whole = match_size(maps_T[-1], model.summed_map(x_NCHW))
    maps = {"f_T": f_T, "P_S f_S": s, "f_T - P_S f_S": f_T - s, "P_A f_A": whole - s, "f_T - sum": f_T - whole}
    return Explanation(
        pixels_HWC=pixels_HWC,
        maps={name: _strength(feature_map) for name, feature_map in maps.items()},
        explained={PARTS["student"]: _share(f_T, s), PARTS["fused"]: _share(f_T, whole)},
        answers={PARTS[part]: _most_likely(z_NK[0], facts.classes) for part, z_NK in logits.items()},
    )


def _strength(map_NCHW: Tensor) -> Strengths:
    return np.asarray(map_NCHW[0].square().mean(0).sqrt().numpy(), np.float32)


def _share(f_T: Tensor, approximation: Tensor) -> float:
    return float(1 - (f_T - approximation).square().mean() / f_T.square().mean())


def _most_likely(z_K: Tensor, classes: tuple[str, ...]) -> tuple[tuple[str, float], ...]:
    top: Any = z_K.softmax(0).topk(min(_MOST_LIKELY, len(classes)))
    return tuple((classes[int(index)], float(p)) for p, index in zip(top.values, top.indices, strict=True))
