"""A network's computation as a graph that can be cut at any map.

torch.fx runs the network once with symbols in place of tensors. What it writes down can be cut at any operation, also
between two lines of a `forward`, where no module ends: the last ReLU of a DenseNet is such a line. Graphs hold no
weights. They are turned into functions that read the weights of the network where they are, so that moving, copying,
training and pruning it works as if there were no graph. A network that chooses its way by the values of tensors cannot
be traced so; `external.py` says what happens then.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, fx, nn
from torch.nn.functional import batch_norm, instance_norm

from rkd_deploy.errors import UsageError
from rkd_deploy.models.stage_maps import Step
from rkd_deploy.models.staged import in_mode

ROOT = "network"
"""Name of the attribute under which every `Holder` has the network."""

Reader = Callable[[nn.Module, Tensor], Any]
"""A function from a holder and images to a tuple of tensors."""

_RANDOM = ("DropPath", "StochasticDepth")  # by name: timm, torchvision and users each have their own


class Traced:
    """A network's graphs, one for training and one for evaluation: dropout and the like differ between the two.

    Args:
        network: The network to trace; its weights stay where they are.

    Attributes:
        single_output: Whether the network gives one tensor in both modes.

    Raises:
        Exception: Whatever the network raises when it meets a symbol in place of a tensor.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._graphs = {}
        for training in (True, False):
            with in_mode(network, training):
                self._graphs[training] = Trace(network)
        self.single_output = all(graph.single_output for graph in self._graphs.values())

    def knows(self, stage: str) -> bool:
        """Whether both graphs have an operation of this name."""
        return all(graph.resolve(stage) is not None for graph in self._graphs.values())

    def reader(self, stages: Sequence[str], answer: bool) -> Reader:
        """A function from (holder, images) to the maps of some stages, the network's answer last if it is wanted."""
        function = {mode: graph.function(graph.nodes(stages), answer) for mode, graph in self._graphs.items()}
        return lambda holder, x_NCHW: function[holder.training](holder, x_NCHW)

    def steps(self, x_NCHW: Tensor, stages: Sequence[str], answer: bool) -> list[Step]:
        """Run the way from images to some stages, or to the network's answer, in eval mode; gives its operations."""
        with in_mode(self.network, False):
            return self._graphs[False].steps(x_NCHW, stages, answer)

    def used_modules(self, x_NCHW: Tensor, stages: Sequence[str]) -> set[str]:
        """Paths of modules and tensors that are read on the way to some stages, in either mode."""
        return set().union(*(graph.used_modules(stages) for graph in self._graphs.values()))

    def part(self, start: str | None, end: str) -> Part | None:
        """What the network does between two of its stages; None where that needs more than the first one's map.

        Args:
            start: The stage whose map is taken. None: images are.
            end: The stage whose map is given.
        """
        graphs = {mode: graph.between(start, end) for mode, graph in self._graphs.items()}
        known = {mode: graph for mode, graph in graphs.items() if graph is not None}
        return Part(Holder(self.network), known) if len(known) == len(graphs) else None

    def tail(self, stage: str) -> nn.Module | None:
        """A stage's map to the network's answer, in eval mode; None where the answer needs more than that map."""
        return self._graphs[False].tail(stage)


class Holder(nn.Module):
    """A module that holds the network and does what the network does: the root of every graph.

    Args:
        network: Takes images first; its other arguments keep their defaults.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Any:
        """The answer of the network."""
        return self.network(x)


class Part(nn.Module):
    """Some consecutive operations of a network as a module of its own: it holds the layers that they use, and no other.

    Args:
        root: Holds the network; its layers are used, not copied, under the same paths.
        graphs: From one tensor to another, by mode: True in training.
    """

    def __init__(self, root: nn.Module, graphs: Mapping[bool, fx.Graph]) -> None:
        super().__init__()
        used = {str(node.target) for graph in graphs.values() for node in graph.nodes if node.op in _HOLDING}
        for target in sorted(used):
            self._hold(root, target)
        self._functions = {mode: type(fx.GraphModule(root, graph)).forward for mode, graph in graphs.items()}

    def forward(self, x: Tensor) -> Tensor:
        """The last operation's result."""
        return cast(Tensor, self._functions[self.training](self, x))

    def _hold(self, root: nn.Module, target: str) -> None:
        *path, name = target.split(".")
        owner, source = cast(nn.Module, self), root
        for step in path:
            source = getattr(source, step)
            if not hasattr(owner, step):
                owner.add_module(step, nn.Module())
            owner = getattr(owner, step)
        value = getattr(source, name)
        if isinstance(value, nn.Module | nn.Parameter):
            setattr(owner, name, value)
        else:
            owner.register_buffer(name, value, persistent=name not in source._non_persistent_buffers_set)


_HOLDING = ("call_module", "get_attr")


class Trace:
    """The graph of a network in the mode it is in, training or evaluation, and the names of its operations.

    Args:
        network: Left as it is.

    Attributes:
        graph: The whole graph, images to the network's answer.
        names: Operations by name, in order: ``layer4`` is what a module puts out, ``layer1.0.relu_1`` the second call
            of one, ``add`` an operation of the network's own `forward`, as torchvision's feature extraction has it.
        outputs: Modules by the operation that they put out; several where one module ends in another.

    Raises:
        UsageError: A tensor that the network makes would become a constant.
        Exception: Whatever the network raises when it meets a symbol in place of a tensor.
    """

    def __init__(self, network: nn.Module) -> None:
        self.root = Holder(network)
        tracer = _Tracer()
        with _traceable_norms():
            self.graph = tracer.trace(self.root)
        if any(node.op == "get_attr" and not str(node.target).startswith(ROOT) for node in self.graph.nodes):
            raise UsageError(
                f"A tensor that the forward pass of {type(network).__name__} makes became a constant of its graph. "
                "Register it as a buffer of the network."
            )
        [result] = (node for node in self.graph.nodes if node.op == "output")
        answer = result.args[0]
        # A named tuple is one node too: the call of its type.
        self.single_output = isinstance(answer, fx.Node) and not isinstance(answer.target, type)
        self.names = tracer.names
        self.outputs = {path: node for path, node in tracer.outputs.items() if path}

    def resolve(self, name: str) -> fx.Node | None:
        """The operation of a name, for a module the last one that it did; None where there is none."""
        return self.names.get(name) or self.outputs.get(name)

    def cut(self, nodes: Sequence[fx.Node], answer: bool) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
        """Cut out the graph from images to the results of some operations, the network's answer last.

        Args:
            nodes: Operations of this graph.
            answer: Whether the answer is among the results; else nothing that it alone needs is left.

        Returns:
            The graph, and its operations by those of the whole graph.
        """
        graph, env = fx.Graph(owning_module=cast(fx.GraphModule, self.root)), dict[fx.Node, fx.Node]()
        result = graph.graph_copy(self.graph, env)
        maps = [env[node] for node in nodes]
        graph.output((*maps, result) if answer else tuple(maps))
        graph.eliminate_dead_code(_acts)
        return graph, env

    def nodes(self, names: Sequence[str]) -> list[fx.Node]:
        """The operations of known names."""
        return [cast(fx.Node, self.resolve(name)) for name in names]

    def function(self, nodes: Sequence[fx.Node], answer: bool) -> Reader:
        """A function from (holder, images) to the results of some operations; it reads the holder's weights."""
        # The class that fx makes for one graph has it as a plain function: nothing else of it is needed.
        return cast("Reader", type(fx.GraphModule(self.root, self.cut(nodes, answer)[0])).forward)

    def steps(self, x_NCHW: Tensor, stages: Sequence[str], answer: bool) -> list[Step]:
        """Operations on the way from images to some stages, or to the answer, with shapes from one run."""
        graph, env = self.cut(self.nodes(stages), answer)
        shapes = _Shapes(self.root, graph).of(x_NCHW)
        names: dict[fx.Node, list[tuple[str, bool]]] = {node: [] for node in self.graph.nodes}
        for name, node in self.names.items():
            names[node].append((name, node.op == "call_module"))
        for path, node in self.outputs.items():
            if path not in self.names:  # not a single operation
                names[node].append((path, True))
        return [
            Step(name, self._what(name, node, is_module), shapes[env[node]], is_module)
            for node in self.graph.nodes
            if env.get(node) in shapes
            for name, is_module in names[node]
        ]

    def used_modules(self, stages: Sequence[str]) -> set[str]:
        """Paths of the modules and tensors that are read on the way from images to some stages."""
        needed = self._leading_to(self.nodes(stages))
        return {_unrooted(str(node.target)) for node in needed if node.op in ("call_module", "get_attr")}

    def tail(self, stage: str) -> fx.GraphModule | None:
        """A stage's map to the network's answer; None where the answer needs more than that map."""
        [start] = self.nodes([stage])
        graph = self._way(start, next(node for node in self.graph.nodes if node.op == "output"))
        return None if graph is None else fx.GraphModule(self.root, graph)

    def between(self, start: str | None, end: str) -> fx.Graph | None:
        """A stage's map, or images, to another stage's map; None where that needs more than the first one's map."""
        [last] = self.nodes([end])
        return self._way(None if start is None else self.nodes([start])[0], last)

    def _way(self, start: fx.Node | None, end: fx.Node) -> fx.Graph | None:
        # The walk back from the end stops at the map; where it still reaches the images, a path goes round the map (a
        # second head, a skip), and the end is no function of this map alone.
        needed = self._leading_to([end], stop=start)
        if start is not None and any(node.op == "placeholder" for node in needed):
            return None
        graph = fx.Graph()
        env = {} if start is None else {start: graph.placeholder("map_")}
        for node in self.graph.nodes:
            if node in needed:
                env[node] = graph.node_copy(node, env.__getitem__)
        if end.op != "output":
            graph.output(env[end])
        return graph

    def _leading_to(self, nodes: Sequence[fx.Node], stop: fx.Node | None = None) -> set[fx.Node]:
        needed, open_ends = set[fx.Node](), list(nodes)
        while open_ends:
            node = open_ends.pop()
            if node not in needed and node is not stop:
                needed.add(node)
                open_ends += node.all_input_nodes
        return needed

    def _what(self, name: str, node: fx.Node, is_module: bool) -> str:
        if is_module:
            path = _unrooted(str(node.target)) if node.op == "call_module" and name in self.names else name
            return type(self.root.network.get_submodule(path)).__name__
        return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", node.target))


class _Shapes(fx.Interpreter):
    """Runs a graph and notes the shape of each operation's result."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        super().__init__(root, graph=graph)
        self._shapes: dict[fx.Node, tuple[int, ...]] = {}

    def of(self, x_NCHW: Tensor) -> dict[fx.Node, tuple[int, ...]]:
        """Shapes of the tensors that operations give, by the operation."""
        self.run(x_NCHW)
        return self._shapes

    def run_node(self, n: fx.Node) -> Any:
        """Run one operation and note the shape of its result."""
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self._shapes[n] = tuple(value.shape)
        return value


class _Tracer(fx.Tracer):
    """Names operations after the module that they stand in."""

    def __init__(self) -> None:
        modules, functions = _timm_leaves()
        super().__init__(autowrap_modules=(math,), autowrap_functions=functions)
        self._leaves = modules
        self.names: dict[str, fx.Node] = {}
        self.outputs: dict[str, fx.Node] = {}
        self._repetitions: Counter[str] = Counter()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module stays one operation: PyTorch's own, and those that draw random numbers."""
        return (
            super().is_leaf_module(m, module_qualified_name)
            or isinstance(m, self._leaves)
            or type(m).__name__ in _RANDOM
        )

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Note which operation a module puts out."""
        value = super().call_module(m, forward, args, kwargs)
        if isinstance(value, fx.Proxy):
            self.outputs[_unrooted(self.path_of_module(m))] = value.node
        return value

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Name an operation after the module it stands in, and number its repetitions."""
        node = super().create_node(kind, target, *args, **kwargs)
        if kind in ("call_function", "call_method", "call_module"):
            if kind == "call_module":
                name = _unrooted(target)
            else:
                operation = target if isinstance(target, str) else target.__name__
                name = ".".join(part for part in (_unrooted(self.scope.module_path), operation.strip("_")) if part)
            times = self._repetitions[name]
            self._repetitions[name] += 1
            self.names[f"{name}_{times}" if times else name] = node
        return node


@contextmanager
def _traceable_norms() -> Iterator[None]:
    """While a network is traced, PyTorch's norms leave out what no symbol passes: they look at their input's rank.

    Norms of PyTorch's own stay one operation. A subclass is looked into, because it may do anything, and where it calls
    `super().forward` it ends up there. Counting batches is left out too: it would count the tracing.
    """
    norms = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
    forwards: list[Callable[..., Tensor]] = [norm.forward for norm in norms]
    for norm, forward in zip(norms, (_batch_norm, _instance_norm), strict=True):
        setattr(norm, "forward", forward)  # noqa: B010
    try:
        yield
    finally:
        for norm, forward in zip(norms, forwards, strict=True):
            setattr(norm, "forward", forward)  # noqa: B010


def _batch_norm(norm: nn.modules.batchnorm._BatchNorm, x: Tensor) -> Tensor:
    counted = norm.running_mean is not None
    if norm.momentum is None and norm.training and counted:
        raise UsageError("The average of a batch norm whose momentum is None depends on how many batches it has had.")
    updates = not norm.training or norm.track_running_stats
    mean, var = (norm.running_mean, norm.running_var) if updates else (None, None)
    from_batch = norm.training or not counted
    return batch_norm(x, mean, var, norm.weight, norm.bias, from_batch, norm.momentum or 0.0, norm.eps)


def _instance_norm(norm: nn.modules.instancenorm._InstanceNorm, x: Tensor) -> Tensor:
    from_batch = norm.training or not norm.track_running_stats
    weights = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    return instance_norm(x, *weights, from_batch, norm.momentum or 0.0, norm.eps)


def _acts(node: fx.Node) -> bool:
    """Whether an operation has an effect beside its result: `x.add_(y)` counts even if nobody reads the result."""
    in_place = node.op == "call_method" and str(node.target).endswith("_") and not str(node.target).endswith("__")
    return in_place or node.is_impure(impure_random=False)


def _unrooted(path: str) -> str:
    return "" if path == ROOT else path.removeprefix(ROOT + ".")


def _timm_leaves() -> tuple[tuple[type[nn.Module], ...], tuple[Callable[..., Any], ...]]:
    """Modules and functions that timm marks as not traceable; none while timm is not imported."""
    layers = sys.modules.get("timm.layers")
    if layers is None:
        return (), ()
    return tuple(layers.get_notrace_modules()), tuple(layers.get_notrace_functions())
