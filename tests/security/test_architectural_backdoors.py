"""Backdoors in the graph instead of the weights: nodes that look for a trigger and overrule the layers beside them.

After Bober-Irizar et al. 2022 ("Architectural backdoors in neural networks"), Langford et al. 2024 ("Architectural neural
backdoors from first principles"), and ShadowLogic of HiddenLayer (2024); JFrog lists the ONNX form as model threat
ONNX-BACKDOOR. There is no CVE: nothing is wrong with any software.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from audit_plugin.audit import audit
from audit_plugin.intake import inspect
from audit_plugin.intake.data_flow import ARCHITECTURAL_PATH
from audit_plugin.manifest import digest_of, manifest_of
from audit_plugin.model.load import load_network
from audit_plugin.model.subject import prepare_subject
from audit_plugin.policy import policy_from
from audit_plugin.report.write import write_report
from audit_plugin.types import AuditReport, InputSpec, IntakeFinding, ModelRef, Verdict
from audit_plugin.zoo.architectures import SmallCnn
from audit_plugin.zoo.data import digits
from audit_plugin.zoo.train import initialised, train
from tests.policies import FAST

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
    """What intake says of the exported module."""
    program = torch.export.export(module.eval(), (torch.rand(4, 3, size, size),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch.export.save(program, folder / "model.pt2")
    return tuple(finding for finding in inspect(folder).findings if finding.code == ARCHITECTURAL_PATH)


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
}


@pytest.mark.parametrize("name", DECISIONS)
def test_a_decision_on_the_image_is_reported(name: str, tmp_path: Path) -> None:
    finding = seen(Hidden(DECISIONS[name]), tmp_path)[0]  # most are a path past the layers too
    assert "a decision on the image's values that reaches the answer" in finding.message
    assert "nodes '" in finding.message


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


@pytest.mark.parametrize("module", [Ordinary, Transformed], ids=lambda module: module.__name__)
def test_ordinary_networks_are_not_reported(module: type[nn.Module], tmp_path: Path) -> None:
    assert seen(module(), tmp_path) == ()


@pytest.mark.slow
@pytest.mark.parametrize("as_onnx", [False, True], ids=["pt2", "onnx"])
@pytest.mark.parametrize(
    "name",
    [
        *("resnet18", "vgg11", "mobilenet_v3_small", "efficientnet_b0", "googlenet", "densenet121", "convnext_tiny"),
        *("swin_t", "swin_v2_t", "vit_b_32"),
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
