"""Folds batch norms into the layers before them.

w' = w g / sd, b' = beta + (b - mean) g / sd: g and beta are the affine parameters of the norm, mean and sd its running
statistics.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable

from torch import fx, nn
from torch.fx.experimental.optimization import replace_node_module
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

_PAIRS: dict[tuple[type[nn.Module], type[nn.Module]], Callable[..., nn.Module]] = {
    (nn.Conv1d, nn.BatchNorm1d): fuse_conv_bn_eval,
    (nn.Conv2d, nn.BatchNorm2d): fuse_conv_bn_eval,
    (nn.Conv3d, nn.BatchNorm3d): fuse_conv_bn_eval,
    (nn.Linear, nn.BatchNorm1d): fuse_linear_bn_eval,
}


def fold_batch_norms(network: nn.Module) -> nn.Module:
    """A traced copy of a network in eval mode, with its batch norms folded.

    PyTorch's own folder (torch.fx.experimental.optimization.fuse) goes call by call: it folds the norm of a block that
    is called twice into its convolution twice, two norms after one convolution both into it, and it changes a weight
    that another operation reads too. Here a layer takes up a norm only where every one of its calls is followed by that
    norm and by nothing else, and nothing else reads its weight; else both stay.

    Returns:
        The copy; the network itself where it cannot be traced.
    """
    try:
        traced = fx.symbolic_trace(copy.deepcopy(network))
    except Exception:  # a symbol in place of a tensor breaks Python code in any way; then nothing is folded here
        return network
    modules = dict(traced.named_modules())
    calls: dict[str, list[fx.Node]] = defaultdict(list)
    for node in traced.graph.nodes:
        if node.op in ("call_module", "get_attr"):
            calls[str(node.target)].append(node)
    for target, layers in calls.items():
        norms = _following(layers, calls)
        # A target below the layer's is one of its tensors, read by something else: to fold would change what that
        # reads.
        if not norms or any(other.startswith(f"{target}.") for other in calls):
            continue
        layer, norm = modules[target], modules[str(norms[0].target)]
        fold = _PAIRS.get((type(layer), type(norm)))
        if fold is None or not norm.track_running_stats or len(layer.weight) != norm.num_features:
            continue
        # Under the name of the layer, so that every one of its calls gets the folded weights.
        replace_node_module(layers[0], modules, fold(layer, norm))
        for before, after in zip(layers, norms, strict=True):
            after.replace_all_uses_with(before)
            traced.graph.erase_node(after)
    return fx.GraphModule(traced, traced.graph)


def _following(layers: list[fx.Node], calls: dict[str, list[fx.Node]]) -> list[fx.Node]:
    """The calls of one module that alone reads what these calls give, and nothing else; else none."""
    readers = [list(node.users) for node in layers]
    if any(len(users) != 1 or users[0].op != "call_module" for users in readers):
        return []
    norms = [users[0] for users in readers]
    target = str(norms[0].target)
    return norms if set(norms) == set(calls[target]) and all(str(node.target) == target for node in norms) else []
