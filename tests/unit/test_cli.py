"""What reaches the terminal."""

from __future__ import annotations

import importlib.metadata
import logging
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest

from audit_plugin import cli as command_line
from audit_plugin import publishing, registry, sandbox
from audit_plugin.cli import auditing, console, demonstrating

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


def test_log_line_shows_the_models_control_characters_instead_of_sending_them(
    capfd: pytest.CaptureFixture[str], keeping_state
) -> None:
    with keeping_state():
        console.configure_logging(verbose=True)
        logging.getLogger("audit_plugin.model").warning("The layer '%s' is odd.", "\x1b[2J\u202egpj\nerror: forged")
    (line,) = capfd.readouterr().err.rstrip("\n").splitlines() or [""]
    assert "\x1b" not in line
    assert "\u202e" not in line
    assert r"\x1b[2J\u202egpj error: forged" in line


def test_traceback_keeps_its_lines(capfd: pytest.CaptureFixture[str], keeping_state) -> None:
    with keeping_state():
        console.configure_logging(verbose=True)
        try:
            raise ValueError("\x1b[2J")
        except ValueError:
            logging.getLogger("audit_plugin").debug("Unexpected.", exc_info=True)
    shown = capfd.readouterr().err
    assert "Traceback" in shown
    assert len(shown.splitlines()) > 3
    assert "\x1b[2J" not in shown


@pytest.mark.parametrize("name", ["csv", "parquet"])
def test_gate_has_no_tables_of_suspect_inputs(cli: Cli, tmp_path: Path, name: str) -> None:
    done = cli("gate", "models:/digits/1", "--format", f"text,{name}", "-o", tmp_path / "report")
    assert done.returncode == 4
    assert f"{name} is a table of suspect inputs" in done.stderr
    assert not (tmp_path / "report").exists()


def test_version_is_that_of_the_installed_package(cli: Cli) -> None:
    done = cli("--version")
    assert (done.returncode, done.stdout) == (0, f"mlflow-backdoor-audit {importlib.metadata.version('mlflow-backdoor-audit')}\n")


def test_doctor_says_what_the_sandbox_really_does(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "network" in cli("doctor").stdout
    nothing = sandbox.bubblewrap.Bubblewrap((), "bubblewrap that does nothing")
    monkeypatch.setattr(sandbox, "bubblewrap_command", lambda *arguments, **options: nothing)
    shown = " ".join(cli("doctor").stdout.split())
    assert "-- sandbox NETWORK NOT BLOCKED, FILES OF THIS USER READABLE, by bubblewrap that does nothing." in shown
    assert "Install bubblewrap" in shown


def test_doctor_shows_the_tracking_uri_as_it_is_but_for_its_credentials(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console.stdout, "_width", 400)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/[red]none.db")
    assert "[red]none.db" in cli("doctor").stdout
    mlflow.set_tracking_uri("http://user:secret@127.0.0.1:9")
    shown = cli("doctor").stdout
    assert "http://127.0.0.1:9" in shown
    assert "secret" not in shown


def test_demo_says_how_to_repeat_an_audit_in_a_folder_with_a_space(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = SimpleNamespace(
        tracking_uri="sqlite:////my demo/mlflow.db", model_uris=("models:/digits/1",), clean_images="/my demo/clean.npz"
    )
    commands: list[str] = []

    def recorded(*arguments: object, command: str, **options: object) -> None:
        commands.append(command)
        raise KeyboardInterrupt

    monkeypatch.setattr("pipelines.demo.prepare_demo", lambda folder, say: prepared)
    monkeypatch.setattr(demonstrating, "audit_and_publish", recorded)
    finished = cli("demo")
    assert shlex.split(commands[0]) == [
        "MLFLOW_TRACKING_URI=sqlite:////my demo/mlflow.db",
        *("backdoor-audit", "run", "models:/digits/1", "--clean", "/my demo/clean.npz"),
    ]
    assert finished.stderr.strip() == "error: Interrupted."


@pytest.mark.parametrize("name", ["html", "sarif", "junit", "markdown", "csv", "parquet"])
def test_a_format_that_is_a_file_asks_for_a_folder(cli: Cli, name: str) -> None:
    finished = cli("run", "model.onnx", "--clean", "clean.npz", "--format", f"text,{name}")
    assert finished.returncode == 4
    assert f"the format {name} needs a folder to go to: add -o FOLDER" in finished.stderr


def test_an_unknown_format_names_the_nearest(cli: Cli) -> None:
    finished = cli("run", "model.onnx", "--clean", "clean.npz", "--format", "serif")
    assert finished.returncode == 4
    assert "There is no format 'serif'. Did you mean 'sarif'?" in finished.stderr


def test_help_lists_every_format(cli: Cli) -> None:
    shown = " ".join(cli("run", "--help").stdout.replace("\u2502", " ").split())
    assert f"Any of {', '.join(command_line.FORMATS)}, by commas." in shown


@pytest.mark.parametrize(
    ("quick", "log", "logged"),
    [(False, "auto", True), (True, "auto", False), (True, "always", True), (False, "never", False)],
)
def test_a_quick_audit_of_a_registered_model_is_logged_only_if_asked(
    quick: bool, log: str, logged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would take the place of an audit that the gate counts."""
    published: list[object] = []
    monkeypatch.setattr(registry, "pin", lambda *arguments: SimpleNamespace(came_from_mlflow=True))
    monkeypatch.setattr(registry, "check_server", lambda: None)
    monkeypatch.setattr(publishing, "audit_pinned", lambda *arguments, **options: "the report")
    monkeypatch.setattr(publishing, "publish", lambda report, suite: published.append(report))
    auditing.audit_and_publish("models:/digits/3", "clean.npz", log=console.LogChoice(log), quick=quick)
    assert published == (["the report"] if logged else [])
