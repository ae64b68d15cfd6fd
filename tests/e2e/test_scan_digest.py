"""A scan asks a real MLflow server for digests."""

from __future__ import annotations

import time

from mlflow import MlflowClient

from audit_plugin.manifest import digest_of, manifest_of
from pipelines.scan.digest import Digests
from tests.scanned_registry import ScannedRegistry


def test_a_real_server_hashes_what_is_there_now(start_server, keeping_state, tmp_path):
    with start_server(tmp_path, "--app-name", "backdoor-audit") as address, keeping_state():
        registry = ScannedRegistry(tmp_path, address)
        version = registry.add("digits & co?#")
        posing = registry.add("digits")
        files = registry.files_of(posing)
        over_http = MlflowClient(address, address)
        logged = over_http.create_logged_model(over_http.create_experiment("models"))
        over_http.log_model_artifacts(logged.model_id, str(files))
        over_http.finalize_logged_model(logged.model_id, "READY")
        usual = over_http.create_model_version("digits & co?#", f"models:/{logged.model_id}", model_id=logged.model_id)
        registry.client.set_model_version_tag("digits", posing.version, "mlflow.prompt.is_prompt", "true")
        digests = Digests(MlflowClient(address, address))

        def hashed(version):
            return digests.now(version.name, version.version, version.source)

        def asked():
            time.sleep(0.5)  # the log is written behind the answer
            log = (tmp_path / "server.log").read_text()
            return log.count("POST /backdoor-audit/compare"), log.count("GET /api/2.0/mlflow-artifacts")

        assert hashed(version) == digest_of(manifest_of(registry.files_of(version)))
        assert asked() == (1, 0)
        assert usual.source == f"models:/{logged.model_id}"
        assert hashed(usual) == digest_of(manifest_of(files))
        assert asked() == (2, 0)
        before = hashed(version)
        (registry.files_of(version) / "MLmodel").write_text("other")
        assert hashed(version) == digest_of(manifest_of(registry.files_of(version))) != before
        assert hashed(posing) == digest_of(manifest_of(registry.files_of(posing)))
