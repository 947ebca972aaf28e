"""Holds a foreign network to what everything here takes: real float32 weights, and logits row by row.

Weights are brought to that form (`plain`); answers are checked, because nothing turns probabilities into logits again.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._python_dispatch import TorchDispatchMode

from rkd_deploy.errors import CheckpointError, DivergenceError, UsageError
from rkd_deploy.models.staged import in_mode


def check_finite_weights(network: nn.Module) -> None:
    """Refuse a network with a weight or a statistic that is NaN or infinite.

    Raises:
        CheckpointError: There is such a weight; the message names the tensor and counts.
    """
    for name, tensor in network.state_dict().items():
        if tensor.dtype.is_floating_point and not torch.isfinite(tensor).all():
            count = int((~torch.isfinite(tensor)).sum())
            raise CheckpointError(
                f"{count} of the {tensor.numel()} values of {name} are NaN or infinite; a network is exported only "
                "where all are finite. Take an earlier checkpoint, or train again with a lower train.lr."
            )


def check_real(network: nn.Module, name: str) -> None:
    """Refuse complex weights.

    Args:
        network: Any module.
        name: What messages call it.

    Raises:
        UsageError: It has some; the message names the first.
    """
    for path, tensor in network.state_dict().items():
        if tensor.is_complex():
            raise UsageError(
                f"{name} has complex weights ({path}, {tensor.dtype}), which no file format and no runtime here takes. "
                "Write it with real ones: a product of complex numbers is four of real ones."
            )


def with_current_norms(network: nn.Module, name: str) -> nn.Module:
    """The network with the hooks of torch.nn.utils.weight_norm, which is deprecated, replaced by parametrisations.

    What a hook computes is no weight that could be copied. State dicts of before still load.

    Args:
        network: Changed in place.
        name: What messages call it.

    Raises:
        UsageError: It has hooks of torch.nn.utils.spectral_norm, whose state dicts would not load any more.
    """
    for path, module in list(network.named_modules()):
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, SpectralNorm):
                raise UsageError(
                    f"{name}: layer {path} has the hook of torch.nn.utils.spectral_norm, which is deprecated and "
                    "cannot be copied. Use torch.nn.utils.parametrizations.spectral_norm."
                )
            if isinstance(hook, WeightNorm):
                nn.utils.remove_weight_norm(module, hook.name)
                parametrizations.weight_norm(module, hook.name, hook.dim)
    return network


def plain(network: nn.Module) -> nn.Module:
    """The network with float32 weights and without parametrisations, e.g. weight norm: each gives its result for good.

    Args:
        network: Left as it is.

    Returns:
        A copy, or the network itself where it is so already.
    """
    parametrised = any(parametrize.is_parametrized(module) for module in network.modules())
    tensors = (*network.parameters(), *network.buffers())
    if not parametrised and all(tensor.dtype == torch.float32 for tensor in tensors if tensor.is_floating_point()):
        return network
    network = copy.deepcopy(network).float()
    for module in list(network.modules()):
        if parametrize.is_parametrized(module):
            # Not remove_parametrizations: it takes the weight away from the class, which the original shares.
            weights = {
                name: getattr(module, name).detach().clone() for name in cast(nn.ModuleDict, module.parametrizations)
            }
            del module.parametrizations
            module.__class__ = type(module).__bases__[0]
            for name, weight in weights.items():
                module.register_parameter(name, nn.Parameter(weight))
    return network


_PROBABILITIES: Mapping[Any, str] = {
    torch.ops.aten._softmax.default: "softmax",
    torch.ops.aten.sigmoid.default: "sigmoid",
    torch.ops.aten.hardsigmoid.default: "hardsigmoid",
}
"""Operations that make probabilities, and their names. Log-softmax is none: the softmax of log-probabilities and their
order are those of the logits."""

_UNCHANGED = (
    "view", "_unsafe_view", "reshape", "flatten", "squeeze", "unsqueeze", "expand",
    "clone", "contiguous", "_to_copy", "alias", "detach", "clamp", "clamp_min", "clamp_max",
)  # fmt: skip
"""Names of operations that keep every value; bounds, which are put around probabilities before a logarithm, most."""


class _LastOperation(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which operation computed every tensor's values, looking through those that keep them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # With the tensor itself, which keeps it alive: an id is used again when it is freed.
        self._origins: dict[int, tuple[Tensor, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            keeps = func.name().split("::")[-1].split(".")[0] in _UNCHANGED
            self._origins[id(result)] = (result, self.of(args[0]) if keeps and args else func)
        return result

    def of(self, tensor: Any) -> Any:
        """The operation that computed a tensor's values; None where it came from outside."""
        return self._origins.get(id(tensor), (None, None))[1]


def check_classifier(network: nn.Module, x_NCHW: Tensor, name: str) -> None:
    """Refuse a network whose answers are no logits, or depend on what else is in the batch.

    Args:
        network: Images to logits [N, K], as it claims.
        x_NCHW: Two images or more.
        name: What messages call the network.

    Raises:
        DivergenceError: A logit is NaN or infinite.
        UsageError: The network gives probabilities; one image alone is answered in another way, or by another shape.
    """
    with torch.no_grad(), in_mode(network, False):
        with _LastOperation() as operations:
            together_NK = network(x_NCHW)
        # The first alone and in company: whatever looks at the whole batch (statistics, a random draw, a squeeze) shows
        # in it.
        alone_NK = network(x_NCHW[:1])
    if (kind := _PROBABILITIES.get(operations.of(together_NK))) is not None:
        raise UsageError(_refusal(name, f"its last operation is a {kind}"))
    if alone_NK.shape != together_NK[:1].shape:
        raise UsageError(
            f"{name} gives a tensor {tuple(alone_NK.shape)} for one image, and {tuple(together_NK.shape)} for "
            f"{len(x_NCHW)}. A squeeze() that names no dimension drops that of the batch: use flatten(1)."
        )
    check_logits(together_NK, name)
    # Not exactly equal: kernels for one image and for several sum in another order.
    if not torch.allclose(alone_NK, together_NK[:1], rtol=1e-3, atol=1e-3 * float(together_NK.abs().max())):
        raise UsageError(
            f"{name} answers the same image in another way when it is alone than in a batch of {len(x_NCHW)}. A layer "
            "draws random numbers in evaluation too, or takes its statistics from the batch, as a batch norm with "
            "track_running_stats = False does: no accuracy and no exported file would hold for it. Replace that layer."
        )


def check_logits(answer_NK: Tensor, name: str) -> None:
    """Refuse answers that are not finite, and rows of probabilities.

    Args:
        answer_NK: What the network gave for N images.
        name: What messages call the network.

    Raises:
        DivergenceError: A number is NaN or infinite.
        UsageError: No number is negative, and every row sums to 1, or to another number that all rows share, e.g. 100.
    """
    finite_N = answer_NK.isfinite().all(1)
    if not bool(finite_N.all()):
        raise DivergenceError(
            f"{name} gives logits that are not finite, for {int((~finite_N).sum())} of the {len(answer_NK)} images "
            "looked at last. Either training diverged (lower train.lr), or a layer is undefined for what it is given: "
            "the sum of the maps of S and A may be negative where T's own map never is, and T's head may take a "
            'root of it. Then use method.head = "trained".'
        )
    if answer_NK.shape[1] == 1 or bool((answer_NK < 0).any()):
        return
    # A network that has learnt nothing may answer with zeros, whose sum is 0, or with one row for all images. Percent
    # are told from logits by the sums: they vary by far less than the numbers do, which in few rows chance does too.
    sums_N, spread = answer_NK.double().sum(1), float(answer_NK.max(0).values.sub(answer_NK.min(0).values).max())
    if bool(((sums_N - 1).abs() < 1e-3).all()):
        raise UsageError(_refusal(name, "every row of what it gives is without negative numbers and sums to 1"))
    if len(answer_NK) >= _TELLING_ROWS and float(sums_N.max() - sums_N.min()) < 1e-3 * spread:
        reason = f"every row of what it gives is without negative numbers and sums to {float(sums_N.mean()):.4g}"
        raise UsageError(_refusal(name, reason))


_TELLING_ROWS = 4
"""Rows from which on equal sums are no chance."""


def _refusal(name: str, reason: str) -> str:
    return (
        f"{name} gives probabilities in place of logits: {reason}. Everything here takes the softmax of logits, and "
        "would take it twice. Leave the last softmax or sigmoid out of the network: classes keep their order."
    )
