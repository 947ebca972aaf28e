"""Describes a model: how to feed it, what it answers, where it comes from.

The same card is written to `model.json` beside the ONNX file and into the file's metadata, so that either can be lost.
Standard library only: an app reads it without torch, and other languages read the JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rkd_deploy.decoding import DecodingError, decode, parse_object
from rkd_deploy.errors import ModelFileError, UsageError, shortened, unknown_name
from rkd_deploy.fields import check_number

SCHEMA = 1
METADATA_KEY = "rkd_deploy.card"
INTERPOLATIONS = {"nearest": 0, "bilinear": 2, "bicubic": 3}
"""How an image may be resized, with Hugging Face's (and Pillow's) number of each."""

_LARGEST_SIDE = 2**15
_LARGEST_DEVIATION = 1e6


def unlistable(labels: Iterable[str]) -> str:
    """What is wrong with the first label that cannot be a line of labels.txt, as a sentence; empty where none is."""
    for label in labels:
        if len(label.splitlines()) != 1 or not label.strip():
            return f"The class {label!r} cannot stand in labels.txt, which is one label a line."
        try:
            label.encode()
        except UnicodeEncodeError:  # how Python reads a file name of other bytes than UTF-8
            return f"The class {label!r} has a name that is not UTF-8 text."
    return ""


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """From a photo to the network's input.

    An image is converted to RGB (to grey where there is one channel), its shorter side resized to
    `size / crop_fraction`, the centre cropped to `height` x `width`; then x = (pixel / 255 - mean) / std, per channel.

    Raises:
        UsageError: A number is out of its range, there are not as many means as standard deviations, or the
            interpolation is none of `INTERPOLATIONS`.
    """

    height: int
    width: int
    mean: tuple[float, ...]
    """Per channel, in units of [0, 1]."""
    std: tuple[float, ...]
    """Per channel, in units of [0, 1]."""
    interpolation: str = "bilinear"
    crop_fraction: float = 1.0
    embedded: bool = True
    """True: the graph takes uint8 [N, H, W, C] and normalises itself. False: float32 [N, C, H, W], normalised."""

    def __post_init__(self) -> None:
        check_number("height =", self.height, 1, _LARGEST_SIDE, whole=True)
        check_number("width =", self.width, 1, _LARGEST_SIDE, whole=True)
        check_number("crop_fraction =", self.crop_fraction, 0.01, 1)
        for name in ("mean", "std"):
            if not isinstance(values := getattr(self, name), tuple | list):
                raise UsageError(f"{name} is {shortened(values)}; it must be a tuple of numbers, one for each channel.")
        if len(self.mean) not in (1, 3) or len(self.std) != len(self.mean):
            raise UsageError(
                f"mean has {len(self.mean)} values and std {len(self.std)}; both must have 3 (RGB), or 1 (grey)."
            )
        for mean, std in zip(self.mean, self.std, strict=True):
            check_number("mean =", mean, -_LARGEST_DEVIATION, _LARGEST_DEVIATION)
            check_number("std =", std, 1 / _LARGEST_DEVIATION, _LARGEST_DEVIATION)
        if self.interpolation not in INTERPOLATIONS:
            raise UsageError(unknown_name("interpolation", self.interpolation, INTERPOLATIONS))

    @property
    def channels(self) -> int:
        """Number of colour channels."""
        return len(self.mean)

    @property
    def resize_to(self) -> tuple[int, int]:
        """Height and width that an image must cover once it is resized, before its centre is cropped."""
        return round(self.height / self.crop_fraction), round(self.width / self.crop_fraction)

    @property
    def fixed_rules(self) -> dict[str, Any]:
        """What is the same for every model, or follows from the fields: a card says it to readers that are not us."""
        return {
            "resize": "shorter side",
            "resize_to": list(self.resize_to),
            "antialias": self.interpolation != "nearest",
            "crop": "center",
            "colour_order": "RGB" if self.channels == 3 else "grey",
        }

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape of one input as the graph takes it, without the batch."""
        shape = (self.height, self.width)
        return (*shape, self.channels) if self.embedded else (self.channels, *shape)

    @property
    def input_dtype(self) -> str:
        """NumPy name of the graph's input type."""
        return "uint8" if self.embedded else "float32"

    def to_hugging_face(self) -> dict[str, Any]:
        """The rule under the field names of Hugging Face's preprocessor_config.json."""
        return {
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": min(self.resize_to)},
            "resample": INTERPOLATIONS[self.interpolation],
            "do_center_crop": True,
            "crop_size": {"height": self.height, "width": self.width},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }


@dataclass(frozen=True, kw_only=True)
class GraphFacts:
    """What an exported graph does for one image, beside what was trained.

    Attributes:
        macs: Multiply-adds, those with zeros included.
        weights: Numbers that are stored, biases included.
        zeros: Number of the weights that are zero.
    """

    macs: int
    weights: int
    zeros: int


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """Everything an app, a bench or a person needs to know of an exported model."""

    name: str
    labels: tuple[str, ...]
    preprocess: Preprocess
    outputs: tuple[str, ...] = ("logits",)
    part: str = "fused"
    """Which network of the run this is: fused (S + A), student (S alone), s0, teacher."""
    fusion: str = "none"
    fusion_search: Mapping[str, Any] = field(default_factory=dict)
    """How level auto chose the fusion: measured on what, medians in ms, the choice. fusion.json has the samples."""
    precision: str = "fp32"
    lowering: Mapping[str, Any] = field(default_factory=dict)
    """Conversion of a file below fp32: target, calibration, layers left in float32, the gate's figures and limits."""
    macs: int = 0
    """Multiply-adds of one image, by the convention of `rkd_deploy.models.cost`, before fusion."""
    parameters: int = 0
    """Trained numbers, before fusion."""
    graph: GraphFacts | None = None
    """What the float32 graph multiplies and stores, zeros between S and A included; None where it was not counted."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Accuracy as measured in training, on which split, over how many images."""
    parity: Mapping[str, Any] = field(default_factory=dict)
    """What the export's gate measured against PyTorch, and its tolerance."""
    early_exit: Mapping[str, Any] = field(default_factory=dict)
    """Early exit, where it was exported: files and MACs of its steps, the threshold, and what it saves and costs."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """The run, the recipe and the SHA-256 of the weights."""
    versions: Mapping[str, str] = field(default_factory=dict)
    checksums: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of every file of the bundle (`rkd_deploy.backends.files`); empty in the card inside an ONNX file."""

    def to_json(self) -> str:
        """One JSON object; `from_json` gives the equal card back."""
        content = {"schema": SCHEMA, **asdict(self)}
        content["preprocess"] |= self.preprocess.fixed_rules
        return json.dumps(content, indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, where: str) -> ModelCard:
        """Read a card.

        Args:
            text: What `to_json` wrote.
            where: The file it comes from, for messages.

        Raises:
            ModelFileError: No JSON, a newer schema, fields missing, of the wrong type or out of their range.
        """
        try:
            content = parse_object(text)
            schema = content["schema"]
        except (DecodingError, KeyError) as error:
            raise ModelFileError(
                f"{where} holds no model card that can be read ({error}). Export it again with rkd-deploy export."
            ) from error
        if schema != SCHEMA:
            raise ModelFileError(
                f"{where} is written in card schema {schema}; this version reads schema {SCHEMA}. "
                "Update with: pip install -U rkd-deploy"
            )
        try:
            if "outputs" not in content:
                raise DecodingError("outputs is missing")  # an app must not guess which output is which
            card = decode(cls, content)
            stated = content["preprocess"]
            for rule, value in card.preprocess.fixed_rules.items():
                if stated.get(rule, value) != value:  # cards of before have none of them
                    raise DecodingError(
                        f"preprocess.{rule} is {shortened(stated[rule])} where this version can only do {value!r}"
                    )
            return card
        except (DecodingError, UsageError) as error:
            raise ModelFileError(
                f"The model card in {where} lacks a field or has a wrong one ({error}). "
                "Export the model again with rkd-deploy export."
            ) from error
