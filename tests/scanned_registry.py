"""A registry of many small digit classifiers, filled within seconds: few networks are trained, their weights varied a little."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

import mlflow
import numpy as np
import torch
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.models import infer_signature

from audit_plugin.attestation import SIGNING_KEY, VERIFYING_KEYS, generate_keys
from audit_plugin.maths.pixels import to_pixels
from audit_plugin.zoo.architectures import SmallCnn
from audit_plugin.zoo.attacks import BadNets
from audit_plugin.zoo.data import digits
from audit_plugin.zoo.train import initialised, train
from tests.policies import FAST, as_toml

ATTACK = BadNets(target_class=7, poisoning_rate=0.05)

QUICK = as_toml(
    {
        **FAST,
        "scoring": {"checks": ["activation_norm"]},
        "verdict": {"minimum_confirmations": 1, "minimum_outlier": 2.4, "clear_outlier": 2.4},
        "trigger_inversion": {"steps": 60, "searches": 1},
        "maximum_margin": {"starts": 2, "steps": 30},
        "clean_images": {"digits*": "clean.npz", "spare": "clean.npz"},
    }
)
"""A policy under which an audit of a digit classifier takes seconds.

So short a search tells less: in 16 of them, clean ones reached an outlier of 1.8, backdoored ones began at 2.6.
"""


class ScannedRegistry:
    """Database and artifacts of an MLflow server in ``folder``, as the server of the tests keeps them; it writes past the server.

    ``policy`` is a policy file; ``environment`` what a scan needs.
    """

    def __init__(self, folder: Path, address: str) -> None:
        self.folder, self.address = folder, address
        database = f"sqlite:///{folder}/mlflow.db"
        self.client = MlflowClient(database, database)
        self.policy = folder / "audit.toml"
        self.policy.write_text(QUICK, encoding="utf-8")
        data = digits(seed=0)
        np.savez(folder / "clean.npz", images=data.test.images, labels=data.test.labels)
        signing, verifying = generate_keys(folder / "keys")
        self.environment = {
            "MLFLOW_TRACKING_URI": address,
            SIGNING_KEY: str(signing),
            VERIFYING_KEYS: str(verifying),
        }
        self._programs: dict[bool, torch.export.ExportedProgram] = {}
        self._count = 0

    def add(
        self,
        name: str,
        *,
        backdoored: bool = False,
        hostile: bool = False,
        aliases: tuple[str, ...] = (),
        tags: Mapping[str, str] | None = None,
        model_tags: Mapping[str, str] | None = None,
    ) -> ModelVersion:
        """A new version; the files of a ``hostile`` one are refused by intake."""
        self._count += 1
        files = self.folder / "artifacts" / "models" / str(self._count)
        shutil.copytree(self._model(backdoored), files)
        data = files / "data" / "model.pt2"
        if hostile:
            (files / "data" / "surprise.pkl").write_bytes(b"cos\nsystem\n(S'touch /tmp/x'\ntR.")
            data.write_bytes(b"no archive")
        else:
            program = self._programs[backdoored]
            generator = torch.Generator().manual_seed(self._count)
            weights = {key: tensor.clone() for key, tensor in program.state_dict.items()}
            for key, tensor in weights.items():
                if tensor.is_floating_point() and key.endswith("weight"):
                    program.state_dict[key].data += 1e-4 * torch.randn(tensor.shape, generator=generator)
            torch.export.save(program, data)
            for key, tensor in weights.items():
                program.state_dict[key].data.copy_(tensor)
        if not self.client.search_registered_models(f"name = '{name}'"):
            self.client.create_registered_model(name, dict(model_tags or {}))
        version = self.client.create_model_version(name, f"mlflow-artifacts:/models/{self._count}", tags=dict(tags or {}))
        for alias in aliases:
            self.client.set_registered_model_alias(name, alias, version.version)
        return version

    def files_of(self, version: ModelVersion) -> Path:
        """The folder of a version's files."""
        return self.folder / "artifacts" / str(version.source).removeprefix("mlflow-artifacts:/")

    def start(self, *arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
        """``backdoor-audit scan``, running; an empty variable is unset."""
        command = [sys.executable, "-m", "audit_plugin.cli", "scan", "--policy", self.policy, *arguments]
        wanted = os.environ | self.environment | environment
        return subprocess.Popen(
            list(map(str, command)),
            env={name: value for name, value in wanted.items() if value},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def scan(self, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """``backdoor-audit scan``, to its end."""
        process = self.start(*arguments, **environment)
        out, err = process.communicate(timeout=3600)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def audits(self) -> list[str]:
        """The URI of every audit that was published, once for each time."""
        experiment = self.client.get_experiment_by_name("backdoor-audits")
        runs = self.client.search_runs([experiment.experiment_id], max_results=5000) if experiment else []
        return sorted(run.data.tags["audit.model"] for run in runs if run.info.status == "FINISHED")

    def _model(self, backdoored: bool) -> Path:
        """The folder that MLflow makes of a network trained for it."""
        folder = self.folder / ("backdoored" if backdoored else "clean")
        if backdoored in self._programs:
            return folder
        data = digits(seed=0)
        images = ATTACK.poison(data.train, np.random.default_rng(0)) if backdoored else data.train
        network = initialised(lambda: SmallCnn(channels=1, classes=10, width=8), 0)
        train(network, images, epochs=15, seed=0)
        example = to_pixels(data.test.images[:4])
        program = torch.export.export(network, (torch.from_numpy(example),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            mlflow.pytorch.save_model(
                network,
                folder,
                input_example=example,
                signature=infer_signature(example, network(torch.from_numpy(example)).numpy()),
                pip_requirements=[f"torch=={importlib.metadata.version('torch')}"],
            )
        self._programs[backdoored] = program
        return folder
