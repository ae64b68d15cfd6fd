"""How many versions a scan audits in a minute, by engine and number of workers, each scan of the same registry in turn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient

from audit_plugin.attestation import SIGNING_KEY, VERIFYING_KEYS, generate_keys
from pipelines.demo import prepare_demo

_POLICY = """
[scoring]
checks = ["layerwise", "activation_norm"]

[trigger_inversion]
steps = 100
searches = 1

[source_specific]
maximum_classes = 0

[canaries]
families = []

[clean_images]
"digits-*" = "clean.npz"
"""


@dataclass(frozen=True)
class Throughput:
    """Versions a minute of one scan; ``ratio`` to the same engine with one worker in the same round."""

    engine: str
    jobs: int
    per_minute: float
    ratio: float


def time_scans(folder: Path, *, versions: int, engines: Sequence[str], jobs: int, rounds: int) -> list[Throughput]:
    """Scan a registry of ``versions`` digit classifiers, with one worker and with ``jobs``, ``rounds`` times in turn."""
    demo = prepare_demo(folder, lambda message: None)
    client = MlflowClient(demo.tracking_uri, demo.tracking_uri)
    first = client.get_model_version("digits-clean", "1")
    for _ in range(versions - 2):  # the demo made two
        client.create_model_version("digits-clean", str(first.source))
    (folder / "audit.toml").write_text(_POLICY, encoding="utf-8")
    signing, verifying = generate_keys(folder / "keys")
    environment = {"MLFLOW_TRACKING_URI": demo.tracking_uri, SIGNING_KEY: str(signing), VERIFYING_KEYS: str(verifying)}
    found = []
    for _ in range(rounds):
        for engine in engines:
            alone = _per_minute(folder, engine, 1, versions, environment)
            together = _per_minute(folder, engine, jobs, versions, environment)
            found += [Throughput(engine, 1, alone, 1.0), Throughput(engine, jobs, together, together / alone)]
    return found


def _per_minute(folder: Path, engine: str, jobs: int, versions: int, environment: dict[str, str]) -> float:
    command = [sys.executable, "-m", "audit_plugin.cli", "scan", "--again", "--engine", engine, "--jobs", str(jobs)]
    command += ["--policy", str(folder / "audit.toml"), "--format", "json"]
    finished = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    summary = json.loads(finished.stdout)
    if summary["metrics"]["audited"] != versions:
        raise RuntimeError(f"{summary['metrics']['audited']} of {versions} versions were audited:\n{finished.stderr[-2000:]}")
    return 60 * versions / float(summary["seconds"])
