"""Reading and rewriting torch graphs: the taps of an exported program, and a module that returns them beside the logits."""

from __future__ import annotations

import collections
import operator

import torch
from torch import fx

from audit_plugin.errors import SubjectError
from audit_plugin.model.stored_weights import store_weights_plainly
from audit_plugin.model.taps import GraphNode, NodeKind, Tap, choose_taps

_WEIGHTED = ("conv", "linear", "addmm", "mm", "matmul", "bmm", "baddbmm", "einsum")
_RESHAPING = (
    "max_pool", "avg_pool", "adaptive", "mean", "amax", "flatten", "view", "_unsafe_view", "reshape", "permute", "transpose",
    "t", "squeeze", "unsqueeze", "dropout", "select", "slice", "expand", "clone", "contiguous", "pad", "constant_pad",
    "_to_copy", "to", "upsample", "alias", "detach", "narrow", "roll", "split", "chunk", "_assert", "pixel", "lift",
)  # fmt: skip
_SOFTMAX = ("softmax", "_softmax")
_SAME_VALUES = (
    "view",
    "_unsafe_view",
    "reshape",
    "flatten",
    "unflatten",
    "squeeze",
    "dropout",
    "alias",
    "clone",
    "contiguous",
    "_to_copy",
    "to",
)


def choose_graph_taps(graph: fx.GraphModule) -> tuple[Tap, ...]:
    """The taps of a one-input, one-output graph module, see :mod:`audit_plugin.model.taps`."""
    source, logits = input_and_output(graph)
    dependent = {source}
    repeated = _repeated_blocks(graph.graph)
    nodes = []
    for node in graph.graph.nodes:
        reads = tuple(read.name for read in node.all_input_nodes if read in dependent)
        # A size read off the input (an integer) carries no feature, so it does not make a node depend on the image.
        if node.op == "call_function" and reads and isinstance(node.meta.get("val"), torch.Tensor | tuple | list):
            dependent.add(node)
            path, block = _module_of(node, repeated)
            nodes.append(GraphNode(node.name, _kind(node), reads, path or node.name, block))
    try:
        return choose_taps(nodes, source.name, _scores(logits).name)
    except ValueError as error:
        raise SubjectError(f"The model is no classifier of its input: {error}.") from error


def input_and_output(graph: fx.GraphModule) -> tuple[fx.Node, fx.Node]:
    """The single input and the single output value.

    Raises:
        SubjectError: when the graph has several of either.
    """
    sources = [node for node in graph.graph.nodes if node.op == "placeholder"]
    (output,) = graph.graph.find_nodes(op="output")
    values = [value for value in torch.utils._pytree.tree_leaves(output.args[0]) if isinstance(value, fx.Node)]
    if len(sources) != 1 or len(values) != 1:
        raise SubjectError(
            f"Expected a model with one image input and one output of logits, got {len(sources)} inputs and "
            f"{len(values)} outputs. Wrap it so that forward(images) returns the logits alone, and log it again."
        )
    return sources[0], values[0]


def with_taps(graph: fx.GraphModule, taps: tuple[Tap, ...]) -> fx.GraphModule:
    """A copy that returns (tap, ..., logits) instead of the logits; the weights are shared."""
    copied = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    copied.graph_copy(graph.graph, mapping)
    by_name = {node.name: node for node in graph.graph.nodes}
    _, logits = input_and_output(graph)
    copied.output((*(mapping[by_name[tap.node]] for tap in taps), mapping[logits]))
    return fx.GraphModule(graph, copied)


def without_softmax(graph: fx.GraphModule) -> fx.GraphModule | None:
    """A copy that answers with what its last softmax is taken of; None where something else gives the answer. Weights are shared.

    The rows of the answer are known to sum to 1, so each is one softmax, whatever shape lies between the two.
    """
    _, answer = input_and_output(graph)
    softmax = _scores(answer)
    if _operator(softmax) not in _SOFTMAX or len(softmax.users) != 1:
        return None
    copied = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    copied.graph_copy(graph.graph, mapping)
    copied.output(mapping[answer])
    taken_of = mapping[softmax].args[0]
    mapping[softmax].replace_all_uses_with(taken_of)  # type: ignore[arg-type]  # of a tensor
    copied.erase_node(mapping[softmax])
    return fx.GraphModule(graph, copied)


def plain_graph(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """The program as a module without guards or input checks, in-place operations made functional; it leaves its input as it is.

    The weights of its layers are parameters, however the file stores them: see :func:`store_weights_plainly`.

    ``check_guards=False`` keeps torch from running the guard *code* stored in the file; building a new ``GraphModule`` drops the
    hook that insists on the exported batch size.
    """
    functional = program.run_decompositions({})  # an in-place ReLU would overwrite a tap
    module = functional.module(check_guards=False)
    for node in [*module.graph.nodes]:
        if node.op == "call_function" and not node.users and "_assert" in str(node.target):
            module.graph.erase_node(node)
        elif _writes_to_the_input(node):  # the next reader of the caller's pixels would find them normalised
            _, written, *_ = node.args
            node.replace_all_uses_with(written)
            module.graph.erase_node(node)
        elif node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default  # the same values, whatever the memory layout of the input
    store_weights_plainly(module)
    return fx.GraphModule(module, module.graph)


def make_tensors_on(graph: fx.GraphModule, device: torch.device) -> None:
    """Let every node that names a device (``arange``, ``zeros``, a copy) name this one, in place."""

    changed = False

    def there(value: object) -> object:
        nonlocal changed
        changed |= isinstance(value, torch.device) and value != device
        return device if isinstance(value, torch.device) else value

    for node in graph.graph.nodes:
        node.args, node.kwargs = (fx.node.map_aggregate(given, there) for given in (node.args, node.kwargs))  # type: ignore[arg-type]
    if changed:
        graph.recompile()


def _writes_to_the_input(node: fx.Node) -> bool:
    """What a functional graph ends with where the model changes its input: all else already reads the new value."""
    target = node.args[0] if node.target is torch.ops.aten.copy_.default else None
    return isinstance(target, fx.Node) and target.op == "placeholder"


def _scores(logits: fx.Node) -> fx.Node:
    """The value that holds the class scores, before nodes that only put them into another shape."""
    while _operator(logits) in _SAME_VALUES and isinstance(value := logits.args[0], fx.Node):  # the others are sizes
        logits = value
    return logits


def _operator(node: fx.Node) -> str:
    return str(node.target).removeprefix("aten.").split(".")[0].rstrip("_")


def _kind(node: fx.Node) -> NodeKind:
    value = node.meta.get("val")
    if isinstance(value, tuple | list) or (isinstance(value, torch.Tensor) and not value.is_floating_point()):
        return NodeKind.OPAQUE
    if node.target is operator.getitem:
        return NodeKind.POINTWISE
    if not isinstance(value, torch.Tensor):
        return NodeKind.OPAQUE
    name = _operator(node)
    if name in _WEIGHTED or name.startswith("conv"):
        return NodeKind.WEIGHTED
    if name in _RESHAPING or name.startswith(("max_pool", "avg_pool", "adaptive", "upsample", "squeeze")):
        return NodeKind.RESHAPING
    return NodeKind.POINTWISE


def _stack(node: fx.Node) -> list[tuple[str, str]]:
    """(module path, class name) from the outermost module inwards, as the exporter recorded it."""
    recorded = node.meta.get("nn_module_stack") or {}
    return [(path, kind if isinstance(kind, str) else kind.__qualname__) for path, kind in recorded.values()]


def _repeated_blocks(graph: fx.Graph) -> set[str]:
    """Module classes, other than torch's own layers, that occur more than once: the network's building blocks."""
    instances: dict[str, set[str]] = collections.defaultdict(set)
    for node in graph.nodes:
        for path, kind in _stack(node):
            if not kind.startswith("torch.nn.") and not kind.startswith("torchvision.ops."):
                instances[kind].add(path)
    return {kind for kind, paths in instances.items() if len(paths) > 1}


def _module_of(node: fx.Node, repeated: set[str]) -> tuple[str | None, str | None]:
    """(innermost module path, path of the outermost repeated block) of a node."""
    stack = _stack(node)
    innermost = stack[-1][0] if stack else None
    return innermost or None, next((path for path, kind in stack if kind in repeated), None)
