"""Weights that no export can make sense of."""

from __future__ import annotations

import torch
from torch import nn

from rkd_deploy.errors import CheckpointError


def check_finite(model: nn.Module) -> None:
    """Refuse a network with a weight or a statistic that is NaN or infinite.

    Raises:
        CheckpointError: There is one; the message names the tensor and counts.
    """
    for name, tensor in model.state_dict().items():
        if tensor.dtype.is_floating_point and not torch.isfinite(tensor).all():
            count = int((~torch.isfinite(tensor)).sum())
            raise CheckpointError(
                f"{count} of the {tensor.numel()} values of {name} are NaN or infinite; a network is exported only "
                "where all are finite. Take an earlier checkpoint, or train again with a lower train.lr."
            )
