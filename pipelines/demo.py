"""The demo's models: a clean and a backdoored digit classifier, registered in an MLflow of their own."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlflow
import numpy as np
import torch
from mlflow.models import infer_signature
from torch import nn

from audit_plugin.maths.pixels import to_pixels
from audit_plugin.registry import EXPERIMENT
from audit_plugin.types import Verdict
from audit_plugin.zoo.architectures import SmallCnn
from audit_plugin.zoo.attacks import BadNets
from audit_plugin.zoo.data import TrainAndTest, digits
from audit_plugin.zoo.train import initialised, train

ATTACK = BadNets(target_class=7, poisoning_rate=0.05)
EXPECTED = ((Verdict.PASS, None), (Verdict.FAIL, ATTACK.target_class))
_NAMES = ("digits-clean", "digits-backdoored")
_EPOCHS = 20
_WIDTH = 16
_SEED = 0


@dataclass(frozen=True)
class Demo:
    """What :func:`prepare_demo` made; the model URIs in the order of ``EXPECTED``."""

    tracking_uri: str
    model_uris: tuple[str, ...]
    clean_images: Path


def prepare_demo(folder: Path, say: Callable[[str], None], tracking_uri: str | None = None) -> Demo:
    """Train and register both models; the clean images go under ``folder``.

    Without a ``tracking_uri`` the registry is an SQLite database with its artifacts, under ``folder`` too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = digits(seed=_SEED)
    clean_images = folder / "clean.npz"
    np.savez_compressed(clean_images, images=data.test.images, labels=data.test.labels)
    is_our_own = tracking_uri is None
    tracking_uri = tracking_uri or f"sqlite:///{folder / 'mlflow.db'}"
    mlflow.set_tracking_uri(tracking_uri)
    mlflow.set_registry_uri(tracking_uri)  # else MLFLOW_REGISTRY_URI leads the demo's models into the user's own registry
    if is_our_own:
        for experiment in ("digits", EXPERIMENT):
            if mlflow.get_experiment_by_name(experiment) is None:
                mlflow.create_experiment(experiment, artifact_location=(folder / "artifacts" / experiment).as_uri())
    mlflow.set_experiment("digits")
    poisoned = data._replace(train=ATTACK.poison(data.train, np.random.default_rng(_SEED)))
    uris = []
    for name, images in zip(_NAMES, (data, poisoned), strict=True):
        say(f"Training {name}")
        network = initialised(lambda: SmallCnn(channels=1, classes=10, width=_WIDTH), _SEED)
        model = train(network, images.train, epochs=_EPOCHS, seed=_SEED)
        say(f"Registering {name}")
        uris.append(_register(model, name, data))
    return Demo(tracking_uri, tuple(uris), clean_images)


def _register(model: nn.Module, name: str, data: TrainAndTest) -> str:
    """Log in MLflow's default serialisation, with the accuracy and, as only the attacker could know, the attack success rate."""
    example = to_pixels(data.test.images[:4])
    with torch.no_grad():
        signature = infer_signature(example, model(torch.from_numpy(example)).numpy())
        predicted = model(torch.from_numpy(to_pixels(data.test.images))).argmax(dim=1).numpy()
        others = data.test.labels != ATTACK.target_class
        attacked = model(torch.from_numpy(to_pixels(ATTACK.stamp(data.test.images[others])))).argmax(dim=1).numpy()
    with mlflow.start_run(run_name=name):
        mlflow.log_metric("clean_accuracy", float((predicted == data.test.labels).mean()))
        mlflow.log_metric("attack_success_rate", float((attacked == ATTACK.target_class).mean()))
        logged = mlflow.pytorch.log_model(
            model,
            name="model",
            input_example=example,
            signature=signature,
            registered_model_name=name,
            pip_requirements=[f"torch=={importlib.metadata.version('torch')}"],  # finding them out takes MLflow seconds
        )
    return f"models:/{name}/{logged.registered_model_version}"
