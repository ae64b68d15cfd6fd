"""What the static check accepts, and what it says about it."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
import torch
import torchvision
from torch import nn

from audit_plugin.errors import IntakeError
from audit_plugin.intake import inspect
from audit_plugin.types import Signature


class TinyTransformer(nn.Module):
    """Patches, a class token, attention: symbolic sizes with arithmetic in the exported graph."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.token = nn.Parameter(torch.zeros(1, 1, 16))
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), tokens], 1)
        return self.head(self.encoder(tokens)[:, 0])


class Contexts(nn.Module):
    """no_grad and autocast become higher-order operators with sub-graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 32 * 32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x = (x - 0.5) * 2
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.head(x.flatten(1)).float()


def export(folder: Path, module: nn.Module, *, batch: int = 4, strict: bool = False) -> Path:
    shapes = ({0: torch.export.Dim.AUTO},) if batch > 1 else None
    program = torch.export.export(module, (torch.rand(batch, 3, 32, 32),), dynamic_shapes=shapes, strict=strict)
    torch.export.save(program, folder / "model.pt2")
    return folder


@pytest.mark.parametrize(
    ("name", "batch", "strict"),
    [
        ("transformer", 4, False),
        ("transformer", 1, False),
        ("transformer", 4, True),
        ("contexts", 4, False),
        ("contexts", 1, False),
    ],
)
def test_exported_modules_pass(name: str, batch: int, strict: bool, tmp_path: Path) -> None:
    module = {"transformer": TinyTransformer, "contexts": Contexts}[name]()
    intake = inspect(export(tmp_path, module.eval(), batch=batch, strict=strict))
    assert (intake.flavour, intake.data_path, intake.findings) == ("pt2", "model.pt2", ())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "regnet_x_400mf"])
def test_torchvision_models_pass(name: str, tmp_path: Path) -> None:
    module = torchvision.models.get_model(name, weights=None, num_classes=5).eval()
    assert inspect(export(tmp_path, module)).findings == ()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "vgg11",
        "densenet121",
        "convnext_tiny",
        "efficientnet_b0",
        "shufflenet_v2_x0_5",
        "squeezenet1_1",
        "swin_t",
        "swin_v2_t",
        "mnasnet0_5",
    ],
)
def test_further_torchvision_models_pass(name: str, tmp_path: Path) -> None:
    module = torchvision.models.get_model(name, weights=None, num_classes=5).eval()
    program = torch.export.export(module, (torch.rand(2, 3, 224, 224),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch.export.save(program, tmp_path / "model.pt2")
    assert inspect(tmp_path).findings == ()


def test_a_model_that_changes_its_own_state_is_reported(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    (finding,) = inspect(export(tmp_path, module)).findings
    assert "changes its own state" in finding.message
    assert "1.num_batches_tracked" in finding.message


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as mlflow.pytorch writes it."""
    folder = tmp_path_factory.mktemp("logged") / "model"
    example = torch.rand(4, 3, 32, 32).numpy()
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3600, 5)).eval()
    mlflow.pytorch.save_model(module, str(folder), input_example=example, pip_requirements=["torch"], serialization_format="pt2")
    return folder


def test_what_mlflow_logs_passes_with_its_signature(logged: Path) -> None:
    intake = inspect(logged)
    assert (intake.flavour, intake.data_path, intake.findings) == ("pt2", "data/model.pt2", ())
    assert intake.signature == Signature((-1, 3, 32, 32), "float32", (-1, 5))


def test_an_onnx_model_that_mlflow_logs_passes_and_its_options_are_ignored(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    module = nn.Sequential(nn.Flatten(), nn.Linear(48, 5)).eval()
    torch.onnx.export(module, (torch.rand(4, 3, 4, 4),), buffer, dynamo=True, verbose=False)
    import onnx

    model = onnx.load_model_from_string(buffer.getvalue())
    mlflow.onnx.save_model(model, str(tmp_path / "model"), pip_requirements=["onnx"])
    intake = inspect(tmp_path / "model")
    assert (intake.flavour, intake.data_path) == ("onnx", "model.onnx")
    assert [finding.message for finding in intake.findings] == [
        "onnx providers are ignored: a model must not choose how it is run"
    ]


@pytest.mark.parametrize("nested", [False, True])
def test_a_state_dict_passes(nested: bool, tmp_path: Path) -> None:
    module = torchvision.models.resnet18(weights=None, num_classes=2)
    optimiser = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    value = {"model": module.state_dict(), "optimizer": optimiser.state_dict(), "epoch": 3} if nested else module.state_dict()
    mlflow.pytorch.save_state_dict(value, str(tmp_path / "weights"))
    intake = inspect(tmp_path / "weights")
    assert (intake.flavour, intake.data_path) == ("state_dict", "state_dict.pth")


def test_the_format_is_decided_by_the_contents(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / "model.pt2")
    assert inspect(tmp_path).flavour == "state_dict"


def test_a_folder_with_several_or_no_models_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(IntakeError, match=r"no model file.*exactly one"):
        inspect(tmp_path)
    (tmp_path / "a.pt").touch()
    (tmp_path / "b.pt").touch()
    with pytest.raises(IntakeError, match=r"'a\.pt', 'b\.pt'.*exactly one"):
        inspect(tmp_path)


def test_safetensors_are_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(IntakeError, match=r"safetensors.*not supported"):
        inspect(tmp_path)


def test_the_check_imports_neither_torch_nor_mlflow() -> None:
    program = "import sys, audit_plugin.intake; sys.exit(any(name in sys.modules for name in ('torch', 'mlflow')))"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", program], cwd=root, timeout=60).returncode == 0
