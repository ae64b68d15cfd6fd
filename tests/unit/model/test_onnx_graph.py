"""Reading ONNX models, choosing their taps and rewriting them to take pixels."""

from __future__ import annotations

import functools
import io
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torchvision
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import nn

from audit_plugin.errors import IntakeError, SubjectError
from audit_plugin.model.onnx_graph import (
    choose_onnx_taps,
    declared_input_shape,
    expose,
    input_and_output,
    read_model,
    without_softmax,
)
from audit_plugin.model.taps import Tap
from audit_plugin.model.torch_graph import choose_graph_taps, plain_graph
from audit_plugin.types import InputSpec

# The same kernels run on both sides; only folding the normalisation into one product and one sum rounds differently.
TOLERANCE = 1e-5


def run_onnx(model: ModelProto, x: np.ndarray) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {session.get_inputs()[0].name: x}), strict=True))


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float = TOLERANCE) -> None:
    assert found.shape == expected.shape
    assert float(np.abs(found - expected).max()) <= tolerance * float(np.abs(expected).max())


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def uniform(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).uniform(size=shape).astype(np.float32)


def model_of(
    nodes: list[onnx.NodeProto],
    stored: dict[str, np.ndarray],
    shape: list[int | str],
    source: str = "x",
    output: str = "y",
    element: int = TensorProto.FLOAT,
    opset: int = 17,
) -> ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(source, element, shape)],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", 5])],
        [numpy_helper.from_array(value, name) for name, value in stored.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model)
    return onnx.shape_inference.infer_shapes(model)


WEIGHTS = {"w1": random(8, 3, 3, 3), "b1": random(8), "w2": random(8, 5, seed=1), "b2": random(5)}


def small_net(source: str = "x", output: str = "y", batch: int | str = "batch", first: str = "conv") -> ModelProto:
    """Convolution, activation, pooling, linear layer; ``first`` names the convolution's value."""
    nodes = [
        helper.make_node("Conv", [source, "w1", "b1"], [first], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", [first], ["relu"]),
        helper.make_node("GlobalAveragePool", ["relu"], ["pool"]),
        helper.make_node("Flatten", ["pool"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w2"], ["product"]),
        helper.make_node("Add", ["product", "b2"], [output]),
    ]
    return model_of(nodes, WEIGHTS, [batch, 3, 8, 8], source, output)


def keras_like_net() -> ModelProto:
    """Channels last outside and first inside, names with slashes and colons, an Identity at the end, as tf2onnx writes."""
    prefix = "StatefulPartitionedCall/model/"
    nodes = [
        helper.make_node("Transpose", ["input_1"], [f"{prefix}conv/Conv2D__6:0"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", [f"{prefix}conv/Conv2D__6:0", "w1", "b1"], [f"{prefix}conv/Conv2D:0"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", [f"{prefix}conv/Conv2D:0"], [f"{prefix}conv/Relu:0"]),
        helper.make_node("Transpose", [f"{prefix}conv/Relu:0"], [f"{prefix}conv/last:0"], perm=[0, 2, 3, 1]),
        helper.make_node("ReduceMean", [f"{prefix}conv/last:0"], [f"{prefix}pool/Mean:0"], axes=[1, 2], keepdims=0),
        helper.make_node("MatMul", [f"{prefix}pool/Mean:0", "w2"], [f"{prefix}dense/MatMul:0"]),
        helper.make_node("Add", [f"{prefix}dense/MatMul:0", "b2"], [f"{prefix}dense/BiasAdd:0"]),
        helper.make_node("Identity", [f"{prefix}dense/BiasAdd:0"], ["dense"]),
    ]
    return model_of(nodes, WEIGHTS, ["unk__7", 8, 8, 3], "input_1", "dense", opset=13)


@functools.cache
def resnet() -> tuple[nn.Module, torch.export.ExportedProgram]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = torchvision.models.resnet18(num_classes=5).eval()
    program = torch.export.export(module, (torch.rand(2, 3, 32, 32),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    return module, program


@functools.cache
def exported_resnet(exporter: str) -> ModelProto:
    module, program = resnet()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if exporter == "dynamo":
            exported = torch.onnx.export(program, dynamo=True, verbose=False)
            assert exported is not None
            return exported.model_proto
        buffer = io.BytesIO()
        axes = {"image": {0: "batch"}}
        example = (torch.rand(2, 3, 32, 32),)
        torch.onnx.export(module, example, buffer, dynamo=False, input_names=["image"], dynamic_axes=axes)
        return onnx.load_from_string(buffer.getvalue())


# ------------------------------------------------------------------------------------------------------------- taps


@pytest.mark.parametrize("exporter", ["dynamo", "script"])
def test_resnet18_has_the_stem_and_eight_blocks_as_its_torch_graph_has(exporter: str) -> None:
    taps = choose_onnx_taps(exported_resnet(exporter))
    assert len(taps) == len(choose_graph_taps(plain_graph(resnet()[1]))) == 9
    producers = {node.output[0]: node.op_type for node in exported_resnet(exporter).graph.node}
    assert {producers[tap.node] for tap in taps} == {"Relu"}


def test_module_names_become_labels() -> None:
    names = [tap.name for tap in choose_onnx_taps(exported_resnet("dynamo"))]
    assert names[1] == "tap_02_layer1.0"
    assert names[-1] == "tap_09_layer4.1"


@pytest.mark.parametrize("text", ["[" * 5000, "__import__('os').abort()", "{1: 2}", "['', 1]", "'" * 20_000])
def test_damaged_module_names_are_ignored(text: str) -> None:
    model = ModelProto()
    model.CopyFrom(exported_resnet("dynamo"))
    for node in model.graph.node:
        for entry in node.metadata_props:
            if entry.key.startswith("pkg.torch.onnx"):
                entry.value = text
    assert [tap.node for tap in choose_onnx_taps(model)] == [tap.node for tap in choose_onnx_taps(exported_resnet("dynamo"))]


def test_tap_names_hold_no_special_characters() -> None:
    assert choose_onnx_taps(keras_like_net()) == (
        Tap("StatefulPartitionedCall/model/conv/Relu:0", "tap_01_StatefulPartitionedCall_model_conv_Conv2D_0"),
    )


@pytest.mark.parametrize(
    ("operator", "attributes"), [("Identity", {}), ("Flatten", {}), ("Cast", {"to": TensorProto.FLOAT}), ("Dropout", {})]
)
def test_logits_that_are_only_reshaped_or_renamed_are_not_tapped(operator: str, attributes: dict[str, int]) -> None:
    nodes = [*small_net(output="scores").graph.node, helper.make_node(operator, ["scores"], ["y"], **attributes)]
    assert [tap.node for tap in choose_onnx_taps(model_of(nodes, WEIGHTS, ["batch", 3, 8, 8]))] == ["relu"]


def test_sizes_read_off_the_input_do_not_count_as_paths() -> None:
    nodes = [
        *small_net().graph.node[:3],
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["count"]),
        helper.make_node("Concat", ["count", "rest"], ["wanted"], axis=0),
        helper.make_node("Reshape", ["pool", "wanted"], ["flat"]),
        *small_net().graph.node[4:],
    ]
    stored = WEIGHTS | {"zero": np.asarray([0], np.int64), "rest": np.asarray([8], np.int64)}
    model = model_of(nodes, stored, ["batch", 3, 8, 8])
    taps = choose_onnx_taps(model)
    assert [tap.node for tap in taps] == ["relu"]
    assert run_onnx(expose(model, taps, InputSpec(8, 8, 3)), uniform(4, 3, 8, 8))["logits"].shape == (4, 5)


def test_a_node_of_which_two_outputs_are_read_is_no_tap() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["conv"], pads=[1, 1, 1, 1]),
        helper.make_node("Split", ["conv"], ["left", "right"], axis=1),
        helper.make_node("Conv", ["left", "w3"], ["left_conv"]),
        helper.make_node("Conv", ["right", "w3"], ["right_conv"]),
        helper.make_node("Concat", ["right_conv", "left_conv"], ["both"], axis=1),
        *small_net(first="both").graph.node[1:],
    ]
    model = model_of(nodes, WEIGHTS | {"w3": random(4, 4, 1, 1)}, ["batch", 3, 8, 8], opset=13)
    assert [tap.node for tap in choose_onnx_taps(model)] == ["conv", "relu"]


def branching_net() -> ModelProto:
    """A condition whose branches read ``logits``, a value of the outer graph."""

    def branch(name: str, operator: str) -> onnx.GraphProto:
        result = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        return helper.make_graph([helper.make_node(operator, ["logits"], [name])], name, [], [result])

    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["logits"], pads=[1, 1, 1, 1]),
        helper.make_node("If", ["yes"], ["relu"], then_branch=branch("a", "Relu"), else_branch=branch("b", "Tanh")),
        *small_net().graph.node[2:],
    ]
    return model_of(nodes, WEIGHTS | {"yes": np.asarray(True)}, ["batch", 3, 8, 8])


def test_values_that_a_branch_reads_from_outside_count_as_read_and_are_renamed_with_the_rest() -> None:
    model = branching_net()
    taps = choose_onnx_taps(model)
    assert [tap.node for tap in taps] == ["logits"]  # the convolution: the value of a branch is opaque
    found = run_onnx(expose(model, taps, InputSpec(8, 8, 3)), uniform(2, 3, 8, 8))
    assert_close(found["logits"], run_onnx(model, uniform(2, 3, 8, 8))["y"])
    assert found[taps[0].name].shape == (2, 8, 8, 8)


# ----------------------------------------------------------------------------------------------------------- reading


def test_shape_input_and_output_are_read() -> None:
    assert declared_input_shape(small_net()) == (-1, 3, 8, 8)
    assert declared_input_shape(small_net(batch=4)) == (4, 3, 8, 8)
    assert declared_input_shape(keras_like_net()) == (-1, 8, 8, 3)
    assert input_and_output(small_net("image", "scores")) == ("image", "scores")


def test_initialisers_listed_as_inputs_are_no_inputs() -> None:
    model = small_net()
    model.graph.input.append(helper.make_tensor_value_info("w1", TensorProto.FLOAT, [8, 3, 3, 3]))
    assert input_and_output(model) == ("x", "y")
    exposed = expose(model, (), InputSpec(8, 8, 3))
    assert [value.name for value in exposed.graph.input] == ["pixels"]


def test_several_inputs_or_outputs_are_refused_by_name() -> None:
    model = small_net()
    model.graph.output.append(helper.make_tensor_value_info("relu", TensorProto.FLOAT, ["batch", 8, 8, 8]))
    with pytest.raises(SubjectError, match=r"2 outputs \(y, relu\)"):
        choose_onnx_taps(model)
    model.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["batch"]))
    with pytest.raises(SubjectError, match=r"2 inputs \(x, mask\)"):
        input_and_output(model)


def test_an_output_that_ignores_the_image_is_refused() -> None:
    nodes = [helper.make_node("Identity", ["constant"], ["y"])]
    with pytest.raises(SubjectError, match="does not depend on the input"):
        choose_onnx_taps(model_of(nodes, {"constant": random(1, 5)}, ["batch", 3, 8, 8]))


def test_a_saved_model_is_read_with_its_external_weights(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(small_net(), path, save_as_external_data=True, location="model.data", size_threshold=0)
    model = read_model(path)
    (tmp_path / "model.data").unlink()
    assert_close(run_onnx(model, random(2, 3, 8, 8))["y"], run_onnx(small_net(), random(2, 3, 8, 8))["y"])


def test_local_functions_are_inlined(tmp_path: Path) -> None:
    opsets = [helper.make_opsetid("", 17)]
    body = [helper.make_node("Sigmoid", ["a"], ["gate"]), helper.make_node("Mul", ["a", "gate"], ["b"])]
    swish = helper.make_function("own", "Swish", ["a"], ["b"], body, opsets)
    nodes = list(small_net().graph.node)
    nodes[1] = helper.make_node("Swish", ["conv"], ["relu"], domain="own")
    graph = helper.make_graph(
        nodes, "g", small_net().graph.input, small_net().graph.output, initializer=small_net().graph.initializer
    )
    model = helper.make_model(graph, functions=[swish], opset_imports=[*opsets, helper.make_opsetid("own", 1)], ir_version=8)
    onnx.save(model, tmp_path / "model.onnx")
    found = read_model(tmp_path / "model.onnx")
    assert not found.functions
    assert "Sigmoid" in {node.op_type for node in found.graph.node}


@pytest.mark.parametrize("content", [b"", b"not an ONNX file", b"\x80\x04K\x01."])
def test_a_file_that_is_no_model_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(IntakeError, match=r"^'model\.onnx' is no valid ONNX model: [^\n]*$"):
        read_model(path)


def test_an_ancient_opset_is_refused(tmp_path: Path) -> None:
    source = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [source], [result])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 6)], ir_version=4), tmp_path / "old.onnx")
    with pytest.raises(IntakeError, match="opset 6, at least 7"):
        read_model(tmp_path / "old.onnx")


# --------------------------------------------------------------------------------------------------------- rewriting

SPECS = [
    InputSpec(8, 8, 3),
    InputSpec(8, 8, 3, low=-1.0, high=1.0),
    InputSpec(8, 8, 3, low=0.0, high=255.0, mean=(120.0, 115.0, 105.0), std=(60.0, 61.0, 62.0)),
    InputSpec(8, 8, 3, mean=(0.5,), std=(0.25,)),
]


@pytest.mark.parametrize("spec", SPECS, ids=["identity", "signed", "bytes", "one-value"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_logits_are_those_of_the_normalised_image(spec: InputSpec, layout: str) -> None:
    channels_last = layout == "NHWC"
    model = keras_like_net() if channels_last else small_net()
    spec = InputSpec(8, 8, 3, "NHWC" if channels_last else "NCHW", spec.low, spec.high, spec.mean, spec.std)
    pixels = uniform(4, 3, 8, 8)
    mean, std = (np.asarray(values, np.float64).reshape(1, -1, 1, 1) for values in (spec.mean, spec.std))
    prepared = ((spec.low + pixels * (spec.high - spec.low) - mean) / std).astype(np.float32)
    if channels_last:
        prepared = prepared.transpose(0, 2, 3, 1)
    (expected,) = run_onnx(model, prepared).values()
    assert_close(run_onnx(expose(model, choose_onnx_taps(model), spec), pixels)["logits"], expected)


def test_taps_come_first_and_hold_the_value_of_their_node() -> None:
    model = small_net()
    exposed = expose(model, choose_onnx_taps(model), InputSpec(8, 8, 3))
    assert [value.name for value in exposed.graph.output] == ["tap_01_conv", "logits"]
    pixels = uniform(2, 3, 8, 8)
    inner = small_net()
    inner.graph.output.append(helper.make_tensor_value_info("relu", TensorProto.FLOAT, ["batch", 8, 8, 8]))
    np.testing.assert_array_equal(run_onnx(exposed, pixels)["tap_01_conv"], run_onnx(inner, pixels)["relu"])


def test_names_of_the_model_that_stand_in_the_way_are_changed() -> None:
    model = small_net(source="pixels", output="logits", first="tap_01_conv")
    taps = (Tap("relu", "tap_01_conv"), Tap("tap_01_conv", "relu"))
    exposed = expose(model, taps, InputSpec(8, 8, 3, mean=(0.5,)))
    pixels = uniform(2, 3, 8, 8)
    found = run_onnx(exposed, pixels)
    assert list(found) == ["tap_01_conv", "relu", "logits"]
    assert found["relu"].min() < 0  # what is now called relu is the convolution, and the other way round
    np.testing.assert_array_equal(found["tap_01_conv"], np.maximum(found["relu"], 0))
    assert_close(found["logits"], run_onnx(model, pixels - np.float32(0.5))["logits"])


def test_the_original_is_left_alone() -> None:
    model = small_net(source="pixels", output="logits")
    before = model.SerializeToString(deterministic=True)
    expose(model, choose_onnx_taps(model), InputSpec(8, 8, 3, mean=(0.5,)))
    assert model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize(("declared", "expected"), [(4, 4), ("batch", "batch"), (0, "batch")])
def test_a_fixed_batch_size_stays_fixed(declared: int | str, expected: int | str) -> None:
    exposed = expose(small_net(batch=declared), (), InputSpec(8, 8, 3))
    size = exposed.graph.input[0].type.tensor_type.shape.dim[0]
    assert (size.dim_value or size.dim_param) == expected


def test_a_model_that_takes_bytes_gets_them_rounded() -> None:
    cast = helper.make_node("Cast", ["x"], ["image"], to=TensorProto.FLOAT)
    nodes = [cast, *small_net(source="image").graph.node]
    model = model_of(nodes, WEIGHTS, ["batch", 3, 8, 8], element=TensorProto.UINT8)
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8), dtype=np.uint8)
    exposed = expose(model, choose_onnx_taps(model), InputSpec(8, 8, 3, high=255.0))
    found = run_onnx(exposed, images.astype(np.float32) / np.float32(255.0))
    assert_close(found["logits"], run_onnx(model, images)["y"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (InputSpec(9, 8, 3), r"\(-1, 3, 8, 8\), which does not fit images of 3 x 9 x 8"),
        (InputSpec(8, 8, 1), "1 x 8 x 8"),
        (InputSpec(8, 8, 3, "NHWC"), "layout NHWC"),
        (InputSpec(8, 8, 3, mean=(0.1, 0.2)), "Expected 1 or 3 values of mean, got 2"),
    ],
)
def test_a_specification_that_does_not_fit_is_refused(spec: InputSpec, message: str) -> None:
    with pytest.raises(SubjectError, match=message):
        expose(small_net(), (), spec)


def test_a_tap_that_does_not_exist_is_refused() -> None:
    with pytest.raises(SubjectError, match="no value named 'nowhere'"):
        expose(small_net(), (Tap("nowhere", "tap_01"),), InputSpec(8, 8, 3))


class _Images:
    """The calibration images that ONNX Runtime's quantiser asks for, one batch."""

    def __init__(self) -> None:
        self._batches = iter([{"x": uniform(16, 3, 8, 8)}])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._batches, None)


@pytest.mark.parametrize("form", ["QOperator", "QDQ"])
def test_a_quantised_model_is_tapped_on_its_real_scale(tmp_path: Path, form: str) -> None:
    quantization = pytest.importorskip("onnxruntime.quantization")
    onnx.save(small_net(), tmp_path / "float.onnx")
    quantization.quantize_static(
        tmp_path / "float.onnx", tmp_path / "bytes.onnx", _Images(), quant_format=quantization.QuantFormat[form]
    )
    model = read_model(tmp_path / "bytes.onnx")
    taps = choose_onnx_taps(model)
    exposed = expose(model, taps, InputSpec(8, 8, 3))
    pixels = uniform(4, 3, 8, 8)
    found = run_onnx(exposed, pixels)
    (logits,) = run_onnx(model, pixels).values()
    np.testing.assert_array_equal(found["logits"], logits)
    inner = small_net()
    inner.graph.output.append(helper.make_tensor_value_info("relu", TensorProto.FLOAT, ["batch", 8, 8, 8]))
    # Eight bits over the range of the calibration images: steps of 1/255 of the largest value, in weights and images.
    assert len(taps) == 1
    assert_close(found[taps[0].name], run_onnx(inner, pixels)["relu"], tolerance=0.03)


# ------------------------------------------------------------------------------------------------------- a last softmax


def ending_in(*nodes: onnx.NodeProto, opset: int = 17) -> ModelProto:
    """:func:`small_net` with nodes that read its logits, ``z``."""
    model = small_net(output="z")
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    stored["shape"] = np.array([-1, 5], np.int64)
    return model_of([*model.graph.node, *nodes], stored, ["batch", 3, 8, 8], opset=opset)


@pytest.mark.parametrize("opset", [9, 17])
@pytest.mark.parametrize("after", [(), ("Identity",), ("Reshape", "Identity")])
def test_without_its_last_softmax_a_model_answers_with_what_that_is_taken_of(after: tuple[str, ...], opset: int) -> None:
    names = ["p", *(f"p{place}" for place in range(1, len(after))), "y"] if after else ["y"]
    nodes = [helper.make_node("Softmax", ["z"], names[:1], axis=1)]
    for place, operator in enumerate(after):
        extra = ["shape"] if operator == "Reshape" else []
        nodes.append(helper.make_node(operator, [names[place], *extra], [names[place + 1]]))
    model = ending_in(*nodes, opset=opset)
    before, pixels = model.SerializeToString(), random(4, 3, 8, 8)
    plain = without_softmax(model)
    assert plain is not None
    assert_close(run_onnx(plain, pixels)["y"], run_onnx(small_net(), pixels)["y"])
    assert model.SerializeToString() == before


@pytest.mark.parametrize(
    "nodes",
    [
        [helper.make_node("Identity", ["z"], ["y"])],
        [helper.make_node("Softmax", ["z"], ["p"]), helper.make_node("Add", ["p", "p"], ["y"])],
        [helper.make_node("LogSoftmax", ["z"], ["l"]), helper.make_node("Exp", ["l"], ["y"])],
    ],
    ids=["none", "read twice", "another form"],
)
def test_an_answer_that_is_no_softmax_is_left_as_it_is(nodes: list[onnx.NodeProto]) -> None:
    assert without_softmax(ending_in(*nodes)) is None
