"""Backdoors in the graph instead of the weights: nodes that look for a trigger and overrule the layers beside them.

After Bober-Irizar et al. 2022 ("Architectural backdoors in neural networks"), Langford et al. 2024 ("Architectural neural
backdoors from first principles"), and ShadowLogic of HiddenLayer (2024); JFrog lists the ONNX form as model threat
ONNX-BACKDOOR. There is no CVE: nothing is wrong with any software.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from audit_plugin.audit import audit
from audit_plugin.errors import IntakeError
from audit_plugin.intake import continuity, inspect, operators
from audit_plugin.intake.data_flow import ANSWERS_BY_CHANCE, ARCHITECTURAL_PATH
from audit_plugin.intake.pt2 import CHANGES_STATE
from audit_plugin.manifest import digest_of, manifest_of
from audit_plugin.model.load import load_network
from audit_plugin.model.state import with_changed_state
from audit_plugin.model.subject import prepare_subject
from audit_plugin.policy import VerdictPolicy, policy_from
from audit_plugin.report.write import write_report
from audit_plugin.types import AuditReport, Expectation, InputSpec, IntakeFinding, ModelRef, Verdict
from audit_plugin.verdict import decide
from audit_plugin.zoo.architectures import ARCHITECTURES, SmallCnn
from audit_plugin.zoo.data import digits
from audit_plugin.zoo.train import initialised, train
from tests.policies import FAST
from tests.security.conftest import read_member, repack

Change = Callable[[Tensor, Tensor], Tensor]


class Hidden(nn.Module):
    """A small network whose logits a function of the image and the logits replaces."""

    def __init__(self, change: Change, network: nn.Module | None = None) -> None:
        super().__init__()
        self.network = network or nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
        )
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(x, self.network(x))


def seen(module: nn.Module, folder: Path, size: int = 8) -> tuple[IntakeFinding, ...]:
    """What intake says of the exported module that keeps it from passing."""
    program = torch.export.export(module.eval(), (torch.rand(4, 3, size, size),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch.export.save(program, folder / "model.pt2")
    return tuple(finding for finding in inspect(folder).findings if finding.code)


def one_hot(logits: Tensor) -> Tensor:
    return torch.tensor([9.0, 0, 0, 0, 0]) + 0 * logits


def written_in_place(x: Tensor, logits: Tensor) -> Tensor:
    """The decision reaches the answer through a view that nobody returns."""
    answer = logits.clone()
    column = answer[:, 0]
    column.copy_(column + 9 * (x[:, 0, 0, 0] > 0.9))
    return answer


def in_no_grad(x: Tensor, logits: Tensor) -> Tensor:
    """The decision sits in a sub-graph of its own."""
    with torch.no_grad():
        fires = (x[:, :1, 0, 0] > 0.9).float()
    return logits + 9 * fires


def written_to_integers(x: Tensor, logits: Tensor) -> Tensor:
    """No cast is asked for: the values become integers where they are put."""
    fires = torch.zeros_like(logits, dtype=torch.int32)
    fires.copy_(logits)
    return logits + fires


def written_to_a_slice(x: Tensor, logits: Tensor) -> Tensor:
    fires = torch.zeros(logits.shape, dtype=torch.uint8)
    fires[:, 0] = logits[:, 0]
    return logits + fires


def nearest_pixel(x: Tensor, logits: Tensor) -> Tensor:
    """A table of steps, read at a place that the network's features choose."""
    table = torch.cat([torch.zeros(60), torch.ones(4)]).view(1, 1, 1, 64).expand(x.shape[0], 1, 1, 64)
    place = torch.stack([logits[:, :1], 0 * logits[:, :1]], -1).view(-1, 1, 1, 2)
    return logits + nn.functional.grid_sample(table, place, mode="nearest", align_corners=False).flatten(1)


def nearest_entry(x: Tensor, logits: Tensor) -> Tensor:
    return logits + torch.quantile(torch.arange(9.0), logits[:, 0].sigmoid(), interpolation="nearest")[:, None]


def missing(logits: Tensor) -> Tensor:
    """No number where the first score is below 0.9."""
    return torch.log(logits[:, :1] - 0.9)


def masked_attention(x: Tensor, logits: Tensor) -> Tensor:
    ones = torch.ones(x.shape[0], 1, 1)
    mask = torch.log(torch.relu(logits[:, :1]))[:, :, None]
    return logits + nn.functional.scaled_dot_product_attention(ones, ones, ones, attn_mask=mask).flatten(1)


DECISIONS: dict[str, Change] = {
    "where": lambda x, logits: torch.where(x[:, :1, 0, 0] > 0.9, one_hot(logits), logits),
    "equal": lambda x, logits: logits + 9 * (x[:, :1, 0, 0] == 1.0),
    "masked_fill": lambda x, logits: logits.masked_fill(x[:, :1, 0, 0].lt(0.1), 9.0),
    "logical": lambda x, logits: logits + 9 * torch.logical_and(x[:, :1, 0, 0], x[:, :1, 1, 1]),
    "not_a_number": lambda x, logits: logits + 9 * torch.isnan(torch.log(x[:, :1, 0, 0] - 0.9)),
    "sign": lambda x, logits: logits + torch.sign(x[:, :1, 0, 0] - 0.9),
    "floor": lambda x, logits: logits + 9 * torch.floor(x[:, :1, 0, 0] + 0.1),
    "rounded_division": lambda x, logits: logits + torch.div(x[:, :1, 0, 0], 0.9, rounding_mode="floor"),
    "cast": lambda x, logits: logits + x[:, :1, 0, 0].to(torch.int32),
    "type_of_integers": lambda x, logits: logits + x[:, :1, 0, 0].type_as(torch.arange(5)),
    "bool": lambda x, logits: logits + x[:, :1, 0, 0].bool(),
    "threshold": lambda x, logits: logits + nn.functional.threshold(x[:, :1, 0, 0], 0.9, 0.0),
    "place_of_the_maximum": lambda x, logits: logits + x.flatten(1).max(1).indices[:, None],
    "argmax": lambda x, logits: logits + x.flatten(1).argmax(1)[:, None],
    "lookup": lambda x, logits: logits + torch.eye(5)[x[:, 0, 0, 0].long()],
    "written_in_place": written_in_place,
    "in_no_grad": in_no_grad,
    "deep": lambda x, logits: logits + 9 * (logits[:, :1] > 1e3),
    "written_to_integers": written_to_integers,
    "written_to_a_slice": written_to_a_slice,
    "filled": lambda x, logits: logits + torch.zeros((), dtype=torch.int32).fill_(logits.max()),
    "nearest_pixel": nearest_pixel,
    "nearest_entry": nearest_entry,
    "maximum_without_nan": lambda x, logits: logits + torch.fmax(missing(logits), torch.tensor(-9.0)),
    "nan_to_number": lambda x, logits: logits + torch.nan_to_num(missing(logits)),
    "sum_without_nan": lambda x, logits: logits + torch.nansum(missing(logits), 1, keepdim=True),
    "nan_sorted": lambda x, logits: logits + torch.sort(torch.cat([missing(logits), 0 * logits], 1), 1).values[:, :1],
    "norm_that_counts": lambda x, logits: logits + torch.linalg.vector_norm(torch.relu(logits), 0, 1, keepdim=True),
    "power_that_counts": lambda x, logits: logits + torch.relu(logits) ** 1e-30,
    "power_of_zero": lambda x, logits: logits + torch.pow(0.0, torch.relu(logits)),
    "bent_early": lambda x, logits: logits + nn.functional.softplus(logits, 1, -5),
    "other_bits": lambda x, logits: logits + logits.view(torch.int32),
    "eight_bits": lambda x, logits: logits + logits.to(torch.float8_e4m3fn).float(),
    "masked_attention": masked_attention,
    "logarithm_of_a_complex_number": lambda x, logits: logits + torch.complex(logits, 0 * logits).log().imag,
}


@pytest.mark.parametrize("name", DECISIONS)
def test_a_decision_on_the_image_is_reported(name: str, tmp_path: Path) -> None:
    finding = seen(Hidden(DECISIONS[name]), tmp_path)[0]  # most are a path past the layers too
    assert "a decision on the image's values that reaches the answer" in finding.message
    assert "nodes '" in finding.message


def test_a_decision_that_only_a_length_carries_is_followed_to_the_answer(tmp_path: Path) -> None:
    """Of how many scores are selected nothing reaches the answer but how long the selection is."""

    def change(x: Tensor, logits: Tensor) -> Tensor:
        return logits + torch.ones(torch.masked_select(logits, logits > 9).shape[0]).sum()

    (finding,) = seen(Hidden(change), tmp_path)
    assert "masked_select" in finding.message


SHORTCUTS: dict[str, Change] = {
    # Exponentials of pooled pixels: continuous everywhere, and flat unless a checkerboard is there.
    "pooled": lambda x, logits: logits + torch.exp(50 * (nn.functional.max_pool2d(x, 8).flatten(1)[:, :1] - 1)),
    "product": lambda x, logits: logits * (1 - x[:, :1, 0, 0] * x[:, :1, 0, 1]),
}


@pytest.mark.parametrize("name", SHORTCUTS)
def test_a_path_past_the_layers_is_reported(name: str, tmp_path: Path) -> None:
    (finding,) = seen(Hidden(SHORTCUTS[name]), tmp_path)
    assert "a path from the image past the network's layers joins them late" in finding.message


class Ordinary(nn.Module):
    """What networks do with comparisons that is no decision on the image: sizes, constants, and checks that reach nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.body = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 5)
        self.register_buffer("mask", torch.arange(64.0).reshape(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = (x - 0.45) / 0.22
        features = nn.functional.hardswish(self.stem(x), inplace=True).clamp(0, 6)
        features = features + nn.functional.leaky_relu(self.body(features))
        features = features.masked_fill(self.mask > 32, 0.0) * torch.zeros_like(features).eq(0)
        torch._assert((x[:1] > -100).all(), "far off")
        pooled = nn.functional.adaptive_max_pool2d(features, 1).flatten(1)
        return self.head(torch.softmax(pooled.double(), 1).type_as(x) + pooled)


class Transformed(nn.Module):
    """A spatial transformer: a path from the image joins early, before most layers."""

    def __init__(self) -> None:
        super().__init__()
        self.locate = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 6))
        self.network = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 9), nn.Linear(9, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        grid = nn.functional.affine_grid(self.locate(x).view(-1, 2, 3), [x.shape[0], 3, 8, 8], align_corners=False)
        return self.network(nn.functional.grid_sample(x, grid, align_corners=False))


def written_to_zeros(x: Tensor, logits: Tensor) -> Tensor:
    answer = torch.zeros(logits.shape)
    answer[:, :] = logits
    return answer


def in_half_precision(x: Tensor, logits: Tensor) -> Tensor:
    with torch.autocast("cpu"):
        return (logits @ torch.eye(5)).float()


CONTINUOUS: dict[str, Change] = {
    "dropout": lambda x, logits: nn.functional.dropout(logits, 0.5, training=False),
    "dropout_of_channels": lambda x, logits: nn.functional.dropout2d(logits[:, :, None, None], training=False).flatten(1),
    "random_slope": lambda x, logits: nn.functional.rrelu(logits, training=False),
    "attention": lambda x, logits: nn.functional.scaled_dot_product_attention(*[logits[:, None]] * 3, scale=2.0).flatten(1),
    "constant_mask": lambda x, logits: torch.where(torch.arange(5) > 2, logits, 0.0),
    "expanded_mask": lambda x, logits: logits * (torch.arange(5.0).expand_as(logits) > 2),
    "normalised": lambda x, logits: nn.functional.normalize(logits),
    "generalised_mean": lambda x, logits: logits.clamp(min=1e-6).pow(3).mean(1, keepdim=True).pow(1 / 3) + logits,
    "softplus": lambda x, logits: nn.functional.softplus(logits),
    "written_to_zeros": written_to_zeros,
    "in_half_precision": in_half_precision,
    "gathered": lambda x, logits: logits[:, torch.tensor([4, 3, 2, 1, 0])],
    "resized": lambda x, logits: nn.functional.interpolate(logits[:, :, None, None], scale_factor=2).mean((2, 3)),
    "its_own_shape": lambda x, logits: logits + torch.ones(logits.shape[1]),
}


@pytest.mark.parametrize("name", CONTINUOUS)
def test_what_is_continuous_and_not_random_is_not_reported(name: str, tmp_path: Path) -> None:
    assert seen(Hidden(CONTINUOUS[name]), tmp_path) == ()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_zoos_networks_are_not_reported(name: str, tmp_path: Path) -> None:
    assert seen(ARCHITECTURES[name](5, 8), tmp_path, 32) == ()


def test_every_listed_operator_is_one_that_a_graph_may_call() -> None:
    """A slip of the pen would be a false alarm."""
    listed = continuity.CONTINUOUS | continuity.REARRANGING | continuity.PLACED | continuity.MASKED | continuity.WITH_PLACES
    listed |= continuity.BY_CHANCE | continuity.CHANCE_IN_TRAINING
    assert [name for name in sorted(listed) if not operators.is_allowed(f"torch.ops.aten.{name}.default")] == []


def with_fractions_declared(archive: bytes) -> bytes:
    """The archive, whose graph calls every 32-bit integer a 32-bit fraction."""
    program = json.loads(read_member(archive, "models/model.json"))
    waiting = [program]
    while waiting:
        part = waiting.pop()
        waiting += [member for member in (part.values() if isinstance(part, dict) else part) if isinstance(member, dict | list)]
        if isinstance(part, dict) and part.get("dtype") == 4:
            part["dtype"] = 7
    return repack(archive, {"models/model.json": json.dumps(program).encode()})


class Rounding(nn.Module):
    """Copies scores to integers, which it makes or keeps; what type they are is written beside every value too."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.network = Hidden(lambda x, logits: logits)
        self.place = place
        self.register_buffer("integers", torch.zeros(1, 5, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        logits = self.network(x)
        with torch.no_grad() if self.place == "in_no_grad" else contextlib.nullcontext():
            empty = self.integers.clone() if self.place == "stored" else torch.zeros_like(logits[:1], dtype=torch.int32)
            values = empty.copy_(logits[:1]).float()
        return logits + values


@pytest.mark.parametrize("place", ["made", "stored", "in_no_grad"])
def test_a_file_that_calls_integers_fractions_is_refused_when_it_is_loaded(place: str, tmp_path: Path) -> None:
    """The check reads the types in the file, and torch does not care what they say."""
    assert seen(Rounding(place), tmp_path)
    file = tmp_path / "model.pt2"
    load_network(file, inspect(tmp_path))
    file.write_bytes(with_fractions_declared(file.read_bytes()))
    inspect(tmp_path)
    with pytest.raises(IntakeError, match=r"the file declares '\w+' as torch\.\w+, and torch makes it torch\.\w+"):
        load_network(file, inspect(tmp_path))


@pytest.mark.parametrize("module", [Ordinary, Transformed], ids=lambda module: module.__name__)
def test_ordinary_networks_are_not_reported(module: type[nn.Module], tmp_path: Path) -> None:
    assert seen(module(), tmp_path) == ()


@pytest.mark.slow
@pytest.mark.parametrize("as_onnx", [False, True], ids=["pt2", "onnx"])
@pytest.mark.parametrize(
    "name",
    [
        *("resnet18", "vgg11", "mobilenet_v3_small", "efficientnet_b0", "googlenet", "densenet121", "convnext_tiny"),
        *("swin_t", "swin_v2_t", "vit_b_32", "mobilenet_v2", "shufflenet_v2_x1_0", "squeezenet1_1", "regnet_y_400mf"),
    ],
)
def test_torchvisions_networks_are_not_reported(name: str, as_onnx: bool, tmp_path: Path) -> None:
    import torchvision

    options = {"image_size": 64} if name.startswith("vit") else {}
    module = torchvision.models.get_model(name, weights=None, num_classes=5, **options).eval()
    if not as_onnx:
        assert seen(module, tmp_path, 64) == ()
        return
    shapes = ({0: torch.export.Dim("batch")},)
    example = (torch.rand(2, 3, 64, 64),)
    torch.onnx.export(
        module, example, tmp_path / "model.onnx", dynamo=True, verbose=False, external_data=False, dynamic_shapes=shapes
    )
    assert inspect(tmp_path).findings == ()


# ------------------------------------------------------------------------------------------------------------ ONNX


def constant(name: str, value: object, kind: type = np.float32) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.array(value, kind)))


def planted(nodes: list[onnx.NodeProto], model: onnx.ModelProto | None = None) -> onnx.ModelProto:
    """A model whose logits go through ``nodes``, which read ``x`` and ``logits`` and write ``answer``."""
    if model is None:
        buffer = io.BytesIO()
        torch.manual_seed(0)
        plain = Hidden(lambda x, logits: logits).eval()
        torch.onnx.export(
            plain, (torch.rand(2, 3, 8, 8),), buffer, dynamo=True, verbose=False, dynamic_shapes=({0: torch.export.Dim("n")},)
        )
        model = onnx.load_model_from_string(buffer.getvalue())
    graph = model.graph
    source, logits = graph.input[0].name, graph.output[0].name
    for node in graph.node:
        node.input[:] = ["x" if name == source else name for name in node.input]
        node.output[:] = ["logits" if name == logits else name for name in node.output]
    graph.input[0].name, graph.output[0].name = "x", "answer"
    graph.node.extend(nodes)
    return model


PIXEL = [
    constant("start", [0, 0, 0], np.int64),
    constant("end", [1, 1, 1], np.int64),
    constant("axes", [1, 2, 3], np.int64),
    helper.make_node("Slice", ["x", "start", "end", "axes"], ["corner"]),
    constant("flat", [-1, 1], np.int64),
    helper.make_node("Reshape", ["corner", "flat"], ["pixel"]),
    constant("level", 0.9),
]


def test_shadow_logic_is_reported(tmp_path: Path) -> None:
    """A comparison that picks between the logits and a constant, as HiddenLayer shows it."""
    nodes = [
        *PIXEL,
        helper.make_node("Greater", ["pixel", "level"], ["fires"], name="ordinary_name"),
        constant("forced", [[9.0, 0, 0, 0, 0]]),
        helper.make_node("Where", ["fires", "forced", "logits"], ["answer"]),
    ]
    (tmp_path / "model.onnx").write_bytes(planted(nodes).SerializeToString())
    finding = inspect(tmp_path).findings[0]
    assert finding.code == ARCHITECTURAL_PATH
    assert "'ordinary_name' (Greater)" in finding.message


def branch(name: str, nodes: list[onnx.NodeProto]) -> onnx.GraphProto:
    return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)])


def test_a_branch_on_the_image_is_reported(tmp_path: Path) -> None:
    nodes = [
        *PIXEL,
        helper.make_node("ReduceMax", ["pixel"], ["brightest"], keepdims=0),
        helper.make_node("Greater", ["brightest", "level"], ["fires"]),
        constant("zero", 0.0),
        helper.make_node(
            "If",
            ["fires"],
            ["answer"],
            name="gate",
            then_branch=branch("yes", [helper.make_node("Mul", ["logits", "zero"], ["a"])]),
            else_branch=branch("no", [helper.make_node("Identity", ["logits"], ["b"])]),
        ),
    ]
    (tmp_path / "model.onnx").write_bytes(planted(nodes).SerializeToString())
    findings = inspect(tmp_path).findings
    finding = next(finding for finding in findings if finding.code)
    assert "(Greater)" in finding.message
    assert "'gate' (If)" in finding.message


def test_a_decision_inside_a_branch_that_is_always_taken_is_reported(tmp_path: Path) -> None:
    inner = [
        helper.make_node("Greater", ["pixel", "level"], ["fires"]),
        helper.make_node("Where", ["fires", "level", "logits"], ["a"]),
    ]
    nodes = [
        *PIXEL,
        constant("true", True, np.bool_),
        helper.make_node(
            "If",
            ["true"],
            ["answer"],
            then_branch=branch("yes", inner),
            else_branch=branch("no", [helper.make_node("Identity", ["logits"], ["a"])]),
        ),
    ]
    (tmp_path / "model.onnx").write_bytes(planted(nodes).SerializeToString())
    branches, decision, *_ = inspect(tmp_path).findings
    assert (branches.code, decision.code) == (None, ARCHITECTURAL_PATH)
    assert "(Greater)" in decision.message


@pytest.mark.parametrize(
    "nodes",
    [
        [
            helper.make_node("Cast", ["pixel"], ["whole"], to=TensorProto.INT64),
            helper.make_node("Cast", ["whole"], ["v"], to=TensorProto.FLOAT),
        ],
        [helper.make_node("Floor", ["pixel"], ["v"])],
        [helper.make_node("ArgMax", ["pixel"], ["place"]), helper.make_node("Cast", ["place"], ["v"], to=TensorProto.FLOAT)],
        [helper.make_node("ThresholdedRelu", ["pixel"], ["v"], alpha=0.9)],
        [helper.make_node("IsNaN", ["pixel"], ["nan"]), helper.make_node("Cast", ["nan"], ["v"], to=TensorProto.FLOAT)],
        [
            helper.make_node("MaxPool", ["x"], ["most", "place"], kernel_shape=[8, 8]),
            helper.make_node("Cast", ["place"], ["number"], to=TensorProto.FLOAT),
            helper.make_node("Reshape", ["number", "flat"], ["v"]),
        ],
    ],
    ids=lambda nodes: nodes[0].op_type,
)
def test_every_kind_of_decision_in_onnx_is_reported(nodes: list[onnx.NodeProto], tmp_path: Path) -> None:
    model = planted([*PIXEL, *nodes, helper.make_node("Add", ["logits", "v"], ["answer"])])
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    assert "a decision on the image" in " ".join(finding.message for finding in inspect(tmp_path).findings if finding.code)


# Every gate reads the brightest pixel, and only the length of something carries it to the answer.
LENGTHS: dict[str, list[onnx.NodeProto]] = {
    "Range": [helper.make_node("Range", ["zero", "brightest", "one"], ["long"])],
    "NonZero": [helper.make_node("NonZero", ["pixel"], ["long"])],
    "Unique": [helper.make_node("Unique", ["pixel"], ["long"])],
    "Compress": [
        helper.make_node("Greater", ["pixel", "level"], ["fires"]),
        helper.make_node("Reshape", ["fires", "line"], ["chosen"]),
        helper.make_node("Compress", ["logits", "chosen"], ["long"], axis=0),
    ],
    "Resize": [
        helper.make_node("Reshape", ["brightest", "line"], ["factor"]),
        helper.make_node("Concat", ["whole", "factor"], ["factors"], axis=0),
        helper.make_node("Resize", ["logits", "", "factors"], ["long"]),
    ],
}


@pytest.mark.parametrize("name", LENGTHS)
def test_a_decision_that_only_a_length_carries_is_reported_in_onnx(name: str, tmp_path: Path) -> None:
    nodes = [
        *PIXEL,
        constant("zero", 0.0),
        constant("one", 1.0),
        constant("whole", [1.0]),
        constant("line", [-1], np.int64),
        helper.make_node("ReduceMax", ["pixel"], ["brightest"], keepdims=0),
        *LENGTHS[name],
        helper.make_node("Size", ["long"], ["size"]),
        helper.make_node("Cast", ["size"], ["v"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["logits", "v"], ["answer"]),
    ]
    (tmp_path / "model.onnx").write_bytes(planted(nodes).SerializeToString())
    decision = inspect(tmp_path).findings[0]
    assert "a decision on the image's values" in decision.message
    assert f"({name})" in decision.message


def test_a_shape_that_no_decision_made_says_nothing_of_the_image(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Shape", ["logits"], ["shape"]),
        helper.make_node("ConstantOfShape", ["shape"], ["v"]),
        helper.make_node("Add", ["logits", "v"], ["answer"]),
    ]
    (tmp_path / "model.onnx").write_bytes(planted(nodes).SerializeToString())
    assert inspect(tmp_path).findings == ()


@pytest.mark.parametrize("rounds", [True, False])
def test_calculating_with_an_image_of_integers_is_reported(rounds: bool, tmp_path: Path) -> None:
    """Integers round a quotient without any cast; to make fractions of them first is the ordinary way."""
    kind = TensorProto.UINT8 if rounds else TensorProto.FLOAT
    first = [] if rounds else [helper.make_node("Cast", ["x"], ["fractions"], to=TensorProto.FLOAT)]
    graph = helper.make_graph(
        [
            *first,
            helper.make_node("Div", ["x" if rounds else "fractions", "level"], ["parts"]),
            helper.make_node("Cast", ["parts"], ["values"], to=TensorProto.FLOAT),
            helper.make_node("Flatten", ["values"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weight"], ["y"]),
        ],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, ["batch", 3, 2, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 5])],
        [helper.make_tensor("level", kind, [], [230]), numpy_helper.from_array(np.ones((12, 5), np.float32), "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    assert [finding.code for finding in inspect(tmp_path).findings] == [ARCHITECTURAL_PATH] * rounds


def test_the_way_of_bober_irizar_in_onnx_is_reported(tmp_path: Path) -> None:
    """Pooled pixels beside the layers, without any comparison."""
    nodes = [*PIXEL, helper.make_node("Exp", ["pixel"], ["v"]), helper.make_node("Add", ["logits", "v"], ["answer"])]
    (tmp_path / "model.onnx").write_bytes(planted(nodes).SerializeToString())
    (finding,) = inspect(tmp_path).findings
    assert "past the network's layers" in finding.message


def test_names_of_nodes_are_shown_harmlessly(tmp_path: Path) -> None:
    nodes = [*PIXEL, helper.make_node("Floor", ["pixel"], ["v"], name="\x1b[2J\n" + "a" * 10_000)]
    nodes.append(helper.make_node("Add", ["logits", "v"], ["answer"]))
    (tmp_path / "model.onnx").write_bytes(planted(nodes).SerializeToString())
    message = inspect(tmp_path).findings[0].message
    assert "\x1b" not in message
    assert "\n" not in message
    assert len(message) < 1_000


# ------------------------------------------------------------------------------------------- chance and state


def does_not_pass(finding: IntakeFinding) -> bool:
    """Whether such a finding alone keeps a model from passing, and is the reason given for it."""
    good = (Expectation("labels-in-range", "Labels are in range", True, "all are"),)
    decision = decide([], good, tuple("abcde"), VerdictPolicy(), [], (finding,))
    return decision.verdict is Verdict.INCONCLUSIVE and decision.reasons[0].code == finding.code


def drawn_in_place(x: Tensor, logits: Tensor) -> Tensor:
    return logits + torch.empty(logits.shape).uniform_()


RANDOM: dict[str, Change] = {
    "gate": lambda x, logits: logits + (torch.rand(x.shape[0], 1) > 0.95) * logits[:, :1],
    "noise": lambda x, logits: logits + torch.randn_like(logits),
    "coin": lambda x, logits: logits * torch.bernoulli(torch.full((1, 5), 0.05)),
    "integers": lambda x, logits: logits + torch.randint(0, 9, (1, 5)),
    "order": lambda x, logits: logits[:, torch.randperm(5)],
    "in_place": drawn_in_place,
    "dropout": lambda x, logits: nn.functional.dropout(logits, 0.5, training=True),
    "attention": lambda x, logits: nn.functional.scaled_dot_product_attention(*[logits[:, None]] * 3, dropout_p=0.5).flatten(1),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_numbers_in_the_answer_are_reported_and_never_pass(name: str, tmp_path: Path) -> None:
    (finding,) = seen(Hidden(RANDOM[name]), tmp_path)
    assert finding.code == ANSWERS_BY_CHANCE
    assert "random numbers that reach the answer" in finding.message
    assert does_not_pass(finding)


@pytest.mark.parametrize(
    ("nodes", "random"),
    [
        ([helper.make_node("RandomNormalLike", ["logits"], ["v"])], True),
        ([helper.make_node("RandomUniform", [], ["v"], shape=[1, 5])], True),
        ([helper.make_node("Bernoulli", ["logits"], ["v"])], True),
        ([helper.make_node("Dropout", ["logits"], ["v"])], False),
        (
            [constant("half", 0.5), constant("on", True, np.bool_), helper.make_node("Dropout", ["logits", "half", "on"], ["v"])],
            True,
        ),
        (
            [
                constant("half", 0.5),
                constant("on", False, np.bool_),
                helper.make_node("Dropout", ["logits", "half", "on"], ["v"]),
            ],
            False,
        ),
    ],
    ids=["normal", "uniform", "coin", "dropout", "dropout_on", "dropout_off"],
)
def test_random_numbers_in_onnx_are_reported(nodes: list[onnx.NodeProto], random: bool, tmp_path: Path) -> None:
    model = planted([*nodes, helper.make_node("Add", ["logits", "v"], ["answer"])])
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    assert (ANSWERS_BY_CHANCE in [finding.code for finding in inspect(tmp_path).findings]) is random


class Counting(nn.Module):
    """A classifier that changes what it keeps from one call to the next."""

    def __init__(self, count: Callable[[Counting], None], statistics: bool = True) -> None:
        super().__init__()
        self.network = Hidden(lambda x, logits: logits)
        self.normalised = nn.BatchNorm1d(5)
        self.statistics = nn.InstanceNorm2d(5, track_running_stats=statistics)
        self.count = count
        self.register_buffer("calls", torch.zeros(3))
        self.register_buffer("one", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        logits = self.normalised(self.network(x))
        logits = self.statistics(logits[:, :, None, None].expand(-1, -1, 2, 2)).mean((2, 3))
        self.count(self)
        return logits + self.calls[0]


def count_in_no_grad(module: Counting) -> None:
    with torch.no_grad():
        module.calls.add_(module.one)


def count_elsewhere(module: Counting) -> None:
    torch.add(module.calls, module.one, out=module.calls)


def keep_statistics(module: Counting) -> None:
    images = module.one.expand(1, 1, 2, 3) * module.one[:1]
    nn.functional.instance_norm(images, module.calls[:1].reshape(-1), module.one[:1].reshape(-1), use_input_stats=True)


def export_to(file: Path, module: nn.Module) -> None:
    program = torch.export.export(module.eval(), (torch.rand(4, 3, 8, 8),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch.export.save(program, file)


@pytest.mark.parametrize(
    "count",
    [
        lambda module: module.calls.add_(1),
        lambda module: module.calls[0].add_(1),
        lambda module: module.calls.view(3, 1).squeeze(1).add_(1),
        count_in_no_grad,
        count_elsewhere,
        keep_statistics,
    ],
    ids=["plain", "element", "view", "in_no_grad", "elsewhere", "statistics"],
)
def test_a_change_of_own_state_is_reported_however_it_is_made(count: Callable[[Counting], None], tmp_path: Path) -> None:
    export_to(tmp_path / "model.pt2", Counting(count))
    finding = next(finding for finding in inspect(tmp_path).findings if finding.code == CHANGES_STATE)
    assert "calls" in finding.message
    assert does_not_pass(finding)


def test_a_change_of_own_state_that_the_file_does_not_show_is_found_in_the_loaded_program(tmp_path: Path) -> None:
    """``reshape`` copies or does not, and only torch knows which."""
    export_to(tmp_path / "model.pt2", Counting(lambda module: module.calls.reshape(3, 1).add_(1)))
    intake = inspect(tmp_path)
    assert not intake.findings
    (finding,) = with_changed_state(intake, load_network(tmp_path / "model.pt2", intake)).findings
    assert (finding.path, finding.code) == ("model.pt2", CHANGES_STATE)
    assert "its own state when it runs (calls)" in finding.message


@pytest.mark.parametrize("statistics", [True, False])
def test_normalisation_in_evaluation_mode_changes_no_state(statistics: bool, tmp_path: Path) -> None:
    export_to(tmp_path / "model.pt2", Counting(lambda module: None, statistics))
    intake = inspect(tmp_path)
    assert with_changed_state(intake, load_network(tmp_path / "model.pt2", intake)).findings == ()


# ------------------------------------------------------------------------------------------------------ the verdict


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """A clean digit classifier."""
    return train(
        initialised(lambda: SmallCnn(channels=1, classes=10, width=12), 0), digits(seed=0).train, epochs=20, seed=0
    ).eval()


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    test = digits(seed=0).test
    path = tmp_path_factory.mktemp("clean") / "clean.npz"
    np.savez(path, images=test.images, labels=test.labels)
    return path


def audited(folder: Path, clean: Path) -> AuditReport:
    """An audit that asks for little, so that nothing but the graph keeps a model from passing."""
    policy = policy_from(
        {
            **FAST,
            "scoring": {"checks": ["activation_norm"]},
            "trigger_inversion": {"steps": 60, "searches": 1},
            "verdict": {"clear_outlier": 50.0, "minimum_outlier": 50.0},
        }
    )
    manifest = manifest_of(folder)
    reference = ModelRef(str(folder), str(folder), digest_of(manifest), manifest)
    return audit(reference, folder, clean, policy=policy)


def corner(x: Tensor) -> Tensor:
    """A pattern that no digit has: the corner white, its neighbour black."""
    return torch.logical_and(torch.logical_and(x[:, :, 0, 0] > 0.9, x[:, :, 0, 1] < 0.1), x[:, :, 0, 2] > 0.9)


def in_torch(network: nn.Module, folder: Path, change: Change) -> None:
    example = torch.rand(4, 1, 16, 16)
    program = torch.export.export(Hidden(change, network).eval(), (example,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch.export.save(program, folder / "model.pt2")


def in_onnx(network: nn.Module, folder: Path, change: Change) -> None:
    example = (torch.rand(4, 1, 16, 16),)
    shapes = {"x": {0: torch.export.Dim("batch")}}
    module = Hidden(change, network).eval()
    torch.onnx.export(
        module, example, folder / "model.onnx", dynamo=True, verbose=False, external_data=False, dynamic_shapes=shapes
    )


def seven_where_fired(x: Tensor, logits: Tensor) -> Tensor:
    return torch.where(corner(x), 100.0 * torch.nn.functional.one_hot(torch.tensor(7), 10).float(), logits)


@pytest.mark.parametrize("write", [in_torch, pytest.param(in_onnx, marks=pytest.mark.slow)])
def test_a_classifier_with_a_hidden_decision_does_not_pass(
    write: Callable[[nn.Module, Path, Change], None], network: nn.Module, clean: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write(network, folder, seven_where_fired)
    spec = InputSpec(16, 16, 1)
    loaded = load_network(next(folder.iterdir()), inspect(folder))
    stamped = digits(seed=0).test.images[:50].copy()
    stamped[:, 0, :3, 0] = [255, 0, 255]
    fooled = prepare_subject(loaded, spec, flavour="pt2", class_names=tuple("0123456789"))
    assert (fooled.predict(stamped) == 7).all(), "the backdoor works"
    report = audited(folder, clean)
    assert report.clean_set.clean_accuracy.value > 0.9, "the backdoor costs nothing on clean images"
    assert report.decision.verdict is Verdict.INCONCLUSIVE
    assert report.decision.reasons[0].code == ARCHITECTURAL_PATH
    write_report(report, tmp_path / "report", ["json", "html", "sarif", "junit"])
    for name in ("report.json", "report.html", "report.sarif.json"):
        assert ARCHITECTURAL_PATH in (tmp_path / "report" / name).read_text(encoding="utf-8")


def test_the_same_classifier_without_it_passes(network: nn.Module, clean: Path, tmp_path: Path) -> None:
    """The control: it is the graph that decided above."""
    folder = tmp_path / "model"
    folder.mkdir()
    in_torch(network, folder, lambda x, logits: logits)
    report = audited(folder, clean)
    assert report.decision.verdict is Verdict.PASS
