"""Runs the model of a server: from a request's bytes to its answer, in one call."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from rkd_deploy.errors import UsageError
from rkd_deploy.images import Pixels, decoded, fitted
from rkd_deploy.serve.classifier import Classifier, check_finite, softmax
from rkd_deploy.serve.http.protocol import TensorInterface, build_answer, parse_request
from rkd_deploy.serve.http.settings import Limits

T = TypeVar("T")


@dataclass(frozen=True)
class Reply:
    """An answer, and what it took: seconds by the names of `metrics.HISTOGRAMS`."""

    body: bytes | dict[str, Any]
    headers: dict[str, str]
    seconds: dict[str, float]


class ServedModel:
    """A classifier behind the two ways to ask it; threads may share it, as its backend."""

    def __init__(self, classifier: Classifier, limits: Limits) -> None:
        self.classifier, self._limits = classifier, limits
        self.interface = TensorInterface.of(classifier.card, classifier.info.input_name, limits.batch)

    def warm_up(self) -> None:
        """Classify a black image: the first request is not to wait for libraries to be loaded."""
        from PIL import Image

        black = io.BytesIO()
        Image.new("RGB", (16, 16)).save(black, "JPEG")
        self.classify(black.getvalue(), 1)

    def classify(self, body: bytes, top: int) -> Reply:
        """Labels and probabilities of one encoded image, best first.

        Raises:
            UsageError: There is nothing.
            DataError: It is no image, or larger than the limit.
            BackendError: The run failed.
        """
        if not body:
            raise UsageError("The request has no body: send an image's bytes, as curl --data-binary @photo.jpg does.")
        pixels, decoding = _timed(lambda: self._pixels((body,)))
        (best,), inferring = _timed(lambda: self.classifier.predict_batch(pixels, top))
        answer = {
            "model": self.interface.model,
            "predictions": [guess._asdict() for guess in best],
            "milliseconds": {"decode": 1000 * decoding, "inference": 1000 * inferring},
        }
        return Reply(answer, {}, {"decode": decoding, "inference": inferring})

    def infer(self, body: bytes, header_length: str | None) -> Reply:
        """The answer to a request of the Open Inference Protocol.

        Raises:
            UsageError: The request is none.
            DataError: What it holds is no image, or one larger than the limit.
            BackendError: The run failed.
        """
        request = parse_request(body, header_length, self.interface)
        seconds, tensor = {}, request.tensor
        if tensor is None:
            pixels, seconds["decode"] = _timed(lambda: self._pixels(request.images))
            logits, seconds["inference"] = _timed(lambda: self.classifier.logits(pixels))
        else:
            logits, seconds["inference"] = _timed(lambda: self.classifier.infer(tensor))
        answers = {"logits": check_finite(logits)}
        if any(choice.name == "probabilities" for choice in request.outputs):
            answers["probabilities"] = softmax(logits)
        return Reply(*build_answer(request, answers, self.interface), seconds)

    def _pixels(self, images: Sequence[bytes]) -> Pixels:
        """Encoded images as pixels of the model's size, [N, H, W, C]."""
        rule, limit = self.classifier.card.preprocess, self._limits.pixels
        names = ["The image"] if len(images) == 1 else [f"Image {number}" for number in range(len(images))]
        pixels = [
            fitted(decoded(io.BytesIO(image), name, rule.channels, max_pixels=limit), rule)
            for name, image in zip(names, images, strict=True)
        ]
        return pixels[0][np.newaxis] if len(pixels) == 1 else np.stack(pixels)


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    return work(), time.perf_counter() - start
