"""What a confined process gives back is data from a stranger: refused unless it is what was
asked for, believed only where it must be."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest

from audit_plugin import confined
from audit_plugin.confined.jobs import RESULT_OF, AuditJob, GuardJob, InspectJob, PackageJob, RepairJob, resolved
from audit_plugin.errors import CleanSetError, IntakeError, SandboxError
from audit_plugin.policy import Policy, SandboxPolicy
from audit_plugin.records import write_record
from audit_plugin.types import AuditReport, InputSpec, Isolation, ModelRef, Verdict
from tests.unit.report.conftest import failing

pytestmark = pytest.mark.usefixtures("real_sandbox", "taken_over")
MODEL = ModelRef("models:/digits/1", "models:/digits/1", "sha256:0", (), "digits", "1")


@pytest.fixture
def taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confined, "WORKER", "tests.unit.confined_probe")


def job(folder: Path, action: str, policy: Policy | None = None) -> AuditJob:
    """A job whose clean images are a finished report, which the process under test gives back in one way or another."""
    (folder / "model").mkdir()
    write_record(failing(), folder / "clean")
    return AuditJob(MODEL, folder / "model", folder / "clean", policy or Policy(), 3, False, False, command=action)


def test_relative_and_linked_paths_reach_the_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It works in another folder, and sees only what it was given."""
    asked = job(tmp_path, "verdict")
    (tmp_path / "linked").symlink_to("clean")
    monkeypatch.chdir(tmp_path)
    for clean in ("clean", "linked"):
        near = dataclasses.replace(asked, folder=Path("model"), clean=Path(clean))
        assert confined.audit(near).decision.verdict is Verdict.PASS


@pytest.mark.parametrize("kind", RESULT_OF)
def test_no_job_leaves_with_a_relative_path(kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    common = AuditJob(MODEL, Path("model"), Path("a"), Policy(), 3, False, False, suspects=Path("b"))
    jobs = {
        AuditJob: common,
        RepairJob: RepairJob(common, None, None, None),
        GuardJob: GuardJob(common, 0.05, False),
        PackageJob: PackageJob(Path("model"), {}, InputSpec(8, 8, 1), None, 4, False),
        InspectJob: InspectJob(Path("model")),
    }
    found = resolved(jobs[kind])
    assert confined._inputs(found) == [tmp_path / path for path in confined._inputs(jobs[kind])]


def test_what_the_caller_knows_is_not_taken_from_the_child(tmp_path: Path) -> None:
    asked = job(tmp_path, "forged")
    report = confined.audit(asked)
    assert report.model == MODEL
    assert (report.seed, report.command) == (3, "forged")
    assert (report.policy, report.policy_digest) == (asked.policy.document(), asked.policy.digest)
    assert isinstance(report.isolation, Isolation)
    assert report.isolation.mechanism != "a bank vault"


def test_a_verdict_is_believed_since_nobody_else_can_give_it(tmp_path: Path) -> None:
    """Stated in the threat model: whoever breaks out of the graph's interpreter can forge the verdict of that very model."""
    assert confined.audit(job(tmp_path, "verdict")).decision.verdict is Verdict.PASS


@pytest.mark.parametrize(
    "action", ["nothing", "no JSON", "deep", "other type", "other field", "number for text", "objects", "bomb"]
)
def test_what_is_no_report_is_refused(tmp_path: Path, action: str) -> None:
    with pytest.raises(SandboxError, match="gave back no result that can be read"):
        confined.audit(job(tmp_path, action))
    assert not Path("/tmp/backdoor-audit-fired").exists()


@pytest.mark.parametrize("action", ["link", "linked folder"])
def test_links_to_the_callers_files_are_refused(tmp_path: Path, action: str) -> None:
    with pytest.raises(IntakeError, match=r"symbolic link|no plain folder"):
        confined.audit(job(tmp_path, action))


def test_an_error_is_one_of_ours_and_its_text_harmless(tmp_path: Path) -> None:
    with pytest.raises(CleanSetError) as caught:
        confined.audit(job(tmp_path, "own error"))
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) <= 2000


def test_an_error_of_another_name_is_the_sandboxs(tmp_path: Path) -> None:
    with pytest.raises(SandboxError, match="gone"):
        confined.audit(job(tmp_path, "foreign error"))


def test_an_exception_of_the_worker_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SandboxError, match="UsageError: not caught in here"):
        confined.audit(job(tmp_path, "fires"))


def test_words_of_the_child_are_checked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stages: list[str] = []
    shares: list[float] = []

    class Watcher:
        stage = staticmethod(stages.append)
        advance = staticmethod(shares.append)

    with caplog.at_level(logging.WARNING, "audit_plugin.confined"):
        confined.audit(job(tmp_path, "words"), progress=Watcher())
    assert shares == [1.0]
    assert not any("\x1b" in text for text in [*stages, caplog.text])
    assert "hi" in caplog.text
    assert "low" not in caplog.text


@pytest.mark.parametrize(
    ("action", "error", "message"),
    [
        ("linked file", IntakeError, "symbolic link"),
        ("two files", SandboxError, "Expected one model file from the sandbox, got 2"),
        ("no file", SandboxError, "Expected one model file from the sandbox, got 0"),
    ],
)
def test_the_repaired_model_is_one_plain_file(tmp_path: Path, action: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        confined.repair(RepairJob(job(tmp_path, action), None, None, None), tmp_path / "repaired")
    assert not (tmp_path / "repaired").exists()


def test_a_policy_that_requires_a_sandbox_gets_one_or_no_audit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = job(tmp_path, "verdict", Policy(sandbox=SandboxPolicy(required=True)))
    try:
        report = confined.audit(asked)
    except SandboxError as error:
        assert "the policy requires a sandbox" in str(error)  # noqa: PT017 - one of two right answers, by machine
    else:
        assert isinstance(report, AuditReport)
        assert report.isolation is not None
        assert report.isolation.is_complete


def test_limits_come_from_the_policy(tmp_path: Path) -> None:
    asked = job(tmp_path, "verdict", Policy(sandbox=SandboxPolicy(time_limit_minutes=1e-4)))
    with pytest.raises(SandboxError, match=r"longer than 0\.006 seconds"):
        confined.audit(dataclasses.replace(asked))
