"""MLmodel files that make MLflow run code of the model's own, or open another file than the audited one.

MLflow runs what a model brings: CVE-2024-37052 (scikit-learn), CVE-2024-37057 (TensorFlow) and others.
YAML that builds objects: CVE-2017-18342, CVE-2020-1747, CVE-2020-14343 of PyYAML. Pickles behind other extensions:
GHSA-769v-p64c-89pr of picklescan.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from audit_plugin.errors import IntakeError
from audit_plugin.intake import inspect

TENSOR = '[{"type": "tensor", "tensor-spec": {"dtype": "float32", "shape": [-1, 3, 8, 8]}}]'


def mlmodel(generic: Mapping[str, object] | None = None, own: Mapping[str, object] | None = None, **top: object) -> bytes:
    document = {
        "flavors": {
            "python_function": {"loader_module": "mlflow.pytorch", "data": "data", **(generic or {})},
            "pytorch": {"model_data": "data", "code": None, **(own or {})},
        },
        "signature": {"inputs": TENSOR, "outputs": None, "params": None},
        **top,
    }
    return yaml.safe_dump(document).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (mlmodel({"loader_module": "planted"}), "loader_module 'planted'"),
        (mlmodel({"loader_module": "mlflow.sklearn"}), "loader_module 'mlflow.sklearn'"),
        (mlmodel({"loader_module": "mlflow.onnx"}), "exactly one of pytorch and onnx"),
        (mlmodel({"code": "code"}), "code: 'code'"),
        (mlmodel(own={"code": "src"}), "code: 'src'"),
        (mlmodel(model_code_path="model.py"), "model_code_path"),
        (mlmodel({"data": "other"}), "would not be the one that every loader opens"),
        (mlmodel({"data": "../data"}, {"model_data": "../data"}), r"model_data '\.\./data'"),
        (mlmodel(signature={"inputs": "[{"}), "malformed signature"),
        (mlmodel(signature={"inputs": '[{"type": "tensor", "tensor-spec": {"dtype": "float32", "shape": ["a"]}}]'}), "signature"),
        (b"flavors: !!python/object/apply:os.mknod ['planted.fired']", "no plain YAML"),
        (b"a: &x [1]\nb: *x\n", "no plain YAML"),
        (b"flavors: {}\nflavors: {}\n", "no plain YAML"),
        (b"- 1\n", "no mapping"),
        (b"flavors: {pytorch: {model_data: data}, onnx: {data: model.onnx}}", "exactly one of pytorch and onnx"),
        (b"a" * 300_000, "at most"),
    ],
)
def test_an_unsafe_mlmodel_is_refused(
    content: bytes, message: str, tiny_pt2: bytes, refused: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused({"MLmodel": content, "data/model.pt2": tiny_pt2}, message)
    assert not list(tmp_path.glob("*.fired"))


def test_a_loader_in_the_models_own_code_is_refused_and_would_have_run(
    tiny_pt2: bytes, refused: Callable, tmp_path: Path
) -> None:
    """The control: MLflow's own loader imports it from ``code/`` although the data is a harmless .pt2."""
    code = b"import os\nos.mknod('loader.fired')\ndef _load_pyfunc(path): return None\n"
    content = mlmodel({"loader_module": "planted", "code": "code"})
    refused({"MLmodel": content, "data/model.pt2": tiny_pt2, "code/planted.py": code}, "code/planted.py")
    assert not (tmp_path / "loader.fired").exists()
    load = f"import mlflow.pyfunc; mlflow.pyfunc.load_model({str(tmp_path / 'model')!r})"
    subprocess.run([sys.executable, "-c", load], cwd=tmp_path, capture_output=True, timeout=120)
    assert (tmp_path / "loader.fired").exists()


@pytest.mark.parametrize("extra", ["data/model.pth", "data/pickle_module_info.txt", "data/notes.txt"])
def test_a_second_file_that_mlflow_could_prefer_is_refused(extra: str, tiny_pt2: bytes, refused: Callable) -> None:
    refused({"MLmodel": mlmodel(), "data/model.pt2": tiny_pt2, extra: b"x"}, r"exactly model\.pt2 belongs there")


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    folder = tmp_path / "pickled"
    (folder / "data").mkdir(parents=True)
    (folder / "MLmodel").write_bytes(mlmodel())
    torch.save(nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(72, 3)), folder / "data" / "model.pth")
    (folder / "data" / "pickle_module_info.txt").write_text("mlflow.pytorch.pickle_module")
    return folder


def test_a_whole_module_pickle_is_refused_with_the_way_out(pickled: Path) -> None:
    with pytest.raises(IntakeError, match=r"model\.pth: found a whole module in a pickle.*input_example.*--allow-pickle"):
        inspect(pickled)


def test_a_whole_module_pickle_is_recognised_when_allowed(pickled: Path) -> None:
    intake = inspect(pickled, allow_pickle=True)
    assert (intake.flavour, intake.data_path) == ("pickle", "data/model.pth")
    assert intake.signature is not None
    assert intake.signature.input_shape == (-1, 3, 8, 8)


def test_another_pickle_module_is_refused_even_when_pickles_are_allowed(pickled: Path) -> None:
    (pickled / "data" / "pickle_module_info.txt").write_text("planted")
    with pytest.raises(IntakeError, match="'planted'"):
        inspect(pickled, allow_pickle=True)


def test_code_is_refused_even_when_pickles_are_allowed(pickled: Path) -> None:
    (pickled / "code").mkdir()
    (pickled / "code" / "planted.py").touch()
    with pytest.raises(IntakeError, match="code beside the model"):
        inspect(pickled, allow_pickle=True)


def test_a_bare_pickle_is_refused(refused: Callable) -> None:
    refused({"model.pt": pickle.dumps({"a": 1})}, "a bare pickle")


def test_a_pickle_named_pt2_is_refused(refused: Callable) -> None:
    refused({"MLmodel": mlmodel(), "data/model.pt2": pickle.dumps({"a": 1})}, "a bare pickle")
