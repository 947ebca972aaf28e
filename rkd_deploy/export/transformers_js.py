"""Writes a bundle as the folder that Transformers.js loads: pixel_values in, logits out, configuration beside it.

    FOLDER/
      config.json               labels, and that the file is float32 as it stands
      preprocessor_config.json  resize, crop and, where the graph leaves that to its caller, normalisation
      onnx/model.onnx           the bundle's graph behind another input

Letters: N batch, C channels, H height, W width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rkd_deploy.backends import RunOn, describe_model, infer_many
from rkd_deploy.backends.files import model_path
from rkd_deploy.bench.parity import GOLDEN_NAME, Parity, compare_logits, gate, read_golden
from rkd_deploy.card import ModelCard, Preprocess
from rkd_deploy.errors import UsageError, require
from rkd_deploy.storage import new_folder, write_bytes, write_json

INPUT = "pixel_values"
"""What Transformers.js calls an image model's input: float32 [N, C, H, W]."""

_MODEL_TYPE = "resnet"
"""A model type that its image classification knows; none of these does more than run the graph."""
_PROCESSOR = "BitImageProcessor"
"""The processor of Transformers.js that resizes the shorter side and crops the centre."""


def export_transformers_js(bundle: Path, folder: Path) -> Parity:
    """Write a bundle for Transformers.js, and prove the new graph with the bundle's golden data.

    Returns:
        How far its logits are from the bundle's own.

    Raises:
        UsageError: The model takes grey images or an input that is not square, which Transformers.js cannot make.
        GateError: The new graph answers otherwise; nothing is left behind.
        ModelFileError: The bundle is missing or corrupt.
        StorageError: The folder exists, or could not be written.
        MissingDependencyError: onnx or onnxruntime is not installed.
    """
    onnx = require("onnx", "export")
    card = describe_model(bundle)
    _check_expressible(card, bundle)
    inputs, logits_NK, tolerance = read_golden(model_path(bundle).with_name(GOLDEN_NAME))
    with new_folder(folder) as temporary:
        file = temporary / "onnx" / "model.onnx"
        model = with_pixel_values(onnx.load(model_path(bundle)), card.preprocess)
        write_bytes(file, model.SerializeToString(deterministic=True))
        write_json(temporary / "config.json", _config(card))
        write_json(temporary / "preprocessor_config.json", processor_config(card.preprocess))
        pixels = inputs.astype(np.float32).transpose(0, 3, 1, 2) if card.preprocess.embedded else inputs
        with RunOn().load(file) as backend:
            parity = compare_logits(logits_NK, infer_many(backend, np.ascontiguousarray(pixels)), tolerance)
        gate(parity, f"{folder} against {bundle}", card.precision)
    return parity


def with_pixel_values(model: Any, preprocess: Preprocess) -> Any:
    """The graph behind an input `pixel_values`, changed in place.

    A graph that takes bytes [N, H, W, C] gets them from floats 0 to 255 [N, C, H, W]: Transformers.js gives nothing but
    floats, and whole numbers survive that unrounded.

    Args:
        model: onnx.ModelProto with one input.
        preprocess: The model's rule.
    """
    from onnx import TensorProto, helper

    (taken,) = model.graph.input
    if preprocess.embedded:
        nodes = [
            helper.make_node("Transpose", [INPUT], ["pixels_NHWC"], perm=[0, 2, 3, 1]),
            helper.make_node("Cast", ["pixels_NHWC"], [taken.name], to=TensorProto.UINT8),
        ]
    else:
        nodes = [helper.make_node("Identity", [INPUT], [taken.name])]
    batch = taken.type.tensor_type.shape.dim[0]
    shape = [batch.dim_param or batch.dim_value, preprocess.channels, preprocess.height, preprocess.width]
    del model.graph.input[:]
    model.graph.input.append(helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, shape))
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *rest])
    return model


def processor_config(preprocess: Preprocess) -> dict[str, Any]:
    """preprocessor_config.json; a graph that normalises by itself is given pixels from 0 to 255."""
    config = {"image_processor_type": _PROCESSOR, **preprocess.to_hugging_face()}
    return config | ({"do_rescale": False, "do_normalize": False} if preprocess.embedded else {})


def _config(card: ModelCard) -> dict[str, Any]:
    return {
        "model_type": _MODEL_TYPE,
        "num_labels": len(card.labels),
        "id2label": {str(index): label for index, label in enumerate(card.labels)},
        "label2id": {label: index for index, label in enumerate(card.labels)},
        # In a browser it would otherwise look for a file that it calls quantised.
        "transformers.js_config": {"dtype": "fp32"},
    }


def _check_expressible(card: ModelCard, bundle: Path) -> None:
    rule = card.preprocess
    if rule.channels != 3:
        raise UsageError(
            f"{bundle} takes grey images; Transformers.js makes all images RGB. Use ONNX Runtime's package."
        )
    if rule.height != rule.width:
        raise UsageError(
            f"{bundle} takes images of {rule.width} x {rule.height}; Transformers.js resizes the shorter side whatever "
            "the other one needs, so its input must be square. Use ONNX Runtime's package, as examples/node does."
        )
