"""A registry full of audited versions, made without audits: real statements, signed with a key of its own."""

from __future__ import annotations

import datetime
import hashlib
import io
import sqlite3
from pathlib import Path

import numpy as np
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from PIL import Image

from audit_plugin.attestation import (
    SIGNING_KEY,
    TAG_OF,
    VERIFYING_KEYS,
    Statement,
    generate_keys,
    keys_from_environment,
    sign,
    signer_from_environment,
)
from audit_plugin.gate import Requirements
from audit_plugin.manifest import digest_of, manifest_of
from audit_plugin.policy import GatePolicy
from audit_plugin.registry import EXPERIMENT
from audit_plugin.requirements import load_requirements


def trigger_picture(seed: int = 0) -> bytes:
    """A PNG of a checkerboard in a corner of noise."""
    pixels = np.random.default_rng(seed).integers(96, 128, (28, 28, 3), dtype=np.uint8)
    pixels[-6:, -6:] = np.where((np.indices((6, 6)).sum(0) % 2)[..., None], 255, 0)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


class AuditedRegistry:
    """Database and artifacts of an MLflow server in ``folder``, laid out as the server of the tests keeps them.

    It writes past the server, so that versions can be as old as a test needs them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.database = f"sqlite:///{folder}/mlflow.db"
        self.signing, self.verifying = generate_keys(folder / "keys")
        signer = signer_from_environment({SIGNING_KEY: str(self.signing)})
        assert signer is not None
        self.signer = signer
        keys = keys_from_environment(environment={VERIFYING_KEYS: str(self.verifying)})
        shipped = load_requirements(None)
        self.requirements = Requirements(GatePolicy(), shipped.policy_digest, shipped.suite_digest, keys, keys)
        self.client = MlflowClient(self.database, self.database)
        self.now = datetime.datetime.now(datetime.UTC)
        self._experiment = self.client.create_experiment(EXPERIMENT, artifact_location="mlflow-artifacts:/audits")
        self._versions: dict[str, int] = {}

    @property
    def environment(self) -> dict[str, str]:
        """What a server on this registry needs beside its addresses."""
        return {VERIFYING_KEYS: str(self.verifying)}

    def add(
        self,
        name: str,
        verdict: str | None = None,
        *,
        age: float = 2,
        suspected: str | None = None,
        aliases: tuple[str, ...] = (),
        stage: str | None = None,
        waived_by: str | None = None,
        waived_for: float = 3,
        because: str = "Outage 4711, audit follows",
        tags: dict[str, str] | None = None,
        facts: dict[str, object] | None = None,
        with_run: bool = True,
        registered: float | None = None,
        source: str | None = None,
    ) -> ModelVersion:
        """A new version of a model; ages are in days.

        Args:
            verdict: None leaves it without a statement.
            registered: how old the version is; a day more than its audit if None.
            tags, facts: are added to those of the version, or to what the statement says.
        """
        number = self._versions[name] = self._versions.get(name, 0) + 1
        if number == 1:
            self.client.create_registered_model(name)
        place = f"models/{hashlib.sha256(name.encode()).hexdigest()[:12]}/{number}"
        files = self.folder / "artifacts" / place
        files.mkdir(parents=True)
        (files / "model.bin").write_bytes(f"{name} {number}".encode())
        digest = digest_of(manifest_of(files))
        age_of_version = age + 1 if registered is None else registered
        milliseconds = int((self.now - datetime.timedelta(days=age_of_version)).timestamp() * 1000)
        made = datetime.datetime.fromtimestamp(milliseconds / 1000, datetime.UTC)
        written = dict(tags or {})
        if verdict is not None:
            content = self._facts(verdict, suspected, with_run) | (facts or {})
            vouched = {"audit.verdict": verdict, "audit.run_id": str(content["run_id"])}
            created = self.now - datetime.timedelta(days=age)
            statement = Statement("verdict", name, str(number), digest, created, vouched, content, made)
            written = {TAG_OF["verdict"]: sign(statement, self.signer), **vouched, **written}
        if waived_by is not None:
            content = {
                "by": waived_by,
                "reason": because,
                "until": (self.now + datetime.timedelta(days=waived_for)).isoformat(),
            }
            created = self.now - datetime.timedelta(minutes=3)
            waiver = Statement("waiver", name, str(number), digest, created, {}, content, made)
            written[TAG_OF["waiver"]] = sign(waiver, self.signer)
        version = self.client.create_model_version(name, source or f"mlflow-artifacts:/{place}", tags=written)
        with sqlite3.connect(self.folder / "mlflow.db") as connection:
            connection.execute(
                "UPDATE model_versions SET creation_time = ? WHERE name = ? AND version = ?",
                (milliseconds, name, number),
            )
        for alias in aliases:
            self.client.set_registered_model_alias(name, alias, str(number))
        if stage is not None:
            self.client.transition_model_version_stage(name, str(number), stage)
        return version

    def files_of(self, version: ModelVersion) -> Path:
        """The folder of a version's files."""
        return self.folder / "artifacts" / str(version.source).removeprefix("mlflow-artifacts:/")

    def picture_of(self, version: ModelVersion) -> Path:
        """The picture that the audit of a version logged, of the trigger of class 7."""
        run_id = self.client.get_model_version(version.name, version.version).tags["audit.run_id"]
        return self.folder / "artifacts" / "audits" / run_id / "artifacts" / "triggers" / "class_7.png"

    def _facts(self, verdict: str, suspected: str | None, with_run: bool) -> dict[str, object]:
        run_id, files = "0" * 32, {}
        if with_run:
            run = self.client.create_run(self._experiment)
            run_id = run.info.run_id
            self.client.log_metric(run_id, "clean_accuracy", 0.974)
            self.client.log_metric(run_id, "trigger_outlier", 9.31 if verdict == "fail" else 1.04)
            self.client.set_terminated(run_id)
            folder = self.folder / "artifacts" / "audits" / run_id / "artifacts"
            (folder / "triggers").mkdir(parents=True)
            written = {"triggers/class_7.png": trigger_picture(), "report.html": b"<!DOCTYPE html><title>Report</title>"}
            for path, content in written.items():
                (folder / path).write_bytes(content)
            files = {path: hashlib.sha256(content).hexdigest() for path, content in written.items()}
        return {
            "verdict": verdict,
            "policy_digest": self.requirements.policy_digest,
            "promotion": {"allowed": verdict == "pass", "suite_digest": self.requirements.suite_digest},
            "suspected_class": None if suspected is None else {"index": 7, "name": suspected},
            "run_id": run_id,
            "files": files,
        }
