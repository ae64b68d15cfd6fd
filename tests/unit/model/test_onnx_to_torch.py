"""The interpreter against ONNX Runtime (or onnx's reference evaluator): operator by operator, and on whole networks."""

from __future__ import annotations

import copy
import functools
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torchvision
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from audit_plugin.errors import InapplicableError
from audit_plugin.model.onnx_graph import choose_onnx_taps, expose, input_and_output
from audit_plugin.model.onnx_to_torch import OnnxModule
from audit_plugin.types import InputSpec

# Both sides compute in float32 and sum in different orders; measured differences are 2e-6 of the largest magnitude at the
# most, while a wrong padding, epsilon or axis moves values by more than 1e-2.
TOLERANCE = 1e-4


def relative_difference(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found.astype(np.float64) - expected).max() / max(float(np.abs(expected).max()), 1e-12))


def run_onnx(model: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    results: list[np.ndarray] = session.run(None, {session.get_inputs()[0].name: x})
    return results


# ------------------------------------------------------------------------------------------------- single operators


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.asarray(values, dtype=np.int64)


IMAGE = random(2, 4, 7, 6)
POSITIVE = np.abs(IMAGE) + 0.1


@dataclass(frozen=True)
class Case:
    """One node: its first input is the graph's input, the others are stored; None leaves an optional input away."""

    operator: str
    inputs: Sequence[np.ndarray | None]
    attributes: dict[str, Any] = field(default_factory=dict)
    opset: int = 18
    outputs: int = 1
    reference: bool = False  # onnx's own evaluator, where ONNX Runtime has no CPU kernel
    note: str = ""

    def __str__(self) -> str:
        settings = ",".join(f"{name}={value}" for name, value in self.attributes.items()).replace(" ", "")
        return f"{self.operator}-{self.opset}-{settings}{self.note}"

    def model(self) -> onnx.ModelProto:
        names = [f"i{index}" if value is not None else "" for index, value in enumerate(self.inputs)]
        outputs = [f"o{index}" for index in range(self.outputs)]
        stored = [
            numpy_helper.from_array(value, name)
            for name, value in zip(names[1:], self.inputs[1:], strict=True)
            if value is not None
        ]
        first = self.inputs[0]
        assert first is not None
        source = helper.make_tensor_value_info("i0", helper.np_dtype_to_tensor_dtype(first.dtype), first.shape)
        results = []
        for name in outputs:
            result = onnx.ValueInfoProto()
            result.name = name
            results.append(result)
        node = helper.make_node(self.operator, names, outputs, **self.attributes)
        graph = helper.make_graph([node], "one", [source], results, stored)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)
        return onnx.shape_inference.infer_shapes(model)


def kernel(*shape: int) -> np.ndarray:
    return random(*shape, seed=1)


UNARY = ["Abs", "Ceil", "Cos", "Elu", "Erf", "Exp", "Floor", "HardSwish", "Identity", "LeakyRelu", "Neg", "Relu"]
UNARY += ["Round", "Selu", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Tanh", "Celu", "HardSigmoid"]
UNARY += ["ThresholdedRelu", "Mish", "Dropout", "GlobalAveragePool", "GlobalMaxPool", "Flatten", "Transpose", "Shape", "Size"]

CASES = [
    *(Case(name, [IMAGE]) for name in UNARY),
    *(Case(name, [POSITIVE]) for name in ("Log", "Sqrt", "Reciprocal")),
    Case("Not", [IMAGE > 0]),
    *(Case(name, [IMAGE, random(4, 1, 1)]) for name in ("Add", "Sub", "Mul", "Div", "Max", "Min", "PRelu")),
    *(Case(name, [IMAGE, random(1, 6), random(7, 1)]) for name in ("Max", "Min", "Sum", "Mean")),
    *(Case(name, [IMAGE, np.float32(0.1)]) for name in ("Less", "Greater", "LessOrEqual", "GreaterOrEqual")),
    *(Case(name, [IMAGE > 0, random(6) > 0]) for name in ("And", "Or", "Xor")),
    Case("Equal", [ints(1, 2, 3), ints(1, 5, 3)]),
    Case("Div", [ints(7, -7, 8), ints(2)], note="integers"),
    Case("Mod", [ints(7, -7, 8), ints(3)]),
    Case("Mod", [IMAGE, np.float32(0.7)], {"fmod": 1}),
    Case("Pow", [POSITIVE, np.float32(1.5)]),
    Case("Pow", [IMAGE, ints(2)], note="integer exponent"),
    Case("Where", [IMAGE > 0, random(2, 4, 1, 6), random(1, seed=3)]),
    Case("LeakyRelu", [IMAGE], {"alpha": 0.3}),
    Case("Elu", [IMAGE], {"alpha": 0.5}),
    Case("Celu", [IMAGE], {"alpha": 0.5}),
    Case("Selu", [IMAGE], {"alpha": 1.5, "gamma": 1.2}),
    Case("HardSigmoid", [IMAGE], {"alpha": 1 / 6, "beta": 0.4}),
    Case("Gelu", [IMAGE], opset=20),
    Case("Gelu", [IMAGE], {"approximate": "tanh"}, opset=20),
    Case("Clip", [IMAGE], {"min": -0.2, "max": 0.5}, opset=7),
    Case("Clip", [IMAGE, np.float32(-0.2), np.float32(0.5)]),
    Case("Clip", [IMAGE, None, np.float32(0.5)], note="maximum only"),
    Case("Clip", [IMAGE, np.float32(0.0)], note="minimum only"),
    *(Case(name, [IMAGE], {"axis": axis}) for name in ("Softmax", "LogSoftmax") for axis in (1, -1)),
    *(Case(name, [IMAGE], {}, opset=11) for name in ("Softmax", "LogSoftmax")),
    Case("Softmax", [IMAGE], {"axis": 2}, opset=11),
    # ---- weights
    Case("Conv", [IMAGE, kernel(8, 4, 3, 3), random(8)], {"pads": [1, 1, 1, 1]}),
    Case("Conv", [IMAGE, kernel(8, 4, 3, 2)], {"pads": [0, 1, 2, 0], "strides": [2, 1]}),
    Case("Conv", [IMAGE, kernel(8, 1, 3, 3), random(8)], {"group": 4, "dilations": [2, 1], "pads": [2, 1, 2, 1]}),
    Case("Conv", [IMAGE, kernel(8, 4, 3, 2)], {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    Case("Conv", [IMAGE, kernel(8, 4, 4, 3)], {"auto_pad": "SAME_LOWER", "strides": [2, 1]}),
    Case("Conv", [IMAGE, kernel(8, 4, 3, 3)], {"auto_pad": "VALID"}),
    Case("Conv", [IMAGE[:, :, 0], kernel(6, 2, 3)], {"group": 2, "pads": [2, 0]}, note="1d"),
    Case("ConvTranspose", [IMAGE, kernel(4, 3, 3, 3), random(3)]),
    Case("ConvTranspose", [IMAGE, kernel(4, 3, 3, 3)], {"strides": [2, 2], "pads": [1, 0, 1, 1]}),
    Case("ConvTranspose", [IMAGE, kernel(4, 3, 3, 3), random(3)], {"strides": [2, 3], "output_padding": [1, 2]}),
    Case("ConvTranspose", [IMAGE, kernel(4, 2, 3, 3)], {"group": 2, "dilations": [2, 1]}),
    Case("ConvTranspose", [IMAGE, kernel(4, 3, 3, 3)], {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    Case("ConvTranspose", [IMAGE, kernel(4, 3, 3, 3)], {"strides": [2, 2], "output_shape": [14, 12]}),
    Case("Gemm", [random(3, 4), kernel(4, 5), random(5)]),
    Case("Gemm", [random(4, 3), kernel(5, 4), random(3, 1)], {"transA": 1, "transB": 1, "alpha": 0.5, "beta": 2.0}),
    Case("Gemm", [random(3, 4), kernel(4, 5)], note="no bias"),
    Case("MatMul", [IMAGE, kernel(6, 5)]),
    Case("MatMul", [IMAGE, kernel(6)], note="vector"),
    Case("Einsum", [random(2, 3, 4), kernel(2, 5, 4)], {"equation": "bij, bkj -> bik"}),
    Case("Attention", [random(2, 3, 5, 4), random(2, 3, 6, 4), random(2, 3, 6, 4)], opset=23, reference=True),
    Case(
        "Attention",
        [random(2, 5, 12), random(2, 6, 6), random(2, 6, 6), random(5, 6)],
        {"q_num_heads": 4, "kv_num_heads": 2, "scale": 0.3},
        opset=23,
        reference=True,
        note="grouped",
    ),
    Case("Attention", [random(2, 3, 5, 4), random(2, 3, 5, 4), random(2, 3, 5, 4)], {"is_causal": 1}, opset=23, reference=True),
    # ---- normalisation
    Case("BatchNormalization", [IMAGE, random(4), random(4), random(4), np.abs(random(4)) + 0.5], {"epsilon": 1e-3}),
    Case("InstanceNormalization", [IMAGE, random(4), random(4)], {"epsilon": 1e-3}),
    Case("LayerNormalization", [IMAGE, random(6), random(6)], {"epsilon": 1e-3}),
    Case("LayerNormalization", [IMAGE, random(4, 7, 6)], {"axis": 1}),
    Case("GroupNormalization", [IMAGE, random(2), random(2)], {"num_groups": 2}, reference=True),
    Case("GroupNormalization", [IMAGE, random(4), random(4)], {"num_groups": 2, "epsilon": 1e-2}, opset=21),
    Case("RMSNormalization", [IMAGE, random(6)], {"epsilon": 1e-3}, opset=23, reference=True),
    Case("LRN", [IMAGE], {"size": 3, "alpha": 0.2, "beta": 0.6, "bias": 1.5}),
    Case("LRN", [random(2, 9, 3, 3)], {"size": 5}),
    # ---- pooling and reductions
    Case("MaxPool", [IMAGE], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    Case("MaxPool", [IMAGE], {"kernel_shape": [2, 3], "strides": [2, 2], "pads": [0, 1, 1, 0]}),
    Case("MaxPool", [IMAGE], {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}),
    Case("MaxPool", [IMAGE], {"kernel_shape": [3, 3], "strides": [3, 3], "pads": [1, 1, 1, 1], "ceil_mode": 1}),
    Case("MaxPool", [IMAGE], {"kernel_shape": [3, 2], "dilations": [2, 1]}),
    Case("MaxPool", [IMAGE], {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    Case("MaxPool", [IMAGE], {"kernel_shape": [2, 2], "auto_pad": "SAME_LOWER"}),
    Case("MaxPool", [IMAGE[:, :, 0]], {"kernel_shape": [2], "strides": [2]}, note="1d"),
    Case("AveragePool", [IMAGE], {"kernel_shape": [3, 2], "strides": [2, 1]}),
    Case("AveragePool", [IMAGE], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
    Case("AveragePool", [IMAGE], {"kernel_shape": [3, 3], "pads": [1, 0, 1, 1], "count_include_pad": 1}),
    Case("AveragePool", [IMAGE], {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}),
    Case(
        "AveragePool",
        [IMAGE],
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "ceil_mode": 1, "count_include_pad": 1},
    ),
    Case("AveragePool", [IMAGE], {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    Case("AveragePool", [IMAGE], {"kernel_shape": [2, 2], "dilations": [2, 3], "pads": [1, 0, 0, 1]}, opset=19),
    *(
        Case(name, [IMAGE], {"axes": [2, 3], "keepdims": keep}, opset=11)
        for name in ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2")
        for keep in (0, 1)
    ),
    *(
        Case(name, [IMAGE, ints(-1, 1)], {"keepdims": 0})
        for name in ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSumSquare")
    ),
    Case("ReduceLogSumExp", [IMAGE, ints(1)]),
    Case("ReduceMean", [IMAGE], note="all axes"),
    Case("ReduceSum", [IMAGE, ints()], {"noop_with_empty_axes": 1}),
    Case("ReduceSum", [IMAGE, ints()], note="empty axes"),
    Case("ArgMax", [IMAGE], {"axis": 1, "keepdims": 0}),
    # ---- shapes
    *(Case("Flatten", [IMAGE], {"axis": axis}) for axis in (0, 2, -1)),
    Case("Reshape", [IMAGE, ints(0, -1, 6)]),
    Case("Reshape", [np.zeros((0, 3), np.float32), ints(3, 0)], {"allowzero": 1}),
    Case("Transpose", [IMAGE], {"perm": [0, 2, 3, 1]}),
    Case("Squeeze", [random(1, 3, 1, 2), ints(0, -2)]),
    Case("Squeeze", [random(1, 3, 1, 2)], note="all"),
    Case("Squeeze", [random(1, 3, 1, 2)], {"axes": [2]}, opset=11),
    Case("Unsqueeze", [random(3, 2), ints(-1, 0)]),
    Case("Unsqueeze", [random(3, 2)], {"axes": [0, 3]}, opset=11),
    Case("Concat", [IMAGE, random(2, 1, 7, 6)], {"axis": 1}),
    Case("Slice", [IMAGE, ints(1, -3), ints(9223372036854775807, -1), ints(1, 3)]),
    Case("Slice", [IMAGE, ints(-1, 5), ints(-9223372036854775807, 0), ints(2, 3), ints(-1, -2)], note="backwards"),
    Case("Slice", [IMAGE, ints(0, 1), ints(2, 4)], note="first axes"),
    Case("Slice", [IMAGE, ints(1), ints(100), ints(-1), ints(2)], note="strided"),
    Case("Slice", [IMAGE], {"starts": [1], "ends": [3], "axes": [2]}, opset=9),
    Case("Gather", [IMAGE, np.asarray([[0, -1], [2, 1]], np.int64)], {"axis": 2}),
    Case("Gather", [IMAGE, np.asarray(1, np.int64)], {"axis": 1}, note="scalar"),
    Case("Gather", [ints(5, 6, 7), np.asarray(-1, np.int64)], note="scalar from vector"),
    Case("GatherElements", [random(3, 4), np.asarray([[0, -1], [2, 1]], np.int64)], {"axis": 1}),
    Case("GatherND", [IMAGE, np.asarray([[0, -1], [1, 2]], np.int64)]),
    Case("ScatterND", [random(4, 3), np.asarray([[0], [-1]], np.int64), random(2, 3, seed=1)]),
    Case("ScatterND", [random(4, 3), np.asarray([[0], [0]], np.int64), random(2, 3, seed=1)], {"reduction": "add"}),
    Case("Split", [IMAGE], {"axis": 1, "split": [1, 3]}, opset=11, outputs=2),
    Case("Split", [IMAGE, ints(2, 4)], {"axis": 3}, outputs=2),
    Case("Split", [IMAGE], {"axis": 2, "num_outputs": 3}, outputs=3),
    Case("Split", [IMAGE], {"axis": 1}, opset=13, outputs=2),
    Case("Shape", [IMAGE], {"start": 1, "end": -1}),
    Case("ConstantOfShape", [ints(2, 3)], {"value": helper.make_tensor("v", TensorProto.FLOAT, [1], [2.5])}),
    Case("ConstantOfShape", [ints(2)]),
    Case("Range", [np.asarray(1, np.int64), np.asarray(9, np.int64), np.asarray(3, np.int64)]),
    Case("Expand", [random(2, 1, 6), ints(4, 1, 7, 1)]),
    Case("Tile", [random(2, 3), ints(2, 3)]),
    Case("Cast", [IMAGE], {"to": TensorProto.INT64}),
    Case("CastLike", [IMAGE, ints(1)], reference=True),
    Case("DepthToSpace", [random(2, 8, 2, 3)], {"blocksize": 2}),
    Case("DepthToSpace", [random(2, 8, 2, 3)], {"blocksize": 2, "mode": "CRD"}),
    Case("SpaceToDepth", [random(2, 3, 4, 6)], {"blocksize": 2}),
    Case("Pad", [IMAGE, ints(0, 1, 2, 0, 0, 0, 1, 3), np.float32(0.7)]),
    Case("Pad", [IMAGE, ints(0, 0, -1, 0, 0, 0, 2, -2)], note="cropping"),
    Case("Pad", [IMAGE, ints(0, 0, 2, 1, 0, 0, 3, 4)], {"mode": "reflect"}),
    Case("Pad", [IMAGE, ints(0, 1, 2, 1, 0, 0, 3, 4)], {"mode": "edge"}),
    Case("Pad", [IMAGE, ints(1, 2), None, ints(3)], note="axes"),
    Case("Pad", [IMAGE], {"pads": [0, 0, 1, 0, 0, 0, 0, 2], "value": 0.3}, opset=9),
]


def resize(scales: Sequence[float] | None, sizes: Sequence[int] | None = None, opset: int = 18, **attributes: Any) -> Case:
    given = None if scales is None else np.asarray(scales, np.float32)
    inputs = [IMAGE, None, given] + ([] if sizes is None else [ints(*sizes)])
    return Case("Resize", inputs, attributes, opset, note=f"{scales}{sizes}")


CASES += [
    resize([1, 1, 2, 2], mode="nearest"),
    resize([1, 1, 2, 3], mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
    resize([1, 1, 0.5, 1.6], mode="nearest", coordinate_transformation_mode="half_pixel", nearest_mode="ceil"),
    resize([1, 1, 2, 0.5], mode="linear"),
    resize([1, 1, 2, 2], mode="linear", coordinate_transformation_mode="asymmetric"),
    resize(None, [2, 4, 13, 4], mode="linear", coordinate_transformation_mode="align_corners"),
    resize(None, [2, 4, 1, 9], mode="linear", coordinate_transformation_mode="pytorch_half_pixel"),
    Case("Resize", [IMAGE, np.asarray([1, 1, 2, 2], np.float32)], {"mode": "nearest"}, opset=10),
    Case("Upsample", [IMAGE, np.asarray([1, 1, 2, 3], np.float32)], {"mode": "nearest"}, opset=9),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_operator_agrees_with_an_independent_implementation(case: Case) -> None:
    model = case.model()
    x = np.asarray(case.inputs[0])
    expected = ReferenceEvaluator(model).run(None, {"i0": x}) if case.reference else run_onnx(model, x)
    with torch.no_grad():
        found = OnnxModule(model, [f"o{index}" for index in range(case.outputs)])(torch.from_numpy(x))
    for value, wanted in zip(found, expected, strict=True):
        assert value.numpy().dtype == wanted.dtype
        np.testing.assert_allclose(value.numpy(), wanted, rtol=2e-5, atol=2e-5)


def test_unsupported_operators_are_all_named_at_once() -> None:
    nodes = [
        helper.make_node("NonMaxSuppression", ["x", "x"], ["a"]),
        helper.make_node("FancyThing", ["a"], ["b"], domain="example.org"),
        helper.make_node("Resize", ["b", "", "b"], ["y"], mode="cubic"),
    ]
    source = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])
    model = helper.make_model(helper.make_graph(nodes, "g", [source], [source]))
    with pytest.raises(InapplicableError, match=r"NonMaxSuppression, Resize with mode cubic, example.org.FancyThing"):
        OnnxModule(model, ["y"])


def test_operators_that_the_outputs_do_not_need_are_not_held_against_the_model() -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("NonZero", ["y"], ["z"])]
    source = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])
    model = helper.make_model(helper.make_graph(nodes, "g", [source], [source]))
    (y,) = OnnxModule(model, ["y"])(torch.tensor([[-1.0, 2.0]]))
    assert y.tolist() == [[0.0, 2.0]]


def test_a_second_output_that_is_not_computed_is_refused_only_when_it_is_read() -> None:
    pool = helper.make_node("MaxPool", ["x"], ["y", "where"], kernel_shape=[2, 2])
    read = helper.make_node("Shape", ["where"], ["z"])
    source = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 4, 4])
    model = helper.make_model(helper.make_graph([pool, read], "g", [source], [source]))
    assert OnnxModule(model, ["y"])(torch.zeros(1, 1, 4, 4))[0].shape == (1, 1, 3, 3)
    with pytest.raises(InapplicableError, match="MaxPool with a second output"):
        OnnxModule(model, ["z"])


def test_an_output_that_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match="'nowhere'"):
        OnnxModule(Case("Relu", [IMAGE]).model(), ["nowhere"])


# ------------------------------------------------------------------------------------------------------ whole networks


class PlainNet(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 12, 3, stride=2, padding=1),
            nn.BatchNorm2d(12),
            nn.LeakyReLU(0.1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(12, 5),
        )


class ResidualBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.second(self.first(x)))


class ResidualNet(nn.Sequential):
    def __init__(self) -> None:
        stem = (nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        head = (nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5))
        super().__init__(*stem, ResidualBlock(8), ResidualBlock(8), *head)


class InvertedBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        wide = 2 * channels
        self.layers = nn.Sequential(
            nn.Conv2d(channels, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.Hardswish(),
            nn.Conv2d(wide, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.layers(x)
        return answer


class MobileNet(nn.Sequential):
    def __init__(self) -> None:
        stem = (nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU6())
        super().__init__(*stem, InvertedBlock(8), InvertedBlock(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


class VisionTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.class_token = nn.Parameter(torch.randn(1, 1, 16))
        self.positions = nn.Parameter(torch.randn(1, 17, 16))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 32, activation="gelu", batch_first=True, norm_first=True) for _ in range(2)
        )
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(x.shape[0], -1, -1), tokens], 1) + self.positions
        for block in self.blocks:
            tokens = block(tokens)
        logits: torch.Tensor = self.head(self.norm(tokens)[:, 0])
        return logits


SIZES = {"plain": 16, "residual": 16, "mobile": 16, "transformer": 16, "resnet18": 64, "mobilenet_v2": 32, "squeezenet1_1": 48}


@functools.cache
def network(name: str) -> nn.Module:
    """In evaluation mode, with running statistics that are not their trivial start values."""
    own = {"plain": PlainNet, "residual": ResidualNet, "mobile": MobileNet, "transformer": VisionTransformer}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module: nn.Module = own[name]() if name in own else torchvision.models.get_model(name, weights=None, num_classes=10)
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                assert layer.running_mean is not None
                assert layer.running_var is not None
                layer.running_mean.normal_(0.0, 0.2)
                layer.running_var.uniform_(0.5, 1.5)
    return module.eval()


@functools.cache
def exported(name: str, exporter: str) -> onnx.ModelProto:
    """``exporter``: 'dynamo-18' or 'script-17', with the opset."""
    kind, opset = exporter.split("-")
    example = (torch.rand(2, 3, SIZES[name], SIZES[name]),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "dynamo":
            program = torch.onnx.export(
                network(name),
                example,
                dynamo=True,
                opset_version=int(opset),
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
            assert program is not None
            return program.model_proto
        buffer = io.BytesIO()
        axes = {"image": {0: "batch"}}
        names = {"input_names": ["image"], "output_names": ["logits"], "dynamic_axes": axes}
        torch.onnx.export(network(name), example, buffer, dynamo=False, opset_version=int(opset), **names)
    return onnx.shape_inference.infer_shapes(onnx.load_from_string(buffer.getvalue()))


NETWORKS = [
    ("plain", "dynamo-18"),
    ("plain", "script-11"),
    ("residual", "dynamo-20"),
    ("mobile", "dynamo-20"),
    ("mobile", "script-17"),
    ("transformer", "dynamo-18"),
    ("transformer", "dynamo-23"),
    ("transformer", "script-17"),
    ("resnet18", "dynamo-20"),
    ("resnet18", "script-13"),
    pytest.param("mobilenet_v2", "dynamo-20", marks=pytest.mark.slow),
    ("squeezenet1_1", "script-17"),
]


def pixels(name: str, count: int = 3) -> torch.Tensor:
    return torch.rand(count, 3, SIZES[name], SIZES[name], generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("name", "exporter"), NETWORKS)
def test_logits_and_every_tap_agree_with_onnx_runtime(name: str, exporter: str) -> None:
    model = exported(name, exporter)
    spec = InputSpec(SIZES[name], SIZES[name], 3, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    taps = choose_onnx_taps(model)
    assert len(taps) >= 2
    exposed = expose(model, taps, spec)
    names = [*(tap.name for tap in taps), "logits"]
    with torch.no_grad():
        found = OnnxModule(exposed, names)(pixels(name))
    for output, value, expected in zip(names, found, run_onnx(exposed, pixels(name).numpy()), strict=True):
        assert relative_difference(value.numpy(), expected) < TOLERANCE, output


@pytest.mark.parametrize(("name", "exporter"), NETWORKS)
def test_logits_and_input_gradient_agree_with_the_torch_module(name: str, exporter: str) -> None:
    model = exported(name, exporter)
    converted = OnnxModule(model, [input_and_output(model)[1]])
    answers = []
    for function in (network(name), lambda x: converted(x)[0]):
        x = pixels(name).requires_grad_()
        logits = function(x)
        weights = torch.linspace(-1.0, 1.0, logits.numel()).reshape(logits.shape)
        (gradient,) = torch.autograd.grad((logits * weights).sum(), x)
        answers.append((logits.detach().numpy(), gradient.numpy()))
    (logits, gradient), (found_logits, found_gradient) = answers
    assert relative_difference(found_logits, logits) < TOLERANCE
    assert np.abs(gradient).max() > 0
    assert relative_difference(found_gradient, gradient) < TOLERANCE


def test_weights_are_parameters_and_what_was_not_trained_by_gradient_is_a_buffer() -> None:
    model = copy.deepcopy(Case("BatchNormalization", [IMAGE, *(np.abs(random(4, seed=s)) + 0.5 for s in range(4))]).model())
    module = OnnxModule(model, ["o0"])
    assert sorted(name.split("_", 1)[1] for name, _ in module.named_parameters()) == ["i1", "i2"]
    assert sorted(name.split("_", 1)[1] for name, _ in module.named_buffers()) == ["i3", "i4"]
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_a_mask_of_infinity_is_no_parameter() -> None:
    """Noise in proportion to it, or a step of training, would make it NaN."""
    mask = np.where(np.arange(IMAGE.shape[-1]) < 2, 0.0, -np.inf).astype(np.float32)
    module = OnnxModule(copy.deepcopy(Case("Add", [IMAGE, mask]).model()), ["o0"])
    assert [name.split("_", 1)[1] for name, _ in module.named_buffers()] == ["i1"]
    assert not list(module.parameters())


def test_normalisation_of_the_image_is_no_parameter() -> None:
    model = exported("plain", "dynamo-18")
    exposed = expose(model, (), InputSpec(16, 16, 3, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)))
    trained = OnnxModule(model, [input_and_output(model)[1]])
    assert len(list(OnnxModule(exposed, ["logits"]).parameters())) == len(list(trained.parameters()))


def test_a_copy_can_be_fine_tuned_and_leaves_the_original_alone() -> None:
    model = exported("plain", "dynamo-18")
    original = OnnxModule(model, [input_and_output(model)[1]])
    tuned = copy.deepcopy(original).train()
    with torch.no_grad():
        before = original(pixels("plain"))[0]
    optimiser = torch.optim.SGD(tuned.parameters(), lr=0.3)
    target = torch.tensor([0, 1, 2])
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(tuned(pixels("plain"))[0], target)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    with torch.no_grad():
        assert torch.equal(original(pixels("plain"))[0], before)


def test_an_error_names_the_node() -> None:
    module = OnnxModule(Case("Conv", [IMAGE, kernel(8, 4, 3, 3)]).model(), ["o0"])
    with pytest.raises(RuntimeError) as caught:
        module(torch.zeros(1, 3, 7, 6))
    assert any("(Conv)" in note for note in caught.value.__notes__)
