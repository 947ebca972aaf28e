"""Triton's python backend that turns encoded images into a model's input.

The code that does it comes beside this file.

Copied into every version of a model NAME-pixels, with the card and the part of rkd_deploy that reads images: so a
version keeps its pre-processing, whatever the server has installed. The server's Python needs numpy and Pillow.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # there only inside of Triton


class TritonPythonModel:
    """One instance of the pre-processing; Triton makes as many as instance_group says."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the rule; Pillow is imported by the first request, so that its absence takes no other model down."""
        folder = Path(__file__).parent
        sys.path.insert(0, str(folder))
        from rkd_deploy.card import ModelCard
        from rkd_deploy.storage import read_text

        card = folder / "model.json"
        self.rule = ModelCard.from_json(read_text(card), str(card)).preprocess  # a named pipe is an error there

    def execute(self, requests: list[Any]) -> list[Any]:
        """Prepare the images of each request; what cannot be read is that request's error alone."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        from rkd_deploy.images import as_input, decoded, fitted

        images = pb_utils.get_input_tensor_by_name(request, "images").as_numpy().ravel()
        try:
            pixels = [
                fitted(decoded(io.BytesIO(image), f"Image {number}", self.rule.channels), self.rule)
                for number, image in enumerate(images)
            ]
        except Exception as error:  # whatever it is, the client gets to know, and the server goes on
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
        return pb_utils.InferenceResponse([pb_utils.Tensor("pixels", as_input(np.stack(pixels), self.rule))])
