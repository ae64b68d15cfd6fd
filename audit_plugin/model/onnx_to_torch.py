"""An ONNX graph as a differentiable torch module, so that checks that need gradients work on ONNX models too.

A small interpreter of our own: onnx2torch 1.5.15 converts no graph of opset 18 or later, which is what today's
exporters write. It covers the operators that image classifiers are made of, opset 7 to 23, each in a few lines that
follow ONNX's ``Operators.md``. Whether the result is right for a given model is measured, not assumed: the audit has to
compare it with ONNX Runtime on every tap before anything is concluded from it.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from audit_plugin.errors import InapplicableError, SubjectError
from audit_plugin.model.onnx_graph import model_input, opset_version

Result: TypeAlias = Tensor | tuple[Tensor, ...]

_DTYPES: Mapping[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.INT8: torch.int8,
    TensorProto.INT16: torch.int16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.UINT8: torch.uint8,
    TensorProto.BOOL: torch.bool,
}


class OnnxModule(nn.Module):
    """An ONNX graph that torch can run and differentiate.

    Float weights become parameters that require gradients. Single numbers (an epsilon, an exponent, a clipping bound),
    the constants that normalise the image and the running statistics of batch normalisation become buffers: no gradient
    trained them, so none may change them in fine-tuning. Batch normalisation and dropout run in inference mode, whatever
    ``train()`` says.

    Args:
        model: a model with one input, local functions inlined (as ``read_model`` and ``expose`` return it).
        outputs: names of the values to return, outputs of the graph or any value inside it.

    Raises:
        InapplicableError: operators or settings that this module does not know, all of them named at once.
        ValueError: ``outputs`` names a value that the graph does not compute.
        SubjectError: the model has not exactly one input.
    """

    def __init__(self, model: ModelProto, outputs: Sequence[str]) -> None:
        super().__init__()
        self._input = model_input(model).name
        self._outputs = tuple(outputs)
        nodes, stored = _live(model, self._input, self._outputs)
        opset = opset_version(model)
        steps = [_Step.of(node, opset) for node in nodes]
        _refuse_unsupported(steps, stored)

        self._attributes: dict[str, str] = {}  # ONNX value name -> name of the parameter or buffer that holds it
        static: dict[str, list[int]] = {}
        frozen = {name for step in steps if step.operator == "BatchNormalization" for name in step.inputs[3:5]}
        frozen.update(_preprocessing_constants(steps, self._input))
        for index, (name, tensor) in enumerate(stored.items()):
            value = _to_torch(tensor)
            attribute = f"w{index:03d}_{re.sub('[^A-Za-z0-9_]+', '_', name)}"
            self._attributes[name] = attribute
            is_weight = value.is_floating_point() and value.numel() > 1 and name not in frozen
            if is_weight and bool(value.isfinite().all()):  # a mask may hold infinity
                self.register_parameter(attribute, nn.Parameter(value))
            else:
                self.register_buffer(attribute, value)
            if not value.is_floating_point() and value.ndim <= 1:
                static[name] = [int(number) for number in value.reshape(-1).tolist()]
        self._steps = tuple(steps)
        self._static = static
        self._released = _last_reads(steps, keep={*self._outputs, *stored})

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The values named at construction, in that order, for a batch as the ONNX graph takes it."""
        values: dict[str, Tensor] = {name: getattr(self, attribute) for name, attribute in self._attributes.items()}
        values[self._input] = x
        for step, released in zip(self._steps, self._released, strict=True):
            operands = tuple(values[name] if name else None for name in step.inputs)
            try:
                results = _OPERATORS[step.operator](_Call(step, operands, self._static))
            except Exception as error:
                error.add_note(f"in the ONNX node {step.title}")
                raise
            for name, value in zip(step.outputs, results if isinstance(results, tuple) else (results,), strict=False):
                values[name] = value
            for name in released:
                del values[name]
        return tuple(values[name] for name in self._outputs)

    def write_weights(self, model: ModelProto) -> ModelProto:
        """A copy of ``model`` with the present weights of this module, which was made from it or from its exposed copy.

        Raises:
            SubjectError: ``model`` does not store one of the weights under its name.
        """
        copied = ModelProto()
        copied.CopyFrom(model)
        stored = {tensor.name: tensor for tensor in copied.graph.initializer}
        for node in copied.graph.node:
            if (constant := _constant(node)) is not None:
                node.CopyFrom(_constant_node(node, constant))
                stored[node.output[0]] = node.attribute[0].t
        for name, attribute in self._attributes.items():
            value = getattr(self, attribute)
            if not isinstance(value, nn.Parameter):
                continue
            tensor = stored.get(name)
            if tensor is None:
                raise SubjectError(f"The model stores no weights named '{name}', so they cannot be changed.")
            array = value.detach().float().cpu().numpy().astype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        return copied


# ------------------------------------------------------------------------------------------------ reading the graph


@dataclass(frozen=True)
class _Step:
    """One node, its attributes decoded."""

    operator: str
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, object]
    title: str

    @classmethod
    def of(cls, node: NodeProto, opset: int) -> _Step:
        prefix = "" if node.domain in ("", "ai.onnx") else f"{node.domain}."
        attributes = {attribute.name: _decoded(attribute) for attribute in node.attribute}
        title = f"'{node.name or node.output[0]}' ({node.op_type})"
        return cls(prefix + node.op_type, opset, tuple(node.input), tuple(node.output), attributes, title)

    def integer(self, name: str, default: int) -> int:
        value = self.attributes.get(name, default)
        return value if isinstance(value, int) else default

    def number(self, name: str, default: float) -> float:
        value = self.attributes.get(name, default)
        return float(value) if isinstance(value, int | float) else default

    def text(self, name: str, default: str) -> str:
        value = self.attributes.get(name, default)
        return value if isinstance(value, str) else default

    def integers(self, name: str) -> list[int] | None:
        value = self.attributes.get(name)
        return [int(number) for number in value] if isinstance(value, list) else None

    def tensor(self, name: str) -> Tensor | None:
        value = self.attributes.get(name)
        return value if isinstance(value, Tensor) else None


@dataclass(frozen=True)
class _Call:
    """One step with the values of its inputs. ``static`` holds stored integers, so that no GPU is asked for them."""

    step: _Step
    operands: tuple[Tensor | None, ...]
    static: Mapping[str, list[int]]

    def __getitem__(self, index: int) -> Tensor:
        value = self.operands[index]
        if value is None:
            raise ValueError(f"input {index} is missing")
        return value

    def optional(self, index: int) -> Tensor | None:
        return self.operands[index] if index < len(self.operands) else None

    def integers(self, index: int) -> list[int] | None:
        """A list of integers given as an input, or None when that input is absent."""
        value = self.optional(index)
        if value is None:
            return None
        known = self.static.get(self.step.inputs[index])
        return known if known is not None else [int(number) for number in value.reshape(-1).tolist()]

    def axes(self, index: int) -> list[int] | None:
        """``axes``: an attribute in older opsets, an input in newer ones."""
        named = self.step.integers("axes")
        return named if named is not None else self.integers(index)

    @property
    def present(self) -> list[Tensor]:
        return [value for value in self.operands if value is not None]


def _live(model: ModelProto, source: str, outputs: Sequence[str]) -> tuple[list[NodeProto], dict[str, TensorProto]]:
    """The nodes that the outputs need, in order, and the stored tensors that those read (``Constant`` nodes as well)."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    needed, nodes = set(outputs), []
    for node in reversed(model.graph.node):
        if not needed.intersection(node.output):
            continue
        constant = _constant(node)
        if constant is not None:
            stored[node.output[0]] = constant
        else:
            nodes.append(node)
            needed.update(name for name in node.input if name)
    computed = {name for node in nodes for name in node.output} | set(stored) | {source}
    unknown = sorted(needed - computed)
    if unknown:
        raise ValueError(f"the graph computes no value named {', '.join(map(repr, unknown[:5]))}")
    return nodes[::-1], {name: tensor for name, tensor in stored.items() if name in needed}


def _constant(node: NodeProto) -> TensorProto | None:
    """The tensor of a ``Constant`` node, None for any other node."""
    if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
        return None
    for attribute in node.attribute:
        if attribute.name == "value":
            tensor: TensorProto = attribute.t
            return tensor
        if attribute.name in ("value_float", "value_floats"):
            return numpy_helper.from_array(np.asarray(helper.get_attribute_value(attribute), np.float32))
        if attribute.name in ("value_int", "value_ints"):
            return numpy_helper.from_array(np.asarray(helper.get_attribute_value(attribute), np.int64))
    return None


def _constant_node(node: NodeProto, tensor: TensorProto) -> NodeProto:
    """The same ``Constant`` node with its value as a tensor, whichever attribute held it."""
    made = helper.make_node("Constant", [], list(node.output), name=node.name, domain=node.domain, value=tensor)
    made.metadata_props.extend(node.metadata_props)
    return made


def _decoded(attribute: AttributeProto) -> object:
    """An attribute as a number, a string, a list of numbers or a tensor; None for anything else."""
    if attribute.type == AttributeProto.TENSOR:
        return _to_torch(attribute.t) if attribute.t.data_type in _DTYPES else None
    if attribute.type == AttributeProto.STRING:
        return attribute.s.decode("utf-8", "replace")
    if attribute.type in (AttributeProto.INT, AttributeProto.FLOAT):
        return attribute.i if attribute.type == AttributeProto.INT else attribute.f
    if attribute.type in (AttributeProto.INTS, AttributeProto.FLOATS):
        return list(attribute.ints if attribute.type == AttributeProto.INTS else attribute.floats)
    return None


def _to_torch(tensor: TensorProto) -> Tensor:
    array = numpy_helper.to_array(tensor)
    if tensor.data_type == TensorProto.BFLOAT16:  # a type that torch.from_numpy does not know
        return torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16)
    return torch.from_numpy(array.copy())


def _preprocessing_constants(steps: Sequence[_Step], source: str) -> set[str]:
    """What is added to the image or multiplied with it before the first weights."""
    dependent: set[str] = {source}
    found: set[str] = set()
    for step in steps:
        if dependent.isdisjoint(step.inputs):
            continue
        if step.operator in ("Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum"):
            break
        if step.operator in ("Add", "Sub", "Mul", "Div"):
            found.update(step.inputs)
        dependent.update(step.outputs)
    return found


def _last_reads(steps: Sequence[_Step], keep: set[str]) -> tuple[tuple[str, ...], ...]:
    """For each step the values that nothing reads after it, so that memory does not grow with depth."""
    released, seen = [], set(keep)
    for step in reversed(steps):
        names = dict.fromkeys(name for name in (*step.inputs, *_kept_outputs(step)) if name and name not in seen)
        seen.update(names)
        released.append(tuple(names))
    return tuple(released[::-1])


def _kept_outputs(step: _Step) -> tuple[str, ...]:
    """The outputs that the interpreter computes; all but ``Split`` give their first one only."""
    return step.outputs if step.operator == "Split" else step.outputs[:1]


def _refuse_unsupported(steps: Sequence[_Step], stored: Mapping[str, TensorProto]) -> None:
    read = {name for step in steps for name in step.inputs}
    found: set[str] = {step.operator for step in steps if step.operator not in _OPERATORS}
    for step in steps:
        if step.operator in _OPERATORS:
            found.update(f"{step.operator} with {trait}" for trait in _unsupported_traits(step))
            if any(name in read for name in step.outputs if name not in _kept_outputs(step)):
                found.add(f"{step.operator} with a second output")
    found.update(
        f"weights of type {TensorProto.DataType.Name(tensor.data_type)}"
        for tensor in stored.values()
        if tensor.data_type not in _DTYPES
    )
    if found:
        raise InapplicableError(
            f"Gradients of this ONNX model cannot be computed: {', '.join(sorted(found))} not supported. "
            "Log the model with mlflow.pytorch.log_model to have every check."
        )


def _unsupported_traits(step: _Step) -> list[str]:
    """Settings of known operators that the functions below do not implement."""
    refused = {
        "BatchNormalization": step.integer("training_mode", 0) != 0 and "training_mode",
        "Resize": _unsupported_resize(step),
        "Upsample": _unsupported_resize(step),
        "DepthToSpace": step.text("mode", "DCR") not in ("DCR", "CRD") and "an unknown mode",
        "Cast": step.integer("to", TensorProto.FLOAT) not in _DTYPES and "an unknown type",
        "GatherND": step.integer("batch_dims", 0) != 0 and "batch_dims",
        "ScatterND": step.text("reduction", "none") not in ("none", "add") and "an unknown reduction",
        "Attention": (any(step.inputs[4:]) or step.number("softcap", 0.0) != 0.0) and "a cache or soft cap",
    }
    trait = refused.get(step.operator)
    return [trait] if isinstance(trait, str) else []


# -------------------------------------------------------------------------------------------------- the operators

_Operator: TypeAlias = Callable[[_Call], Result]
_OPERATORS: dict[str, _Operator] = {}


def _operator(*names: str) -> Callable[[_Operator], _Operator]:
    def register(function: _Operator) -> _Operator:
        _OPERATORS.update(dict.fromkeys(names, function))
        return function

    return register


def _unary(function: Callable[[Tensor], Tensor]) -> _Operator:
    return lambda call: function(call[0])


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> _Operator:
    return lambda call: function(call[0], call[1])


def _variadic(function: Callable[[Tensor, Tensor], Tensor]) -> _Operator:
    return lambda call: functools.reduce(function, call.present)


_OPERATORS.update(
    {
        "Abs": _unary(torch.abs),
        "Ceil": _unary(torch.ceil),
        "Cos": _unary(torch.cos),
        "Dropout": _unary(lambda x: x),
        "Erf": _unary(torch.erf),
        "Exp": _unary(torch.exp),
        "Floor": _unary(torch.floor),
        "HardSwish": _unary(functional.hardswish),
        "Identity": _unary(lambda x: x),
        "Log": _unary(torch.log),
        "Mish": _unary(functional.mish),
        "Neg": _unary(torch.neg),
        "Not": _unary(torch.logical_not),
        "Reciprocal": _unary(torch.reciprocal),
        "Relu": _unary(torch.relu),
        "Round": _unary(torch.round),
        "Sigmoid": _unary(torch.sigmoid),
        "Sign": _unary(torch.sign),
        "Sin": _unary(torch.sin),
        "Softplus": _unary(functional.softplus),
        "Softsign": _unary(functional.softsign),
        "Sqrt": _unary(torch.sqrt),
        "Tanh": _unary(torch.tanh),
        "Add": _binary(torch.add),
        "And": _binary(torch.logical_and),
        "Equal": _binary(torch.eq),
        "Greater": _binary(torch.gt),
        "GreaterOrEqual": _binary(torch.ge),
        "Less": _binary(torch.lt),
        "LessOrEqual": _binary(torch.le),
        "MatMul": _binary(torch.matmul),
        "Mul": _binary(torch.mul),
        "Or": _binary(torch.logical_or),
        "PRelu": _binary(lambda x, slope: torch.where(x < 0, slope * x, x)),
        "Sub": _binary(torch.sub),
        "Xor": _binary(torch.logical_xor),
        "Max": _variadic(torch.maximum),
        "Min": _variadic(torch.minimum),
        "Sum": _variadic(torch.add),
    }
)


@_operator("Mean")
def _mean(call: _Call) -> Tensor:
    return functools.reduce(torch.add, call.present) / len(call.present)


@_operator("Div")
def _div(call: _Call) -> Tensor:
    whole = not call[0].is_floating_point()  # ONNX divides integers like C does
    return torch.div(call[0], call[1], rounding_mode="trunc" if whole else None)


@_operator("Mod")
def _mod(call: _Call) -> Tensor:
    return torch.fmod(call[0], call[1]) if call.step.integer("fmod", 0) else torch.remainder(call[0], call[1])


@_operator("Pow")
def _pow(call: _Call) -> Tensor:
    return torch.pow(call[0], call[1]).to(call[0].dtype)


@_operator("Where")
def _where(call: _Call) -> Tensor:
    return torch.where(call[0], call[1], call[2])


@_operator("Clip")
def _clip(call: _Call) -> Tensor:
    attributes = call.step.attributes
    low = call.step.number("min", 0.0) if "min" in attributes else call.optional(1)
    high = call.step.number("max", 0.0) if "max" in attributes else call.optional(2)
    x = call[0]
    if low is not None:
        x = torch.clamp(x, min=low)
    return x if high is None else torch.clamp(x, max=high)


# ---- activations with settings


@_operator("LeakyRelu")
def _leaky_relu(call: _Call) -> Tensor:
    return functional.leaky_relu(call[0], call.step.number("alpha", 0.01))


@_operator("ThresholdedRelu")
def _thresholded_relu(call: _Call) -> Tensor:
    return functional.threshold(call[0], call.step.number("alpha", 1.0), 0.0)


@_operator("Elu")
def _elu(call: _Call) -> Tensor:
    return functional.elu(call[0], call.step.number("alpha", 1.0))


@_operator("Celu")
def _celu(call: _Call) -> Tensor:
    return functional.celu(call[0], call.step.number("alpha", 1.0))


@_operator("Selu")
def _selu(call: _Call) -> Tensor:
    alpha = call.step.number("alpha", 1.67326319217681884765625)
    return call.step.number("gamma", 1.05070102214813232421875) * functional.elu(call[0], alpha)


@_operator("Gelu")
def _gelu(call: _Call) -> Tensor:
    return functional.gelu(call[0], approximate=call.step.text("approximate", "none"))


@_operator("HardSigmoid")
def _hard_sigmoid(call: _Call) -> Tensor:
    return torch.clamp(call[0] * call.step.number("alpha", 0.2) + call.step.number("beta", 0.5), 0.0, 1.0)


@_operator("Softmax", "LogSoftmax")
def _softmax(call: _Call) -> Tensor:
    function = torch.softmax if call.step.operator == "Softmax" else torch.log_softmax
    if call.step.opset >= 13:
        return function(call[0], call.step.integer("axis", -1))
    axis = call.step.integer("axis", 1)  # before opset 13 everything from this axis on was one long axis
    return function(_flattened(call[0], axis), 1).reshape(call[0].shape)


# ---- weights


@_operator("Gemm")
def _gemm(call: _Call) -> Tensor:
    left = call[0].mT if call.step.integer("transA", 0) else call[0]
    right = call[1].mT if call.step.integer("transB", 0) else call[1]
    product = call.step.number("alpha", 1.0) * (left @ right)
    bias = call.optional(2)
    return product if bias is None else product + call.step.number("beta", 1.0) * bias


@_operator("Einsum")
def _einsum(call: _Call) -> Tensor:
    return torch.einsum(call.step.text("equation", ""), *call.present)


@dataclass(frozen=True)
class _Window:
    """How a kernel moves, one entry a spatial axis; ``end`` is ``padded_end`` and what ``ceil_mode`` adds behind it."""

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    begin: list[int]
    padded_end: list[int]
    end: list[int]

    @property
    def symmetric(self) -> bool:
        return self.begin == self.end

    def padding(self, *, ceil: bool = True) -> list[int]:
        """In the order of ``torch.nn.functional.pad``, last axis first."""
        ends = self.end if ceil else self.padded_end
        return [size for pair in zip(self.begin[::-1], ends[::-1], strict=True) for size in pair]


def _window(step: _Step, sizes: Sequence[int], kernel: list[int]) -> _Window:
    count = len(sizes)
    strides = step.integers("strides") or [1] * count
    dilations = step.integers("dilations") or [1] * count
    reach = [(size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True)]
    automatic = step.text("auto_pad", "NOTSET")
    if automatic.startswith("SAME"):
        totals = [
            max((math.ceil(size / stride) - 1) * stride + span - size, 0)
            for size, stride, span in zip(sizes, strides, reach, strict=True)
        ]
        small, large = [total // 2 for total in totals], [total - total // 2 for total in totals]
        begin, padded_end = (small, large) if automatic == "SAME_UPPER" else (large, small)
    else:
        pads = (step.integers("pads") if automatic == "NOTSET" else None) or [0] * (2 * count)
        begin, padded_end = pads[:count], pads[count:]
    end = padded_end
    if step.integer("ceil_mode", 0):
        end = []
        for size, stride, span, first, last in zip(sizes, strides, reach, begin, padded_end, strict=True):
            windows = math.ceil((size + first + last - span) / stride) + 1
            if (windows - 1) * stride >= size + first:  # a window may not start in the padding at the end
                windows -= 1
            end.append(max((windows - 1) * stride + span - size - first, last))
    return _Window(kernel, strides, dilations, begin, padded_end, end)


_CONVOLUTIONS: Mapping[int, Callable[..., Tensor]] = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_TRANSPOSED: Mapping[int, Callable[..., Tensor]] = {
    1: functional.conv_transpose1d,
    2: functional.conv_transpose2d,
    3: functional.conv_transpose3d,
}
_MAXIMA: Mapping[int, Callable[..., Tensor]] = {
    1: functional.max_pool1d,
    2: functional.max_pool2d,
    3: functional.max_pool3d,
}
_AVERAGES: Mapping[int, Callable[..., Tensor]] = {
    1: functional.avg_pool1d,
    2: functional.avg_pool2d,
    3: functional.avg_pool3d,
}


@_operator("Conv")
def _conv(call: _Call) -> Tensor:
    x, weight = call[0], call[1]
    window = _window(call.step, x.shape[2:], list(weight.shape[2:]))
    if not window.symmetric:
        x = functional.pad(x, window.padding())
    return _CONVOLUTIONS[x.ndim - 2](
        x,
        weight,
        call.optional(2),
        stride=window.strides,
        padding=window.begin if window.symmetric else 0,
        dilation=window.dilations,
        groups=call.step.integer("group", 1),
    )


@_operator("ConvTranspose")
def _conv_transpose(call: _Call) -> Tensor:
    x, weight, bias, step = call[0], call[1], call.optional(2), call.step
    count = x.ndim - 2
    strides = step.integers("strides") or [1] * count
    dilations = step.integers("dilations") or [1] * count
    extra = step.integers("output_padding") or [0] * count
    full = _TRANSPOSED[count](x, weight, stride=strides, dilation=dilations, groups=step.integer("group", 1))
    automatic = step.text("auto_pad", "NOTSET")
    wanted = step.integers("output_shape")
    if wanted is None and automatic.startswith("SAME"):
        wanted = [size * stride for size, stride in zip(x.shape[2:], strides, strict=True)]
    if wanted is not None:
        totals = [size + more - want for size, more, want in zip(full.shape[2:], extra, wanted[-count:], strict=True)]
        small = [total // 2 for total in totals]
        large = [total - total // 2 for total in totals]
        begin, end = (small, large) if automatic == "SAME_UPPER" else (large, small)
    else:
        pads = (step.integers("pads") if automatic == "NOTSET" else None) or [0] * (2 * count)
        begin, end = pads[:count], pads[count:]
    # Padding of a transposed convolution cuts off its result; output_padding makes it longer at the end.
    sides = zip(begin[::-1], end[::-1], extra[::-1], strict=True)
    crop = [size for first, last, more in sides for size in (-first, more - last)]
    result = functional.pad(full, crop)
    return result if bias is None else result + bias.reshape(-1, *[1] * count)


@_operator("Attention")
def _attention(call: _Call) -> Tensor:
    """Scaled dot-product attention of opset 23, without cache."""
    step, mask = call.step, call.optional(3)
    heads, pair_heads = step.integer("q_num_heads", 0), step.integer("kv_num_heads", 0)
    flat = call[0].ndim == 3
    query = _split_heads(call[0], heads) if flat else call[0]
    key, value = (_split_heads(operand, pair_heads) if flat else operand for operand in (call[1], call[2]))
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scale = step.number("scale", 1.0 / math.sqrt(query.shape[-1]))
    scores = query @ key.mT * scale
    if step.integer("is_causal", 0):
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    result = torch.softmax(scores, -1) @ value
    return result.transpose(1, 2).flatten(2) if flat else result


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """(N, length, heads * size) to (N, heads, length, size)."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


# ---- normalisation


@_operator("BatchNormalization")
def _batch_normalization(call: _Call) -> Tensor:
    scale, bias, mean, variance = call[1], call[2], call[3], call[4]
    epsilon = call.step.number("epsilon", 1e-5)
    return functional.batch_norm(call[0], mean, variance, scale, bias, training=False, eps=epsilon)


@_operator("InstanceNormalization")
def _instance_normalization(call: _Call) -> Tensor:
    return torch.group_norm(call[0], call[0].shape[1], call[1], call[2], call.step.number("epsilon", 1e-5))


@_operator("GroupNormalization")
def _group_normalization(call: _Call) -> Tensor:
    x, scale, bias, groups = call[0], call[1], call[2], call.step.integer("num_groups", 1)
    if call.step.opset < 21:  # then scale and bias had one value a group, now one a channel
        scale, bias = (value.repeat_interleave(x.shape[1] // groups) for value in (scale, bias))
    return torch.group_norm(x, groups, scale, bias, call.step.number("epsilon", 1e-5))


@_operator("LayerNormalization")
def _layer_normalization(call: _Call) -> Tensor:
    x, bias = call[0], call.optional(2)
    axis = call.step.integer("axis", -1) % x.ndim
    normal = functional.layer_norm(x, x.shape[axis:], eps=call.step.number("epsilon", 1e-5)) * call[1]
    return normal if bias is None else normal + bias


@_operator("RMSNormalization")
def _rms_normalization(call: _Call) -> Tensor:
    axes = list(range(call.step.integer("axis", -1) % call[0].ndim, call[0].ndim))
    power = call[0].square().mean(axes, keepdim=True)
    return call[0] * torch.rsqrt(power + call.step.number("epsilon", 1e-5)) * call[1]


@_operator("LRN")
def _local_response_normalization(call: _Call) -> Tensor:
    size = call.step.integer("size", 1)
    before = (size - 1) // 2
    squares = functional.pad(call[0].square().movedim(1, -1), (before, size - 1 - before))
    power = squares.unfold(-1, size, 1).sum(-1).movedim(-1, 1)
    base = call.step.number("bias", 1.0) + call.step.number("alpha", 1e-4) / size * power
    return call[0] / base ** call.step.number("beta", 0.75)


# ---- pooling and reductions


@_operator("MaxPool")
def _max_pool(call: _Call) -> Tensor:
    x = call[0]
    window = _window(call.step, x.shape[2:], call.step.integers("kernel_shape") or [])
    padded = functional.pad(x, window.padding(), value=-math.inf) if any(window.padding()) else x
    return _MAXIMA[x.ndim - 2](padded, window.kernel, window.strides, 0, window.dilations)


@_operator("AveragePool")
def _average_pool(call: _Call) -> Tensor:
    x = call[0]
    window = _window(call.step, x.shape[2:], call.step.integers("kernel_shape") or [])
    if not any(window.padding()):
        return _average(x, window)
    # The mean over the window divided by the share of it that counts; what ceil_mode added behind never counts.
    counted = torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype, device=x.device)
    if call.step.integer("count_include_pad", 0):
        counted = functional.pad(counted, window.padding(ceil=False), value=1.0)
        behind = [last - padded for last, padded in zip(window.end[::-1], window.padded_end[::-1], strict=True)]
        counted = functional.pad(counted, [size for last in behind for size in (0, last)])
    else:
        counted = functional.pad(counted, window.padding())
    return _average(functional.pad(x, window.padding()), window) / _average(counted, window)


def _average(x: Tensor, window: _Window) -> Tensor:
    count = x.ndim - 2
    if all(dilation == 1 for dilation in window.dilations):
        return _AVERAGES[count](x, window.kernel, window.strides)
    channels = x.shape[1]
    weight = torch.full((channels, 1, *window.kernel), 1.0 / math.prod(window.kernel), dtype=x.dtype, device=x.device)
    return _CONVOLUTIONS[count](x, weight, stride=window.strides, dilation=window.dilations, groups=channels)


@_operator("GlobalAveragePool")
def _global_average_pool(call: _Call) -> Tensor:
    return call[0].mean(list(range(2, call[0].ndim)), keepdim=True)


@_operator("GlobalMaxPool")
def _global_max_pool(call: _Call) -> Tensor:
    return call[0].amax(list(range(2, call[0].ndim)), keepdim=True)


_REDUCTIONS: Mapping[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "ReduceMean": lambda x, axes, keep: x.mean(axes, keepdim=keep),
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keepdim=keep),
    "ReduceMax": lambda x, axes, keep: x.amax(axes, keepdim=keep),
    "ReduceMin": lambda x, axes, keep: x.amin(axes, keepdim=keep),
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keepdim=keep),
    "ReduceL2": lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keepdim=keep),
    "ReduceSumSquare": lambda x, axes, keep: x.square().sum(axes, keepdim=keep),
    "ReduceLogSumExp": lambda x, axes, keep: torch.logsumexp(x, axes, keepdim=keep),
}


@_operator(*_REDUCTIONS)
def _reduce(call: _Call) -> Tensor:
    axes = call.axes(1)
    if not axes and call.step.integer("noop_with_empty_axes", 0):
        return call[0]
    axes = axes or list(range(call[0].ndim))
    return _REDUCTIONS[call.step.operator](call[0], axes, bool(call.step.integer("keepdims", 1)))


@_operator("ArgMax")
def _arg_max(call: _Call) -> Tensor:
    return call[0].argmax(call.step.integer("axis", 0), keepdim=bool(call.step.integer("keepdims", 1)))


# ---- shapes


def _flattened(x: Tensor, axis: int) -> Tensor:
    axis = axis if axis >= 0 else axis + x.ndim
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@_operator("Flatten")
def _flatten(call: _Call) -> Tensor:
    return _flattened(call[0], call.step.integer("axis", 1))


@_operator("Reshape")
def _reshape(call: _Call) -> Tensor:
    sizes = call.integers(1) or []
    if not call.step.integer("allowzero", 0):
        sizes = [call[0].shape[index] if size == 0 else size for index, size in enumerate(sizes)]
    return call[0].reshape(sizes)


@_operator("Transpose")
def _transpose(call: _Call) -> Tensor:
    return call[0].permute(call.step.integers("perm") or list(range(call[0].ndim))[::-1])


@_operator("Squeeze")
def _squeeze(call: _Call) -> Tensor:
    axes = call.axes(1)
    return call[0].squeeze() if axes is None else call[0].squeeze(tuple(axes))


@_operator("Unsqueeze")
def _unsqueeze(call: _Call) -> Tensor:
    x, axes = call[0], call.axes(1) or []
    for axis in sorted(axis % (x.ndim + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


@_operator("Concat")
def _concat(call: _Call) -> Tensor:
    return torch.cat(call.present, call.step.integer("axis", 0))


@_operator("Slice")
def _slice(call: _Call) -> Tensor:
    x = call[0]
    starts = call.step.integers("starts") or call.integers(1) or []
    ends = call.step.integers("ends") or call.integers(2) or []
    axes = call.axes(3) or list(range(len(starts)))
    steps = call.integers(4) or [1] * len(starts)
    for start, end, axis, stride in zip(starts, ends, axes, steps, strict=True):
        size = x.shape[axis]
        chosen = range(*slice(start, end, stride).indices(size))  # ONNX clamps just as Python does
        if stride > 0:
            x = x[(slice(None),) * (axis % x.ndim) + (slice(chosen.start, chosen.stop, chosen.step),)]
        else:
            x = x.index_select(axis, torch.tensor(list(chosen), dtype=torch.int64, device=x.device))
    return x


@_operator("Gather")
def _gather(call: _Call) -> Tensor:
    x, indices, axis = call[0], call[1], call.step.integer("axis", 0) % call[0].ndim
    indices = torch.where(indices < 0, indices + x.shape[axis], indices)
    return x.index_select(axis, indices.reshape(-1)).reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


@_operator("GatherElements")
def _gather_elements(call: _Call) -> Tensor:
    x, indices, axis = call[0], call[1], call.step.integer("axis", 0)
    return x.gather(axis, torch.where(indices < 0, indices + x.shape[axis], indices).long())


@_operator("GatherND")
def _gather_nd(call: _Call) -> Tensor:
    return call[0][call[1].unbind(-1)]


@_operator("ScatterND")
def _scatter_nd(call: _Call) -> Tensor:
    return call[0].index_put(call[1].unbind(-1), call[2], accumulate=call.step.text("reduction", "none") == "add")


@_operator("Split")
def _split(call: _Call) -> Result:
    axis, count = call.step.integer("axis", 0), len(call.step.outputs)
    sizes = call.step.integers("split") or call.integers(1)
    if sizes is None:
        total = call[0].shape[axis]
        each = math.ceil(total / count)
        sizes = [each] * (count - 1) + [total - each * (count - 1)]
    return torch.split_with_sizes(call[0], sizes, axis)


@_operator("Shape")
def _shape(call: _Call) -> Tensor:
    start, end = call.step.integer("start", 0), call.step.integer("end", call[0].ndim)
    return torch.tensor(call[0].shape[start:end], dtype=torch.int64, device=call[0].device)


@_operator("Size")
def _size(call: _Call) -> Tensor:
    return torch.tensor(call[0].numel(), dtype=torch.int64, device=call[0].device)


@_operator("ConstantOfShape")
def _constant_of_shape(call: _Call) -> Tensor:
    value = call.step.tensor("value")
    value = torch.zeros(1) if value is None else value
    return value.to(call[0].device).reshape(()).expand(call.integers(0) or [])


@_operator("Range")
def _range(call: _Call) -> Tensor:
    start, limit, delta = (call[index].item() for index in range(3))
    return torch.arange(start, limit, delta, dtype=call[0].dtype, device=call[0].device)


@_operator("Expand")
def _expand(call: _Call) -> Tensor:
    shape = np.broadcast_shapes(tuple(call[0].shape), tuple(call.integers(1) or []))
    return call[0].expand(shape)


@_operator("Tile")
def _tile(call: _Call) -> Tensor:
    return call[0].repeat(call.integers(1) or [])


@_operator("Cast")
def _cast(call: _Call) -> Tensor:
    return call[0].to(_DTYPES[call.step.integer("to", TensorProto.FLOAT)])


@_operator("CastLike")
def _cast_like(call: _Call) -> Tensor:
    return call[0].to(call[1].dtype)


@_operator("DepthToSpace")
def _depth_to_space(call: _Call) -> Tensor:
    x, block = call[0], call.step.integer("blocksize", 1)
    if call.step.text("mode", "DCR") == "DCR":  # pixel_shuffle is the other order, CRD
        x = _swapped(x, block * block, -1)
    return functional.pixel_shuffle(x, block)


@_operator("SpaceToDepth")
def _space_to_depth(call: _Call) -> Tensor:
    block = call.step.integer("blocksize", 1)
    return _swapped(functional.pixel_unshuffle(call[0], block), -1, block * block)


def _swapped(x: Tensor, outer: int, inner: int) -> Tensor:
    """Channels counted (outer, inner) become (inner, outer)."""
    return x.reshape(x.shape[0], outer, inner, *x.shape[2:]).transpose(1, 2).flatten(1, 2)


@_operator("Pad")
def _pad(call: _Call) -> Tensor:
    x, fill = call[0], call.optional(2)
    pads = call.step.integers("pads") or call.integers(1) or []
    axes = call.integers(3) or list(range(x.ndim))
    mode = call.step.text("mode", "constant")
    for axis, before, after in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True):
        if mode == "constant":
            value = call.step.number("value", 0.0) if fill is None else fill.item()
            x = functional.pad(x, [0, 0] * (x.ndim - 1 - axis % x.ndim) + [before, after], value=value)
        elif before or after:
            indices = _padding_indices(x.shape[axis], before, after, mode)
            x = x.index_select(axis, torch.tensor(indices, device=x.device))
    return x


def _padding_indices(size: int, before: int, after: int, mode: str) -> list[int]:
    positions = range(-before, size + after)
    if mode == "edge":
        return [min(max(position, 0), size - 1) for position in positions]
    if mode == "wrap":
        return [position % size for position in positions]
    period = max(2 * (size - 1), 1)  # reflect
    return [min(position % period, period - position % period) if size > 1 else 0 for position in positions]


# ---- resizing, one axis after the other

_RESIZE_SETTINGS: Mapping[str, tuple[str, ...]] = {
    "mode": ("nearest", "linear"),
    "coordinate_transformation_mode": ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"),
    "nearest_mode": ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil"),
    "keep_aspect_ratio_policy": ("stretch",),
}


def _unsupported_resize(step: _Step) -> str | None:
    settings = {name: step.text(name, known[0]) for name, known in _RESIZE_SETTINGS.items()}
    wrong = [f"{name} {value}" for name, value in settings.items() if value not in _RESIZE_SETTINGS[name]]
    if step.integer("antialias", 0) or step.integer("exclude_outside", 0):
        wrong.append("antialias or exclude_outside")
    return " and ".join(wrong) or None


@_operator("Resize", "Upsample")
def _resize(call: _Call) -> Tensor:
    x, step = call[0], call.step
    at = 1 if step.operator == "Upsample" or step.opset < 11 else 2
    axes = step.integers("axes") or list(range(x.ndim))
    named, given = step.attributes.get("scales"), call.optional(at)
    scales = list(named) if isinstance(named, list) else given.tolist() if given is not None and given.numel() else None
    sizes = call.integers(3)
    if scales is None:
        scales = [size / x.shape[axis] for axis, size in zip(axes, sizes or [], strict=True)]
    if not sizes:
        sizes = [math.floor(x.shape[axis] * scale) for axis, scale in zip(axes, scales, strict=True)]
    # Before opset 11 there was one rule only: asymmetric coordinates, rounded down.
    legacy = step.operator == "Upsample" or step.opset < 11
    rule = "asymmetric" if legacy else step.text("coordinate_transformation_mode", "half_pixel")
    rounding = "floor" if legacy else step.text("nearest_mode", "round_prefer_floor")
    for axis, size, scale in zip(axes, sizes, scales, strict=True):
        if size == x.shape[axis] and scale == 1.0:
            continue
        positions = _source_positions(x.shape[axis], size, float(scale), rule)
        if step.text("mode", "nearest") == "nearest":
            x = x.index_select(axis, _rounded(positions, rounding, x.shape[axis]).to(x.device))
        else:
            x = _interpolated(x, axis, positions)
    return x


def _source_positions(size: int, resized: int, scale: float, rule: str) -> Tensor:
    """Where each element of the resized axis lies on the original one, float64 (resized,)."""
    index = torch.arange(resized, dtype=torch.float64)
    if rule == "align_corners":
        return index * (size - 1) / (resized - 1) if resized > 1 else torch.zeros_like(index)
    if rule == "asymmetric":
        return index / scale
    if rule == "pytorch_half_pixel" and resized == 1:
        return torch.zeros_like(index)
    return (index + 0.5) / scale - 0.5


def _rounded(positions: Tensor, rounding: str, size: int) -> Tensor:
    rounded = {
        "round_prefer_floor": torch.ceil(positions - 0.5),
        "round_prefer_ceil": torch.floor(positions + 0.5),
        "floor": torch.floor(positions),
        "ceil": torch.ceil(positions),
    }[rounding]
    return rounded.clamp(0, size - 1).long()


def _interpolated(x: Tensor, axis: int, positions: Tensor) -> Tensor:
    size = x.shape[axis]
    positions = positions.clamp(0, size - 1).to(x.device)
    low = positions.floor().long()
    high = (low + 1).clamp(max=size - 1)
    shape = [-1 if index == axis % x.ndim else 1 for index in range(x.ndim)]
    weight = (positions - low).to(x.dtype).reshape(shape)
    return x.index_select(axis, low) * (1 - weight) + x.index_select(axis, high) * weight
