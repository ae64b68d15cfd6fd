"""From intake-checked bytes to a network. Only this module deserialises models, and only what intake has accepted."""

from __future__ import annotations

import collections
import io
import json
import logging
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import torch
from torch import fx, nn

from audit_plugin.errors import IntakeError, SubjectError, first_line, nearest
from audit_plugin.intake.archive import read_archive
from audit_plugin.intake.files import opened
from audit_plugin.intake.refusal import quoted
from audit_plugin.model.declared_types import check_declared_types
from audit_plugin.model.onnx_graph import declared_input_shape, input_element, read_model, reads
from audit_plugin.model.onnx_graph import input_and_output as onnx_input_and_output
from audit_plugin.model.runtime import Session, serialised
from audit_plugin.model.torch_graph import input_and_output, plain_graph
from audit_plugin.types import FloatArray, Intake

log = logging.getLogger(__name__)

CLASS_LIMITS = (2, 1000)
_TRAINED_OTHERWISE = ("batch_norm", "dropout", "rrelu")
_ACCELERATORS = ("cuda", "mps")
_SAMPLE_INPUTS = "data/sample_inputs/model.pt"  # in a .pt2
_NAMED = 3  # of many names, in a message
# Operators of ONNX in which infinity is no broken weight but a mask or a bound, and those that hand it on as it is.
_MASKING = frozenset({"Add", "Clip", "Max", "Min", "Pad", "Sub", "Where"})
_PASSING_ON = frozenset({"Cast", "Expand", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})

Run: TypeAlias = Callable[[FloatArray], FloatArray]


@dataclass(frozen=True)
class Network:
    """A loaded model on its own input scale.

    Attributes:
        program: a torch graph, or an ONNX model for MLflow's ONNX flavour.
        input_shape: of its input, in its own layout; -1 for a free batch size.
        class_count: width of its answer (N, classes).
        batch_size: the only batch size it takes, or None.
        gives_probabilities: its answer has been through a softmax.
    """

    program: fx.GraphModule | onnx.ModelProto
    input_shape: tuple[int, ...]
    class_count: int
    batch_size: int | None
    gives_probabilities: bool

    @property
    def parameter_count(self) -> int:
        """Numbers in its weights, whether they are stored as parameters, buffers or constants."""
        if isinstance(self.program, onnx.ModelProto):
            return sum(int(np.prod(weight.dims)) for weight in self.program.graph.initializer)
        return sum(value.numel() for value in _stored_tensors(self.program).values())


def load_network(
    path: Path,
    intake: Intake,
    *,
    architecture: str | None = None,
    class_count: int | None = None,
    input_shape: tuple[int, int, int, int] | None = None,
) -> Network:
    """Load the model file that intake found.

    Args:
        path: the model file that ``intake`` judged; for a pickle, the exported program it was converted to.
        intake: what the static check found.
        architecture: torchvision name, needed for a bare ``state_dict``.
        class_count: number of classes, for a bare ``state_dict`` whose last layer does not tell it.
        input_shape: fills the dimensions that the file leaves open, in the model's own layout; -1 for unknown.

    Raises:
        SubjectError: the file is fine but holds no image classifier.
        IntakeError: the file cannot be read as what it claims to be.
    """
    signed = intake.signature.input_shape if intake.signature else None
    program: fx.GraphModule | onnx.ModelProto
    if intake.flavour == "onnx":
        program = read_model(path)
        onnx_input_and_output(program)  # refuses anything but one input and one output
        declared = declared_input_shape(program)
    elif intake.flavour == "state_dict":
        declared = _merge_shapes(signed, input_shape)
        program = _from_state_dict(path, architecture, class_count, declared)
        declared = (-1, *declared[1:])
    else:
        program = _from_exported_program(path)
        declared = _declared_shape(program)
    shape = _merge_shapes(declared, signed, input_shape)
    _check_weights(program)
    return _probe(program, shape, declared[0])


def _from_exported_program(path: Path) -> fx.GraphModule:
    try:
        program = torch.export.load(_for_this_machine(path))
        _check_mode(program)
        _check_precision(program)
        check_declared_types(program)
        return plain_graph(program)
    except SubjectError:
        raise
    except Exception as error:  # a damaged file makes torch raise almost anything
        raise IntakeError(
            f"'{path.name}' cannot be read as an exported program by torch {torch.__version__}: {first_line(error)}. "
            "Log the model again with mlflow.pytorch.log_model(..., input_example=...)."
        ) from error


def _for_this_machine(path: Path) -> str | io.BytesIO:
    """The file, or a copy of one that was exported on a GPU, in which everything lies on the CPU.

    Torch puts each tensor where the file says, so moving the program afterwards would come too late on a machine without GPU.
    """
    with opened(path) as content:
        archive = read_archive(path.name, content)
        texts = {name: bytes(member) for name, member in archive.members.items() if name.endswith(".json")}
        found = [device for device in _ACCELERATORS if any(f'"{device}"'.encode() in text for text in texts.values())]
        if not found:
            return str(path)
        log.info("The program was exported on '%s', and is loaded onto the CPU.", found[0])
        changed = {name: json.dumps(json.loads(text, object_hook=_on_the_cpu)).encode() for name, text in texts.items()}
        changed[_SAMPLE_INPUTS] = b""  # a pickle of tensors on that device, for which nobody asks
        copied = io.BytesIO()
        with zipfile.ZipFile(copied, "w", zipfile.ZIP_STORED) as target:
            for name, member in archive.members.items():
                target.writestr(zipfile.ZipInfo(f"{archive.root}/{name}"), changed.get(name, bytes(member)))
    copied.seek(0)
    return copied


def _on_the_cpu(value: dict[str, Any]) -> dict[str, Any]:
    """A JSON object of an exported program, as it is unless it is a device."""
    is_device = value.keys() <= {"type", "index"} and value.get("type") in _ACCELERATORS
    return {"type": "cpu", "index": None} if is_device else value


def _check_precision(program: torch.export.ExportedProgram) -> None:
    """Rounded to half precision, torch and ONNX Runtime part; in double precision, ONNX Runtime has no convolutions."""
    given = [node for node in program.graph.find_nodes(op="placeholder") if node.name in program.graph_signature.user_inputs]
    computed = [node for node in _nodes(program) if node.op == "call_function"]
    for does, nodes, refused in (
        ("takes images", given, (torch.float16, torch.bfloat16, torch.float64)),
        ("computes", computed, (torch.bfloat16,)),  # which no array of NumPy's holds
    ):
        values = torch.utils._pytree.tree_leaves([node.meta.get("val") for node in nodes])
        found = [value.dtype for value in values if isinstance(value, torch.Tensor) and value.dtype in refused]
        if found:
            raise SubjectError(
                f"The program {does} in {str(found[0]).removeprefix('torch.')}, and only float32 can be audited. Call "
                "model.float(), and log it again without torch.autocast, with an input_example of float32."
            )


def _check_mode(program: torch.export.ExportedProgram) -> None:
    """Must see the program as it was saved: rewriting it breaks up the operators that tell."""
    for node in _nodes(program):
        if _is_training(node):
            raise SubjectError(
                f"The program was exported in training mode ('{node.name}' trains), so it does not answer as it is "
                "used. Call model.eval() before logging it again."
            )


def _nodes(program: torch.export.ExportedProgram) -> Iterator[fx.Node]:
    """Of the graph and of those inside it."""
    for part in program.graph_module.modules():
        if isinstance(part, fx.GraphModule):
            yield from part.graph.nodes


def _is_training(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None or not any(name in schema.name for name in _TRAINED_OTHERWISE):
        return False
    given = dict(zip((argument.name for argument in schema.arguments), node.args, strict=False)) | node.kwargs
    if "batch_norm" in schema.name and given.get("running_mean") is None:
        return False  # it takes each batch's own statistics, in evaluation too
    return (given.get("training") or given.get("train")) is True and given.get("p") != 0


def _from_state_dict(path: Path, architecture: str | None, class_count: int | None, shape: tuple[int, ...]) -> fx.GraphModule:
    import torchvision

    if architecture is None:
        raise SubjectError(
            "A bare state_dict does not say which network it belongs to. Name a torchvision architecture in the policy: "
            '[model] architecture = "resnet18".'
        )
    known = torchvision.models.list_models(module=torchvision.models)
    if architecture not in known:
        raise SubjectError(f"'{architecture}' is no torchvision classifier.{nearest(architecture, known)}")
    weights: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    _check_plain(weights)
    classes = class_count or _last_rows(weights)
    module: nn.Module = torchvision.models.get_model(architecture, weights=None, num_classes=classes).eval()
    try:
        module.load_state_dict(weights)
    except Exception as error:  # torch raises several kinds, and any other over keys that are no text
        raise SubjectError(
            f"The state_dict does not fit torchvision's {architecture} with {classes} classes: "
            f"{_misfit(module.state_dict(), weights) or first_line(error)}. {_way_out(module.state_dict(), weights)}"
        ) from error
    example = torch.zeros(4, *shape[1:])
    try:
        return plain_graph(torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},)))
    except Exception as error:  # the exporter and the network itself raise many kinds
        raise SubjectError(
            f"torchvision's {architecture} does not take images of shape {tuple(shape[1:])}: {first_line(error)}. "
            "Check [model] height, width, channels and architecture in the policy."
        ) from error


def _check_plain(weights: Mapping[Any, Any]) -> None:
    """Training scripts like to save the epoch and the optimiser beside the weights."""
    inner = [
        key
        for key, value in weights.items()
        if isinstance(value, dict) and any(isinstance(weight, torch.Tensor) for weight in value.values())
    ]
    if inner:
        key = quoted(inner[0]) if isinstance(inner[0], str) else inner[0]
        raise SubjectError(
            f"The file is a whole checkpoint, and its weights are under {key}. "
            f"Save them alone: torch.save(checkpoint[{key}], path)."
        )


def _misfit(expected: Mapping[str, torch.Tensor], weights: Mapping[Any, Any]) -> str:
    """The first names of weights that are missing, unknown, or of another shape; empty if none are."""
    shapes = {key: tuple(value.shape) for key, value in weights.items() if isinstance(value, torch.Tensor)}
    kinds = {
        "missing": [quoted(key) for key in expected if key not in weights],
        "unknown": [quoted(str(key)) for key in weights if key not in expected],
        "of another shape": [
            f"{quoted(key)} has {shapes[key]} instead of {tuple(value.shape)}"
            for key, value in expected.items()
            if key in shapes and shapes[key] != tuple(value.shape)
        ],
    }
    return "; ".join(
        f"{len(found)} {kind} ({', '.join(found[:_NAMED] + ['...'] * (len(found) > _NAMED))})"
        for kind, found in kinds.items()
        if found
    )


def _way_out(expected: Mapping[str, torch.Tensor], weights: Mapping[Any, Any]) -> str:
    """What to save or set instead, by the names of the weights."""
    names = [str(key) for key in weights]
    dots = [place for place, letter in enumerate(names[0]) if letter == "."]
    prefix = next((names[0][: dot + 1] for dot in dots if names[0][dot + 1 :] in expected), None)
    if prefix and all(name.startswith(prefix) for name in names):
        return (
            f"All names begin with {quoted(prefix)}, as those of a wrapped model do. Save the state_dict of the model inside, "
            "for DataParallel torch.save(model.module.state_dict(), path)."
        )
    return "Check [model] architecture and classes in the policy."


def _last_rows(weights: dict[str, Any]) -> int:
    matrices = [value for value in weights.values() if isinstance(value, torch.Tensor) and value.ndim >= 2]
    if not matrices:
        raise SubjectError("The state_dict holds no weight matrix, so it is no classifier's.")
    rows = int(matrices[-1].shape[0])
    if not CLASS_LIMITS[0] <= rows <= CLASS_LIMITS[1]:  # before a network of that size is made
        raise SubjectError(
            f"The last weight matrix of the state_dict has {rows} rows, and a classifier has {CLASS_LIMITS[0]} to "
            f"{CLASS_LIMITS[1]} classes. Save the state_dict of a whole classifier, or give [model] classes in the policy."
        )
    return rows


def _declared_shape(graph: fx.GraphModule) -> tuple[int, ...]:
    source, _ = input_and_output(graph)
    value = source.meta.get("val")
    if not isinstance(value, torch.Tensor):
        raise SubjectError("The exported program takes no tensor as its input, so it is no image classifier.")
    return tuple(size if isinstance(size, int) else -1 for size in value.shape)


def _merge_shapes(*shapes: tuple[int, ...] | None) -> tuple[int, ...]:
    """The first declared value of each dimension; later shapes only fill what earlier ones leave open."""
    given = [shape for shape in shapes if shape]
    if not given:
        raise SubjectError("The image size is unknown. Give it in the policy: [model] height, width and channels.")
    if len(given[0]) != 4:
        raise SubjectError(
            "Expected a model that takes images, an input of 4 dimensions such as (N, channels, height, width); "
            f"this one takes {given[0]}."
        )
    merged = [next((size for size in sizes if size > 0), -1) for sizes in zip(*given, strict=False)]
    if any(size < 1 for size in merged[1:]):
        raise SubjectError(
            f"The model leaves its image size open: {tuple(merged)}. Give it in the policy: [model] height, width and channels."
        )
    return tuple(merged)


def _stored_tensors(graph: fx.GraphModule) -> dict[str, torch.Tensor]:
    """Parameters, buffers and the constants that an exporter left as plain attributes."""
    stored = {**dict(graph.named_parameters()), **dict(graph.named_buffers())}
    for node in graph.graph.find_nodes(op="get_attr"):
        value: Any = graph
        for part in str(node.target).split("."):
            value = getattr(value, part, None)
        if isinstance(value, torch.Tensor):
            stored.setdefault(str(node.target), value)
    return stored


def _check_weights(program: fx.GraphModule | onnx.ModelProto) -> None:
    """NaN is broken anywhere, infinity in what was trained. Elsewhere it is a mask; answers that it spoils are refused later."""
    if isinstance(program, onnx.ModelProto):
        stored = {weight.name: onnx.numpy_helper.to_array(weight) for weight in program.graph.initializer}
        readers: dict[str, list[onnx.NodeProto]] = collections.defaultdict(list)
        for node in program.graph.node:
            for name in reads(node):
                readers[name].append(node)
        broken = [
            name
            for name, value in stored.items()
            if value.dtype.kind == "f" and (np.isnan(value).any() or (np.isinf(value).any() and not _only_masks(name, readers)))
        ]
    else:
        trained = dict(program.named_parameters())
        broken = [
            name
            for name, value in _stored_tensors(program).items()
            if value.is_floating_point() and bool(value.isnan().any() or (name in trained and value.isinf().any()))
        ]
    if broken:
        raise SubjectError(
            f"The weights '{broken[0]}' hold NaN or infinite values, so this model cannot be audited. Train and log it again."
        )


def _only_masks(name: str, readers: Mapping[str, Sequence[onnx.NodeProto]]) -> bool:
    """Whether a stored value is only added or chosen, as the mask of an attention is: ONNX does not tell weights from others."""
    waiting, seen = [name], {name}
    while waiting:
        for node in readers.get(waiting.pop(), ()):
            if node.op_type in _PASSING_ON:
                waiting += [result for result in node.output if result not in seen]
                seen.update(node.output)
            elif node.op_type not in _MASKING:
                return False
    return True


def _probe(program: fx.GraphModule | onnx.ModelProto, shape: tuple[int, ...], declared_batch: int) -> Network:
    """Run two small batches to learn the number of classes and whether the batch size is free."""
    run = runner(program)
    size = declared_batch if declared_batch > 0 else 3
    rng = np.random.default_rng(0)
    first, second = (rng.random((size, *shape[1:]), dtype=np.float32) * np.float32(_largest_value(program)) for _ in range(2))
    try:
        answer = run(first)
    except SubjectError:
        raise
    except Exception as error:  # whatever an unknown graph may raise
        raise SubjectError(f"The model does not run on a batch of shape {first.shape}: {first_line(error)}.") from error
    if answer.ndim != 2 or len(answer) != size:
        raise SubjectError(f"Expected one row of class scores an image, ({size}, classes); the model returns {answer.shape}.")
    classes = answer.shape[1]
    if classes < CLASS_LIMITS[0]:
        raise SubjectError(
            "The model returns one number an image, as a regression model or a binary one with a single score does. "
            "An audit needs at least 2 class scores (N, classes)."
        )
    if classes > CLASS_LIMITS[1]:
        raise SubjectError(f"The model has {classes} classes; at most {CLASS_LIMITS[1]} can be audited.")
    if not np.isfinite(answer).all():
        raise SubjectError("The model answers NaN or infinity for ordinary pixels, so it cannot be audited.")
    free = declared_batch < 1 or (not isinstance(program, onnx.ModelProto) and _takes_any_batch(run, answer, first, second))
    probabilities = bool((answer >= 0).all() and np.allclose(answer.sum(axis=1), 1.0, atol=1e-4))
    return Network(program, shape, classes, None if free else declared_batch, probabilities)


def _largest_value(program: fx.GraphModule | onnx.ModelProto) -> float:
    """Of an ordinary pixel: 255 where the model takes integers."""
    return 255.0 if isinstance(program, onnx.ModelProto) and input_element(program).kind != "f" else 1.0


def runner(program: fx.GraphModule | onnx.ModelProto) -> Run:
    """The function that a program is: a batch on its own scale and in its own layout to its answer (N, classes)."""
    if isinstance(program, onnx.ModelProto):
        session = Session(serialised(program))
        element = input_element(program)

        def answer(batch: FloatArray) -> FloatArray:
            given = batch if element.kind == "f" else np.rint(batch)
            scores: FloatArray = next(iter(session.run(given.astype(element)).values())).astype(np.float32)
            return scores

        return answer

    def run(batch: FloatArray) -> FloatArray:
        with torch.no_grad():
            answer = program(torch.from_numpy(batch))
        if not isinstance(answer, torch.Tensor):
            raise SubjectError(
                "Expected a model whose forward(images) returns the logits alone, this one returns them in a "
                f"{type(answer).__name__}. Wrap it, and log it again."
            )
        scores: FloatArray = answer.numpy()
        return scores

    return run


def _takes_any_batch(run: Run, reference: FloatArray, first: FloatArray, second: FloatArray) -> bool:
    """Most graphs exported with a fixed batch size have it written nowhere but in their guards."""
    try:
        answer = run(np.concatenate([first, second]))
        expected = np.concatenate([reference, run(second)])
    except Exception:  # any failure means the same: this graph insists on its batch size
        log.info("The graph runs only on batches of %d images.", len(first))
        return False
    tolerance = 1e-4 * (float(np.abs(expected).max()) + 1e-6)
    return answer.shape == expected.shape and bool(np.allclose(answer, expected, rtol=0.0, atol=tolerance))
