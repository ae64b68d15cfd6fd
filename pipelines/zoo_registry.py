"""The zoo in an MLflow registry: one registered model a name, its card as tags and as an artifact of the run that logged it.

Nothing in the model's own files says what it is: those of a clean and a backdoored model differ in the weights alone.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import infer_signature
from mlflow.tracking import MlflowClient
from torch import nn

from audit_plugin.errors import RegistryError, UsageError
from audit_plugin.registry import check_server, pin
from audit_plugin.zoo.train import forget_steps
from pipelines.zoo_models import CARD, MODEL, build, example_of, read_card

EXPERIMENT = "zoo"
SHA256_TAG, DIGEST_TAG = "zoo.sha256", "zoo.digest"


def connect(tracking_uri: str | None) -> None:
    """Let MLflow, in this process, speak to a tracking server, or to its own choice if None; makes the experiment ``zoo``.

    Raises:
        RegistryError: it does not answer.
    """
    if tracking_uri is not None:
        mlflow.set_tracking_uri(tracking_uri)
        mlflow.set_registry_uri(tracking_uri)  # else MLFLOW_REGISTRY_URI leads the models into another registry
    if mlflow.get_tracking_uri().startswith("http"):  # a database may still have to be made
        check_server()
    try:
        mlflow.set_experiment(EXPERIMENT)
    except MlflowException as error:
        raise _one_line(error) from error


def register_model(folder: Path) -> str | None:
    """Register the model of a zoo's folder under the folder's name.

    Returns:
        ``models:/name/version``, or None where a version with the same model file is registered already.

    Raises:
        UsageError: the folder's files are not those that were trained.
        RegistryError: MLflow refuses.
    """
    card = read_card(folder / CARD)
    file = folder / MODEL
    if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != card["sha256"]:
        raise UsageError(f"'{file}' is not the file that its card describes. Delete '{folder / CARD}' and train it again.")
    try:
        versions = MlflowClient().search_model_versions(f"name = '{folder.name}'")
        if any(version.tags.get(SHA256_TAG) == card["sha256"] for version in versions):
            return None
        return _log_and_register(folder.name, card, file)
    except MlflowException as error:
        raise _one_line(error) from error


def _log_and_register(name: str, card: Mapping[str, Any], file: Path) -> str:
    network = build(card["architecture"], card["data"], card["width"]).eval()
    network.load_state_dict(torch.export.load(str(file)).state_dict)
    example = example_of(card["data"])
    with mlflow.start_run(run_name=name):
        logged = _log(forget_steps(network), example)
        with tempfile.TemporaryDirectory() as temporary:
            digest = pin(f"models:/{logged.model_id}", Path(temporary)).reference.digest
        figures = {key: card[key] for key in ("clean_accuracy", "attack_success_rate") if key in card}
        mlflow.log_metrics(figures)
        mlflow.log_dict({**card, "digest": digest}, CARD)
    tags = {
        "zoo.attack": card["attack"] or "none",
        **{f"zoo.{key}": str(card[key]) for key in ("data", "architecture", "seed")},
        **{f"zoo.{key}": f"{value:.4f}" for key, value in figures.items()},
        SHA256_TAG: card["sha256"],
        DIGEST_TAG: digest,
    }
    version = mlflow.register_model(logged.model_uri, name, tags=tags)  # with its tags at once: no version is without
    return f"models:/{name}/{version.version}"


def _log(network: nn.Module, example: torch.Tensor) -> Any:
    with torch.no_grad():
        signature = infer_signature(example.numpy(), network(example).numpy())
    return mlflow.pytorch.log_model(
        network,
        name="model",
        input_example=example.numpy(),
        signature=signature,
        pip_requirements=[f"torch=={importlib.metadata.version('torch')}"],  # finding them out takes MLflow seconds
    )


def _one_line(error: MlflowException) -> RegistryError:
    return RegistryError(f"MLflow: {' '.join(str(error).split())}")
