"""What reaches the terminal."""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest

from audit_plugin import cli as command_line
from audit_plugin import publishing, registry, sandbox
from audit_plugin.attestation import SIGNING_KEY, VERIFYING_KEYS, generate_keys
from audit_plugin.cli import auditing, console, demonstrating, gating
from audit_plugin.errors import UsageError
from audit_plugin.requirements import load_requirements
from tests.audited_registry import AuditedRegistry

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


@pytest.mark.parametrize("elsewhere", [False, True], ids=["", "the user has a registry of its own"])
def test_demo_says_how_to_repeat_an_audit_in_a_folder_with_a_space(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, elsewhere: bool
) -> None:
    monkeypatch.delenv("MLFLOW_REGISTRY_URI", raising=False)
    if elsewhere:
        monkeypatch.setenv("MLFLOW_REGISTRY_URI", "http://127.0.0.1:9")
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
        *(["MLFLOW_REGISTRY_URI=sqlite:////my demo/mlflow.db"] if elsewhere else []),
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


# ------------------------------------------------------------------------------------------- readers who do not stay


@pytest.fixture
def unread() -> Iterator[int]:
    """The writing end of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> AuditedRegistry:
    """'digits', whose first version passed its audit and whose second has none; the files lie on this disk."""
    made = AuditedRegistry(tmp_path_factory.mktemp("audited"))
    files = made.folder / "artifacts" / "models" / hashlib.sha256(b"digits").hexdigest()[:12]
    for number, verdict in enumerate(("pass", None), start=1):
        made.add("digits", verdict, source=str(files / str(number)))
    return made


@pytest.mark.parametrize(
    ("arguments", "both", "code"),
    [
        (["verify", "models:/digits/1"], True, 0),
        (["verify", "models:/digits/2", "--format", "json"], False, 3),
        (["gate", "models:/digits/1", "--promote", "champion"], True, 0),
        (["gate", "models:/digits/1", "--promote", "champion", "--format", "json"], False, 0),
        (["policy", "check", "--policy", os.devnull], True, 0),
        (["--help"], False, 0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_whoever_stops_reading_changes_neither_the_exit_code_nor_what_is_done(
    unread: int, audited: AuditedRegistry, arguments: list[str], code: int, both: bool
) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "audit_plugin.cli", *arguments],
        env=os.environ | audited.environment | {"MLFLOW_TRACKING_URI": audited.database, "MLFLOW_REGISTRY_URI": audited.database},
        stdout=unread,
        stderr=unread if both else subprocess.PIPE,
        text=True,
        check=False,
    )
    assert finished.returncode == code, finished.stderr
    assert both or not {"Traceback", "Exception", "BrokenPipeError", "error:"} & set(finished.stderr.split())
    if "--promote" in arguments:
        assert audited.client.get_registered_model("digits").aliases == {"champion": 1}
        audited.client.delete_registered_model_alias("digits", "champion")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_what_nobody_reads_goes_nowhere_however_much_it_is(unread: int, unbuffered: str, tmp_path: Path) -> None:
    code = f"""
import sys
from audit_plugin.cli.console import outlive_readers, stderr, stdout
outlive_readers()
for _ in range(3):
    sys.stdout.write("x" * 300_000)
    stdout.print("y" * 300_000)
    print("z", flush=True)
    stderr.print("y" * 300_000)
open({str(tmp_path / "done")!r}, "x").close()
"""
    finished = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONUNBUFFERED": unbuffered}, stdout=unread, stderr=unread, check=False
    )
    assert finished.returncode == 0
    assert (tmp_path / "done").exists()


def test_output_that_is_read_arrives_as_it_was_written() -> None:
    code = "import sys; from audit_plugin.cli.console import outlive_readers; outlive_readers(); print('\u00e9\\nb'); sys.exit(3)"
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    finished = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)
    assert (finished.returncode, finished.stdout, finished.stderr) == (3, b"\xe9\nb\n", b"")


def test_a_pipe_that_breaks_elsewhere_is_an_error_and_no_failed_audit(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 1 says that an audit failed; typer ends so on every broken pipe."""

    def broken(*arguments: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(gating, "_look_at", broken)
    finished = cli("gate", "models:/digits/1", "--clean", "clean.npz")
    assert (finished.returncode, finished.stderr.strip()) == (2, "error: Broken pipe")


@pytest.mark.parametrize(("signing", "said"), [(None, "is not set"), ("other", "holds none of these keys"), ("ours", "")])
def test_an_audit_whose_verdict_would_not_count_is_not_begun(
    signing: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = {name: generate_keys(tmp_path / name) for name in ("ours", "other")}
    monkeypatch.delenv(SIGNING_KEY, raising=False)
    if signing is not None:
        monkeypatch.setenv(SIGNING_KEY, str(pairs[signing][0]))
    for keys, counts in ((str(pairs["ours"][1]), not said), ("", True)):
        monkeypatch.setenv(VERIFYING_KEYS, keys)
        with nullcontext() if counts else pytest.raises(UsageError, match=f"would not count: .* {said}"):
            gating._check_key(load_requirements(None))


# ------------------------------------------------------------------------------------------------ SIGTERM and SIGHUP


@pytest.mark.parametrize(
    ("command", "number"),
    [("run", signal.SIGTERM), ("gate", signal.SIGTERM), ("repair", signal.SIGHUP), ("guard", signal.SIGTERM)],
)
def test_a_signal_leaves_no_copy_of_the_model_behind(command: str, number: signal.Signals, tmp_path: Path) -> None:
    """Twice, as `timeout` sends it: the second one must not stop the cleaning up."""
    code = """
import signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may be run with nohup
from audit_plugin import registry
from audit_plugin.cli import main

def pin(uri, destination):
    (destination / "model").mkdir()
    (destination / "model" / "weights").write_text("private")
    print("copied", flush=True)
    time.sleep(60)

registry.pin = pin
main()
"""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", code, command, "model.onnx", "--clean", "clean.npz"],
        env=os.environ | {"TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "copied\n"
        assert list(temporary.rglob("weights"))
        process.send_signal(number)
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (2, "")
    assert next(line for line in err.splitlines() if not line.startswith("INFO")).startswith("error: Interrupted")
    assert "Traceback" not in err
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_that_the_caller_ignores_stays_ignored(name: str) -> None:
    code = f"""
import signal
from audit_plugin import cli
signal.signal(signal.{name}, signal.SIG_IGN)
cli._take_signals_for_ctrl_c()
signal.raise_signal(signal.{name})
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
