"""MLflow evaluator ``backdoor_audit``: the audit inside ``mlflow.models.evaluate``, with metrics that a threshold can gate on.

MLflow loads the model that ``evaluate`` is given, before any evaluator runs. So this one is given none, and pins and audits the
model that its config names.
"""

from __future__ import annotations

import json
import os
import shlex
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.models.evaluation import EvaluationArtifact, EvaluationResult, ModelEvaluator
from mlflow.models.evaluation.artifacts import JsonEvaluationArtifact, TextEvaluationArtifact
from mlflow.pyfunc import PyFuncModel

from audit_plugin.errors import AuditError, UsageError, nearest
from audit_plugin.policy import POLICY_VARIABLE, load_policy
from audit_plugin.report.sanitise import clean_text
from audit_plugin.types import AuditReport, ModelRef, Verdict

NAME = "backdoor_audit"
_REQUIRED = frozenset({"model_uri", "clean"})
_LONGEST_MESSAGE = 2000


@dataclass(frozen=True)
class EvaluatorConfig:
    """What ``evaluator_config={"backdoor_audit": {...}}`` may hold: the arguments of ``backdoor-audit run``.

    ``model_uri`` is a model URI or path; ``clean`` and ``suspects`` are paths or artifact URIs of images; ``policy`` is the path
    of an ``audit.toml``, by default the one that ``BACKDOOR_AUDIT_POLICY`` names; ``seed`` is 0 or above.
    """

    model_uri: str
    clean: str
    suspects: str | None = None
    policy: str | None = None
    seed: int = 0
    allow_pickle: bool = False
    require_gpu: bool = False

    @property
    def command(self) -> str:
        """The same audit on the command line."""
        words = ["backdoor-audit", "run", self.model_uri, "--clean", self.clean, "--seed", str(self.seed)]
        words += ["--suspects", self.suspects] if self.suspects else []
        words += ["--policy", self.policy] if self.policy else []
        words += ["--allow-pickle"] if self.allow_pickle else []
        words += ["--require-gpu"] if self.require_gpu else []
        return shlex.join(words)


class BackdoorAuditEvaluator(ModelEvaluator):
    """Audits the model that the config names."""

    @classmethod
    def can_evaluate(cls, *, model_type: str | None, evaluator_config: Mapping[str, Any], **kwargs: Any) -> bool:
        """Whether the config is meant for this evaluator: without ``evaluators`` MLflow asks every plugin, also about a config
        that is meant for others."""
        return not _REQUIRED.isdisjoint(evaluator_config)

    def evaluate(
        self,
        *,
        model_type: str | None,
        dataset: Any,
        run_id: str,
        evaluator_config: Mapping[str, Any],
        model: Any = None,
        extra_metrics: Any = None,
        custom_artifacts: Any = None,
        predictions: Any = None,
        model_id: str | None = None,
        **kwargs: Any,
    ) -> EvaluationResult:
        """Audit, publish as ``backdoor-audit run`` does, and log report and metrics to the run of the evaluation.

        Raises:
            UsageError: ``evaluate`` was given a model, the config is wrong, or ``model_id`` is another model's.
            AuditError: the audit could not be made or not be published; the run has no metric of it.
        """
        try:
            _refuse_model(model)
            return _audit(_config_of(evaluator_config), run_id, model_id)
        except AuditError as error:  # may quote the model, whose control characters must not reach a terminal
            raise type(error)(clean_text(error, _LONGEST_MESSAGE)).with_traceback(error.__traceback__) from None


def _audit(config: EvaluatorConfig, run_id: str, model_id: str | None) -> EvaluationResult:
    # MLflow loads this module to list its plugins; that must not take the seconds that torch takes.
    from audit_plugin.promotion import judge, load_suite
    from audit_plugin.publishing import audit_pinned, publish
    from audit_plugin.registry import check_writing, metrics_of, pin
    from audit_plugin.requirements import suite_path

    policy_file = Path(config.policy) if config.policy else None
    policy = load_policy(policy_file)
    suite = load_suite(suite_path(policy.gate, policy_file))
    with tempfile.TemporaryDirectory(prefix="backdoor-audit-") as temporary:
        pinned = pin(config.model_uri, Path(temporary))
        _check_model_id(model_id, pinned.reference)
        if pinned.came_from_mlflow:
            check_writing()
        report = audit_pinned(
            pinned,
            config.clean,
            suspects=config.suspects,
            policy=policy,
            seed=config.seed,
            allow_pickle=config.allow_pickle,
            require_gpu=config.require_gpu,
            command=config.command,
        )
    client = MlflowClient()
    artifacts = _log_files(client, report, run_id)
    promotion = None
    if pinned.came_from_mlflow:
        try:
            promotion = publish(report, suite).promotion
        except AuditError as error:
            place = f"'{NAME}' of the run {run_id}"
            raise AuditError(
                f"The audit came to its end, but could not be published: {error} Its report is in {place}."
            ) from error
    metrics = {verdict.value: float(report.decision.verdict is verdict) for verdict in Verdict} | metrics_of(report)
    metrics["promotion_allowed"] = float((promotion or judge(report, suite)).allowed)
    metrics = {f"{NAME}/{name}": value for name, value in metrics.items()}
    now = int(time.time() * 1000)
    # Last of all: an audit that was published by half shows no verdict.
    client.log_batch(run_id, [Metric(name, value, now, 0) for name, value in metrics.items()])
    return EvaluationResult(metrics, artifacts, run_id)


def _refuse_model(model: Any) -> None:
    if model is None:
        return
    loaded = "It was loaded before any evaluator could run, so its own code may have run here, unaudited. "
    raise UsageError(
        f"{NAME} was given a model and takes none: it checks the files of 'model_uri' before it opens them. "
        f"{loaded if isinstance(model, PyFuncModel) else ''}Call "
        f"mlflow.models.evaluate(None, data, ..., evaluators=['{NAME}'], evaluator_config={{'{NAME}': {{'model_uri': "
        "'models:/name/version', 'clean': 'clean.npz'}})."
    )


def _config_of(content: Mapping[str, Any]) -> EvaluatorConfig:
    known = [field.name for field in fields(EvaluatorConfig)]
    for key in content:
        if key not in known:
            raise UsageError(f"The config of {NAME} has no key '{key}'.{nearest(str(key), known)}")
    if missing := sorted(_REQUIRED - content.keys()):
        raise UsageError(f"The config of {NAME} needs '{missing[0]}', got only {', '.join(sorted(content))}.")
    config = EvaluatorConfig(**{key: _checked(key, value) for key, value in content.items()})
    return replace(config, policy=config.policy or os.environ.get(POLICY_VARIABLE) or None)


def _checked(key: str, value: Any) -> Any:
    if key == "seed":
        expected, right = "a whole number, 0 or above", type(value) is int and value >= 0
    elif key in ("allow_pickle", "require_gpu"):
        expected, right = "True or False", isinstance(value, bool)
    else:
        expected, right = "a string or a path", isinstance(value, str | Path) or (value is None and key not in _REQUIRED)
    if not right:
        raise UsageError(f"'{key}' in the config of {NAME} must be {expected}, got {str(value)[:100]!r}.")
    return str(value) if isinstance(value, Path) else value


def _check_model_id(model_id: str | None, audited: ModelRef) -> None:
    """MLflow also logs the metrics on the logged model ``model_id``: a pass must not appear on another one."""
    if model_id is None or model_id == audited.model_id:
        return
    advice = f"Give model_id='{audited.model_id}'" if audited.model_id else "It is no logged model of MLflow: give no model_id"
    raise UsageError(
        f"The evaluation is of the model_id '{model_id}', given or active, and {audited.pinned_uri} is another model. {advice}."
    )


def _log_files(client: MlflowClient, report: AuditReport, run_id: str) -> dict[str, EvaluationArtifact]:
    from audit_plugin.report.write import write_report

    place = f"{client.get_run(run_id).info.artifact_uri}/{NAME}"
    with tempfile.TemporaryDirectory(prefix="backdoor-audit-") as temporary:
        folder = Path(temporary)
        write_report(report, folder, ("json", "html"))
        client.log_artifacts(run_id, str(folder), NAME)
        html, document = (folder / "report.html").read_text("utf-8"), json.loads((folder / "report.json").read_bytes())
    return {
        f"{NAME}/report.html": TextEvaluationArtifact(f"{place}/report.html", html),
        f"{NAME}/report.json": JsonEvaluationArtifact(f"{place}/report.json", document),
    }
