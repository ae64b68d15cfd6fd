"""Where the demo puts its models."""

from __future__ import annotations

from mlflow import MlflowClient

from pipelines import demo


def test_the_demo_registers_in_an_mlflow_of_its_own_whatever_registry_the_user_has(tmp_path, monkeypatch, keeping_state):
    monkeypatch.setattr(demo, "_EPOCHS", 1)
    monkeypatch.setattr("mlflow.tracking._model_registry.utils._registry_uri", None)
    with keeping_state():
        monkeypatch.setenv("MLFLOW_REGISTRY_URI", f"sqlite:///{tmp_path}/mine.db")
        prepared = demo.prepare_demo(tmp_path / "demo", lambda message: None)
    assert not (tmp_path / "mine.db").exists()
    registry = MlflowClient(prepared.tracking_uri, prepared.tracking_uri)
    assert {model.name for model in registry.search_registered_models()} == {"digits-clean", "digits-backdoored"}
