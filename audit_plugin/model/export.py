"""A network becomes one ONNX model that takes pixels in [0, 1] and returns its taps and logits, and a torch module alike.

The input specification (bounds, mean, standard deviation, layout) moves inside, so that triggers, checks and the deployed
guard all speak about the same pixels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import io
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import fx, nn

from audit_plugin.errors import ExportError, InapplicableError
from audit_plugin.model.load import Network
from audit_plugin.model.onnx_graph import choose_onnx_taps, expose
from audit_plugin.model.onnx_graph import without_softmax as onnx_without_softmax
from audit_plugin.model.onnx_to_torch import OnnxModule
from audit_plugin.model.runtime import Session, serialised
from audit_plugin.model.taps import Tap
from audit_plugin.model.torch_graph import choose_graph_taps, make_tensors_on, with_taps
from audit_plugin.model.torch_graph import without_softmax as torch_without_softmax
from audit_plugin.types import FloatArray, InputSpec

log = logging.getLogger(__name__)

LOGITS = "logits"
PIXELS = "pixels"
PROBABILITIES = "audit_probabilities"
_SMALLEST_PROBABILITY = 1e-12
_SAME_VALUE = 1e-3  # of the largest: another order of sums costs about 1e-6 a layer


@dataclass(frozen=True)
class Exported:
    """The two forms of one model. ``module`` maps pixels to (tap, ..., logits) like the ONNX model, and takes gradients; it is
    None, with the reason in ``module_missing``, when an ONNX model uses operators that torch has no equivalent for."""

    onnx_model: onnx.ModelProto
    taps: tuple[str, ...]
    module: nn.Module | None
    module_missing: str = ""


def logits_network(network: Network) -> Network:
    """The network before the softmax that ends it; as it is, where its answer is no softmax.

    The logarithm of probabilities would be logits too, up to a constant a row. But a class whose probability is zero in float32
    has no gradient, so that a search would never find what makes it likely: scaling one class's score would hide a backdoor.
    """
    if not network.gives_probabilities:
        return network
    program = network.program
    plain = onnx_without_softmax(program) if isinstance(program, onnx.ModelProto) else torch_without_softmax(program)
    return network if plain is None else dataclasses.replace(network, program=plain, gives_probabilities=False)


def export(network: Network, spec: InputSpec) -> Exported:
    """Export with one named output a tap, in order, and ``logits`` last.

    Probabilities become logits: see :func:`logits_network`; where that cannot be, by a logarithm, which is bounded below.

    Raises:
        ExportError: torch cannot translate the graph; the line names the operator.
        SubjectError: the graph is not one image in, one row of scores out.
    """
    plain = logits_network(network)
    if isinstance(plain.program, onnx.ModelProto):
        return _export_onnx(plain.program, plain, spec)
    return _export_torch(plain.program, plain, spec)


class PixelModel(nn.Module):
    """pixels (N, channels, height, width) in [0, 1] -> (tap, ..., logits) of a network that expects its own scale and layout."""

    scale: torch.Tensor
    offset: torch.Tensor

    def __init__(self, inner: nn.Module, spec: InputSpec, *, probabilities: bool) -> None:
        super().__init__()
        self.inner = inner
        self.channels_last = spec.layout == "NHWC"
        self.probabilities = probabilities
        self.identity = (spec.low, spec.high, set(spec.mean), set(spec.std)) == (0.0, 1.0, {0.0}, {1.0})
        std = torch.tensor(spec.std).view(1, -1, 1, 1)
        self.register_buffer("scale", (spec.high - spec.low) / std)
        self.register_buffer("offset", (spec.low - torch.tensor(spec.mean).view(1, -1, 1, 1)) / std)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = pixels if self.identity else pixels * self.scale + self.offset
        if self.channels_last:
            values = values.permute(0, 2, 3, 1)
        answers: tuple[torch.Tensor, ...] = self.inner(values)
        if self.probabilities:
            answers = (*answers[:-1], answers[-1].clamp(min=_SMALLEST_PROBABILITY).log())
        return answers

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Where torch moves the weights, the tensors that the graph makes while it runs have to be made as well."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it so
        for part in self.modules():
            if isinstance(part, fx.GraphModule):
                make_tensors_on(part, self.scale.device)
        return self


class InBatches(nn.Module):
    """Call a graph that insists on one batch size as often as it takes, the last time padded."""

    def __init__(self, inner: nn.Module, batch_size: int) -> None:
        super().__init__()
        self.inner = inner
        self.batch_size = batch_size

    def forward(self, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        padding = -len(values) % self.batch_size
        padded = torch.cat([values, values[-1:].expand(padding, *values.shape[1:])]) if padding else values
        parts = [self.inner(chunk) for chunk in padded.split(self.batch_size)]
        return tuple(torch.cat(outputs)[: len(values)] for outputs in zip(*parts, strict=True))


def _export_torch(graph: fx.GraphModule, network: Network, spec: InputSpec) -> Exported:
    taps = choose_graph_taps(graph)
    inner = with_taps(graph, taps)
    with torch.no_grad():
        taps = _row_an_image(taps, network, network.input_shape[1:], lambda values: inner(torch.from_numpy(values)))
    module = PixelModel(with_taps(graph, taps), spec, probabilities=network.gives_probabilities).eval()
    example = torch.rand(network.batch_size or 4, spec.channels, spec.height, spec.width)
    dynamic = None if network.batch_size else ({0: torch.export.Dim("batch", min=1)},)
    names = [tap.name for tap in taps]
    try:
        with _quietly(), _operators_listed_once(), torch.no_grad():
            program = torch.export.export(module, (example,), dynamic_shapes=dynamic)
            exported = torch.onnx.export(program, dynamo=True, input_names=[PIXELS], output_names=[*names, LOGITS], verbose=False)
        assert exported is not None  # noqa: S101  (told by dynamo=True; for the type checker)
        model = exported.model_proto
    except Exception as error:  # the exporter raises many kinds, some with a page of text
        raise ExportError(f"torch cannot export this model to ONNX: {_reason(error)}") from error
    return Exported(model, tuple(names), _for_any_batch(module, network.batch_size))


def _export_onnx(model: onnx.ModelProto, network: Network, spec: InputSpec) -> Exported:
    taps = choose_onnx_taps(model)
    exposed = expose(model, taps, spec)
    session, shape = Session(serialised(exposed)), (spec.channels, spec.height, spec.width)
    rows = _row_an_image(taps, network, shape, lambda pixels: session.run(pixels).values())
    if rows != taps:
        taps, exposed = rows, expose(model, rows, spec)
    if network.gives_probabilities:
        append_logarithm(exposed)
    names = tuple(tap.name for tap in taps)
    try:
        module = OnnxModule(exposed, [*names, LOGITS]).eval()
    except InapplicableError as error:
        return Exported(exposed, names, None, str(error))
    return Exported(exposed, names, _for_any_batch(module, network.batch_size))


def _row_an_image(
    taps: Sequence[Tap], network: Network, shape: Sequence[int], run: Callable[[FloatArray], Iterable[Any]]
) -> tuple[Tap, ...]:
    """Those of which each row belongs to one image: a transformer may put its tokens first, and nobody can tell whose they are.

    Args:
        shape: of an image.
        run: the values of all taps, and perhaps more, for a batch of images.
    """
    rng = np.random.default_rng(0)
    kept = list(taps)
    for count in (network.batch_size,) if network.batch_size else (2, 3):
        images = rng.random((count, *shape), dtype=np.float32)
        others = np.concatenate([rng.random((1, *shape), dtype=np.float32), images[1:]])
        for tap, value, changed in zip(taps, run(images), run(others), strict=False):
            if tap in kept and not _is_row_an_image(np.asarray(value), np.asarray(changed), count):
                kept.remove(tap)
    if len(kept) < len(taps):
        log.info("%d of %d layers are left out, because their rows are not the images.", len(taps) - len(kept), len(taps))
    return tuple(kept)


def _is_row_an_image(value: FloatArray, changed: FloatArray, count: int) -> bool:
    """Whether there is a row for each image, and all but the first stay where the first image changes."""
    if value.ndim == 0 or len(value) != count:
        return False
    tolerance = _SAME_VALUE * max(float(np.abs(value).max(initial=0.0)), 1e-6)
    return bool(np.allclose(value[1:], changed[1:], rtol=0.0, atol=tolerance))


def _for_any_batch(module: nn.Module, batch_size: int | None) -> nn.Module:
    return module if batch_size is None else InBatches(module, batch_size)


def append_softmax(model: onnx.ModelProto) -> None:
    """Add the probabilities ``audit_probabilities`` of a graph's ``logits``."""
    model.graph.node.append(helper.make_node("Softmax", [LOGITS], [PROBABILITIES], axis=1))


def append_logarithm(model: onnx.ModelProto) -> None:
    """Turn an output of probabilities into logits (up to a constant a row); they stay in the graph as ``audit_probabilities``."""
    graph, prefix = model.graph, PROBABILITIES
    for node in graph.node:
        for index, name in enumerate(node.output):
            if name == LOGITS:
                node.output[index] = prefix
    graph.initializer.append(helper.make_tensor(f"{prefix}_smallest", TensorProto.FLOAT, [], [_SMALLEST_PROBABILITY]))
    graph.node.append(helper.make_node("Max", [prefix, f"{prefix}_smallest"], [f"{prefix}_clamped"]))
    graph.node.append(helper.make_node("Log", [f"{prefix}_clamped"], [LOGITS]))


def save(model: onnx.ModelProto, path: Path) -> None:
    """Write a model as one file.

    Raises:
        ExportError: it is larger than the 2 GiB that one protobuf file can hold.
    """
    try:
        onnx.save(model, path)
    except ValueError as error:
        raise ExportError(f"The exported model does not fit into one ONNX file: {_reason(error)}") from error


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """The exporter reports its progress on stdout and warns about its own internals; neither belongs in a user's output."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _operators_listed_once() -> Iterator[None]:
    """torch lists its operators' translations anew at every export, parsing the source of each: most of the time that a small
    model takes. They are kept for the next export here. The list is private: where it is elsewhere, all is as without this."""
    try:
        owner = importlib.import_module("torch.onnx._internal.exporter._registration").onnxscript_apis
        listing = owner.get_torchlib_ops
    except (ImportError, AttributeError):
        yield
        return
    owner.get_torchlib_ops = lambda: _listed(listing)
    try:
        yield
    finally:
        owner.get_torchlib_ops = listing


@functools.cache
def _listed(listing: Callable[[], list[Any]]) -> list[Any]:
    return listing()


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
