"""Top-1 accuracy of a backend, the same file that is timed.

Letters: N images.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from rkd_deploy.errors import DataError
from rkd_deploy.serve.backends import Array, Backend, infer_many


def predictions(backend: Backend, batches: Iterable[Array]) -> npt.NDArray[np.int64]:
    """The class with the largest logit, for each image.

    Args:
        backend: The model.
        batches: Arrays [n, ...] as the model takes them; n may differ from batch to batch.

    Returns:
        [N], in the order of the images.

    Raises:
        UsageError: A batch does not fit the model.
    """
    parts = [infer_many(backend, batch).argmax(axis=1).astype(np.int64) for batch in batches]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def top1(predicted: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Share of right predictions, in %.

    Raises:
        DataError: There are none, or their numbers differ.
    """
    predicted_N, labels_N = np.asarray(predicted), np.asarray(labels)
    if predicted_N.shape != labels_N.shape or predicted_N.size == 0:
        raise DataError(
            f"Accuracy was asked for {predicted_N.size} predictions and {labels_N.size} labels; "
            "it needs one label for each, and at least one. Check that both come from the same split."
        )
    return 100 * float(np.mean(predicted_N == labels_N))
