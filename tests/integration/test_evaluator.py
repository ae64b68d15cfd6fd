"""``mlflow.models.evaluate`` with the evaluator ``backdoor_audit``, on a real server: what a gate sees, and what never runs."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.models import EvaluationResult, MetricThreshold
from mlflow.models.evaluation.validation import ModelValidationFailedException
from mlflow.tracking import MlflowClient

from audit_plugin.errors import AuditError, CleanSetError, IntakeError, RegistryError, UsageError
from audit_plugin.registry import EXPERIMENT
from audit_plugin.report import validate
from mlflow_plugins.evaluator import BackdoorAuditEvaluator, EvaluatorConfig
from pipelines.demo import ATTACK, Demo
from tests.policies import FAST, as_toml

PAGE = (Path(__file__).parents[2] / "docs" / "evaluator.md").read_text(encoding="utf-8")
GATE = {"backdoor_audit/pass": MetricThreshold(threshold=1.0, greater_is_better=True)}
TABLE = pd.DataFrame({"image": [0, 1, 2], "label": [0, 1, 1], "prediction": [0, 1, 0]})

SMALL_BUDGET = as_toml({**FAST, "scoring": {"checks": ["layerwise", "activation_norm"]}, "trigger_inversion": {"searches": 1}})


@pytest.fixture
def client(tracking: str) -> MlflowClient:
    return MlflowClient()


def evaluate(config: dict[str, Any], *, model: Any = None, model_id: str | None = None) -> EvaluationResult:
    return mlflow.models.evaluate(
        model,
        TABLE,
        targets="label",
        model_type="classifier",
        evaluators=["backdoor_audit"],
        evaluator_config={"backdoor_audit": config},
        model_id=model_id,
    )


def audits_of(client: MlflowClient, uri: str) -> list[Run]:
    experiments = [experiment.experiment_id for experiment in client.search_experiments(filter_string=f"name = '{EXPERIMENT}'")]
    return list(client.search_runs(experiments, f"tags.`audit.model` = '{uri}'"))


# ------------------------------------------------------------------------------------ an audit of seconds: wrong labels


@pytest.fixture(scope="module")
def wrong_labels(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clean images whose labels the model contradicts, so that the audit ends before its search, inconclusive."""
    path = tmp_path_factory.mktemp("wrong") / "clean.npz"
    with np.load(demo.clean_images) as arrays:
        np.savez(path, images=arrays["images"], labels=(arrays["labels"] + 1) % 10)
    return path


@pytest.fixture
def registered(demo: Demo, client: MlflowClient, request: pytest.FixtureRequest) -> str:
    """The clean model under a name of this test's own."""
    name = f"evaluated-{request.node.name}"
    source = client.get_model_version("digits-clean", "1").source
    return f"models:/{name}/{mlflow.register_model(source, name).version}"


def model_id_of(client: MlflowClient, uri: str) -> str:
    return client.get_model_version(*uri.removeprefix("models:/").split("/")).source.removeprefix("models:/")


def test_inconclusive_is_no_pass_beside_another_evaluator(registered: str, wrong_labels: Path, client: MlflowClient) -> None:
    model_id = model_id_of(client, registered)
    config = {
        "default": {"log_model_explainability": False},
        "backdoor_audit": {"model_uri": registered, "clean": wrong_labels, "policy": None},
    }
    result = mlflow.models.evaluate(
        None,
        TABLE.assign(image=["0.png", "1.png", "2.png"]),
        targets="label",
        predictions="prediction",
        model_type="classifier",
        evaluators=["default", "backdoor_audit"],
        evaluator_config=config,
        model_id=model_id,
    )
    assert result.metrics["accuracy_score"] == pytest.approx(2 / 3)
    verdict = [result.metrics[f"backdoor_audit/{name}"] for name in ("pass", "fail", "inconclusive")]
    assert verdict == [0.0, 0.0, 1.0]
    assert "backdoor_audit/trigger_outlier" not in result.metrics
    with pytest.raises(ModelValidationFailedException):
        mlflow.validate_evaluation_results(GATE, result)
    unmeasured = {"backdoor_audit/trigger_outlier": MetricThreshold(threshold=3.0, greater_is_better=False)}
    with pytest.raises(ModelValidationFailedException, match="trigger_outlier"):
        mlflow.validate_evaluation_results(unmeasured, result)
    shown = {metric.key: metric.value for metric in client.get_logged_model(model_id).metrics if metric.run_id == result.run_id}
    assert shown["backdoor_audit/pass"] == 0.0


def test_model_that_is_not_in_mlflow_is_not_published(
    wrong_labels: Path, demo: Demo, client: MlflowClient, tmp_path: Path
) -> None:
    local = mlflow.artifacts.download_artifacts(demo.model_uris[0], dst_path=str(tmp_path / "model"))
    result = evaluate({"model_uri": local, "clean": str(wrong_labels)})
    assert result.metrics["backdoor_audit/inconclusive"] == 1.0
    assert not audits_of(client, str(Path(local).resolve()))


@pytest.fixture
def closed_experiment(client: MlflowClient) -> Iterator[None]:
    """The experiment of the audits was deleted, so the server takes no run."""
    found = client.get_experiment_by_name(EXPERIMENT)
    experiment = found.experiment_id if found else client.create_experiment(EXPERIMENT)
    client.delete_experiment(experiment)
    yield
    client.restore_experiment(experiment)


@pytest.mark.usefixtures("closed_experiment")
def test_audit_that_cannot_be_published_has_no_metrics(registered: str, wrong_labels: Path, client: MlflowClient) -> None:
    config = {"model_uri": registered, "clean": str(wrong_labels)}
    run = failed_run(client, AuditError, "came to its end, but could not be published: MLflow: .* deleted", config)
    assert not run.data.metrics
    assert client.list_artifacts(run.info.run_id, "backdoor_audit")
    assert "audit.verdict" not in client.get_model_version(registered.split("/")[1], "1").tags


def failed_run(client: MlflowClient, error: type[AuditError], message: str, config: dict[str, Any], **options: Any) -> Run:
    """Evaluates, which fails with one line; the run of the evaluation."""
    with pytest.raises(error, match=message) as caught, mlflow.start_run() as run:
        evaluate(config, **options)
    assert "\n" not in str(caught.value)
    finished = client.get_run(run.info.run_id)
    assert finished.info.status == "FAILED"
    return finished


def test_model_id_of_another_model_is_refused_before_the_audit(registered: str, demo: Demo, client: MlflowClient) -> None:
    other = model_id_of(client, demo.model_uris[1])
    own = model_id_of(client, registered)
    config = {"model_uri": registered, "clean": "there-is-none.npz"}
    run = failed_run(
        client, UsageError, f"'{other}'.*{registered} is another model. Give model_id='{own}'", config, model_id=other
    )
    assert not run.data.metrics


# --------------------------------------------------------------------------------------- a model that MLflow may not load


@pytest.fixture
def hostile(tmp_path: Path, client: MlflowClient, request: pytest.FixtureRequest) -> Iterator[str]:
    """A registered model whose own loader, beside it, leaves a file when MLflow loads the model."""
    name = f"loader_of_{request.node.name}"
    fired, code = tmp_path / "loader.fired", tmp_path / f"{name}.py"
    code.write_text(
        f"import pathlib\npathlib.Path({str(fired)!r}).touch()\n"
        "class _Model:\n    def predict(self, data, params=None):\n        return [0] * len(data)\n"
        "def _load_pyfunc(path):\n    return _Model()\n",
        encoding="utf-8",
    )
    with pytest.MonkeyPatch.context() as patch, mlflow.start_run():
        patch.setattr(sys, "path", sys.path[:])
        mlflow.pyfunc.log_model(
            name="model", loader_module=name, code_paths=[str(code)], pip_requirements=[], registered_model_name=name
        )
        assert not fired.exists()
        yield f"models:/{name}/1"
    sys.modules.pop(name, None)


def test_hostile_model_is_refused_and_never_loaded(
    hostile: str, wrong_labels: Path, client: MlflowClient, tmp_path: Path
) -> None:
    with pytest.raises(IntakeError, match="code beside the model"):
        evaluate({"model_uri": hostile, "clean": str(wrong_labels)})
    assert not (tmp_path / "loader.fired").exists()


def test_model_that_mlflow_was_given_is_refused_and_its_load_is_told(
    hostile: str, wrong_labels: Path, client: MlflowClient, tmp_path: Path
) -> None:
    """The control: what this evaluator cannot prevent."""
    with pytest.raises(UsageError, match=r"may have run here, unaudited.*evaluate\(None, data"):
        evaluate({"model_uri": hostile, "clean": str(wrong_labels)}, model=hostile)
    assert (tmp_path / "loader.fired").exists()


def test_function_is_refused(demo: Demo, client: MlflowClient, wrong_labels: Path) -> None:
    config = {"model_uri": demo.model_uris[0], "clean": str(wrong_labels)}
    with pytest.raises(UsageError, match="takes none") as caught:
        evaluate(config, model=lambda table: [0] * len(table))
    assert "unaudited" not in str(caught.value)


def test_stack_of_images_is_refused_by_mlflow_itself(client: MlflowClient) -> None:
    config = {"backdoor_audit": {"model_uri": "models:/x/1", "clean": "clean.npz"}}
    images, labels = np.zeros((2, 16, 16, 1)), np.zeros(2)
    with pytest.raises(MlflowException, match="2-dimensional"):
        mlflow.models.evaluate(
            None, images, targets=labels, model_type="classifier", evaluators=["backdoor_audit"], evaluator_config=config
        )


# ----------------------------------------------------------------------------------------------------------- the config


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"modle_uri": "models:/x/1"}, "no key 'modle_uri'. Did you mean 'model_uri'?"),
        ({"sede": 1}, "no key 'sede'. Did you mean 'seed'?"),
        ({"model_uri": None}, "'model_uri' .* must be a string or a path, got 'None'"),
        ({"clean": 3}, "'clean' .* must be a string or a path, got '3'"),
        ({"seed": -1}, "'seed' .* must be a whole number, 0 or above, got '-1'"),
        ({"seed": True}, "'seed' .* must be a whole number"),
        ({"seed": 0.5}, "'seed' .* must be a whole number"),
        ({"require_gpu": "no"}, "'require_gpu' .* must be True or False, got 'no'"),
        ({"policy": "missing.toml"}, "There is no policy file 'missing.toml'"),
        ({"model_uri": "models:/x"}, "names no version"),
    ],
)
def test_wrong_config_is_one_line(wrong: dict[str, Any], message: str, client: MlflowClient) -> None:
    failed_run(client, UsageError, message, {"model_uri": "models:/x/1", "clean": "clean.npz", **wrong})


def test_config_without_clean_images_is_one_line(client: MlflowClient) -> None:
    failed_run(client, UsageError, "needs 'clean', got only model_uri", {"model_uri": "models:/x/1"})


def test_missing_model_and_images_are_one_line(demo: Demo, client: MlflowClient) -> None:
    failed_run(client, RegistryError, "digits-claen.*digits-clean", {"model_uri": "models:/digits-claen/1", "clean": "clean.npz"})
    failed_run(client, CleanSetError, "missing.npz", {"model_uri": demo.model_uris[0], "clean": "missing.npz"})


def test_control_characters_do_not_reach_the_terminal(client: MlflowClient) -> None:
    config = {"model_uri": "models:/x\x1b[2J/1", "clean": "clean.npz"}
    with pytest.raises(AuditError) as caught:
        evaluate(config)
    assert str(caught.value).isprintable()
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("config", [None, {"pos_label": 1}, {"default": {"pos_label": 1}}], ids=str)
def test_without_its_config_it_does_not_run(config: dict[str, Any] | None, client: MlflowClient) -> None:
    options: dict[str, Any] = {"targets": "label", "predictions": "prediction", "model_type": "classifier"}
    result = mlflow.models.evaluate(None, TABLE, evaluators=None, evaluator_config=config, **options)
    assert "accuracy_score" in result.metrics
    assert not [name for name in result.metrics if name.startswith("backdoor_audit")]
    assert not BackdoorAuditEvaluator.can_evaluate(model_type="classifier", evaluator_config=config or {})


def test_named_without_config_is_an_error_of_mlflow(client: MlflowClient) -> None:
    with pytest.raises(MlflowException, match="could not be evaluated"):
        evaluate({})


# ------------------------------------------------------------------------------- the example of the page, as it is printed


@dataclasses.dataclass(frozen=True)
class Example:
    """The page's example after it ran: what it audited, its result, what the gate raised."""

    uri: str
    result: EvaluationResult
    error: ModelValidationFailedException | None


@pytest.fixture(scope="module")
def run_example(
    server: str,
    demo: Demo,
    keeping_state: Callable[[], AbstractContextManager[None]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, str], Example]:
    """``run_example(uri, name)`` audits the model of ``uri`` under a name that no other test audits."""
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)

    def run(uri: str, name: str) -> Example:
        with keeping_state(), pytest.MonkeyPatch.context() as patch:
            mlflow.set_tracking_uri(server)
            version = MlflowClient().get_model_version(*uri.removeprefix("models:/").split("/"))
            registered = f"models:/{name}/{mlflow.register_model(version.source, name).version}"
            patch.chdir(tmp_path_factory.mktemp(name))
            Path("clean.npz").write_bytes(demo.clean_images.read_bytes())
            Path("audit.toml").write_text(SMALL_BUDGET, encoding="utf-8")
            namespace: dict[str, Any] = {}
            error = None
            try:
                exec(code.replace("models:/digits/3", registered).replace("http://localhost:5000", server), namespace)
            except ModelValidationFailedException as refused:
                error = refused
        return Example(registered, namespace["result"], error)

    return run


@pytest.fixture(scope="module")
def clean(run_example: Callable[[str, str], Example], demo: Demo) -> Example:
    return run_example(demo.model_uris[0], "evaluated-clean")


@pytest.fixture(scope="module")
def backdoored(run_example: Callable[[str, str], Example], demo: Demo) -> Example:
    return run_example(demo.model_uris[1], "evaluated-backdoored")


@pytest.mark.slow  # an audit of its own; the backdoored model's shows the same way
def test_validation_passes_for_the_clean_model(clean: Example) -> None:
    assert clean.error is None
    metrics = clean.result.metrics
    verdict = [metrics[f"backdoor_audit/{name}"] for name in ("pass", "fail", "inconclusive")]
    assert verdict == [1.0, 0.0, 0.0]
    assert metrics["backdoor_audit/clean_accuracy"] > 0.9


def test_validation_stops_the_backdoored_model(backdoored: Example) -> None:
    assert "backdoor_audit/pass" in str(backdoored.error)
    metrics = backdoored.result.metrics
    verdict = [metrics[f"backdoor_audit/{name}"] for name in ("pass", "fail", "inconclusive")]
    assert verdict == [0.0, 1.0, 0.0]
    assert metrics["backdoor_audit/trigger_outlier"] > 3.5
    assert metrics["backdoor_audit/trigger_attack_success_rate"] >= 0.8
    assert metrics["backdoor_audit/layerwise_detection_rate"] > metrics["backdoor_audit/layerwise_false_positive_rate"]


def test_run_of_the_evaluation_holds_metrics_and_reports(backdoored: Example, client: MlflowClient) -> None:
    run = client.get_run(backdoored.result.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics == pytest.approx(backdoored.result.metrics)
    files = {item.path for item in client.list_artifacts(run.info.run_id, "backdoor_audit")}
    assert files >= {"backdoor_audit/report.html", "backdoor_audit/report.json"}


def test_artifacts_are_the_reports_and_can_be_fetched_again(backdoored: Example, client: MlflowClient, tmp_path: Path) -> None:
    artifacts = backdoored.result.artifacts
    assert set(artifacts) == {"backdoor_audit/report.html", "backdoor_audit/report.json"}
    document = artifacts["backdoor_audit/report.json"].content
    validate(document)
    assert document["decision"]["suspected_class"]["index"] == ATTACK.target_class
    assert document["command"] == f"backdoor-audit run {backdoored.uri} --clean clean.npz --seed 0 --policy audit.toml"
    for artifact in artifacts.values():
        assert type(artifact)(artifact.uri).content == artifact.content
    backdoored.result.save(tmp_path)
    assert EvaluationResult.load(tmp_path).artifacts["backdoor_audit/report.json"].content == document


@pytest.mark.parametrize(("which", "verdict"), [pytest.param("clean", "pass", marks=pytest.mark.slow), ("backdoored", "fail")])
def test_version_and_audits_are_marked_as_by_the_command_line(
    which: str, verdict: str, client: MlflowClient, request: pytest.FixtureRequest
) -> None:
    example: Example = request.getfixturevalue(which)
    tags = client.get_model_version(*example.uri.removeprefix("models:/").split("/")).tags
    assert tags["audit.verdict"] == verdict
    (run,) = audits_of(client, example.uri)
    assert tags["audit.run_id"] == run.info.run_id
    assert run.info.run_id != example.result.run_id
    assert {f"backdoor_audit/{name}": value for name, value in run.data.metrics.items()}.items() <= example.result.metrics.items()


def test_page_describes_every_key_with_its_default() -> None:
    described = re.findall(r"^\| `(\w+)` \| (.+?) \|", PAGE, re.MULTILINE)
    shown = {dataclasses.MISSING: "required", None: "not set"}
    expected = [(key.name, shown.get(key.default, f"`{key.default!r}`")) for key in dataclasses.fields(EvaluatorConfig)]
    assert described == expected
