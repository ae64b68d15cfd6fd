"""The command line: the only place that prints or exits.

Exit codes: 0 pass, 1 fail, 2 error, 3 inconclusive, 4 usage.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from audit_plugin.cli import auditing, gating, repairing, scanning
from audit_plugin.cli.console import (
    EXIT_CODES,
    EXIT_ERROR,
    EXIT_USAGE,
    FORMATS,
    LONGEST_MESSAGE,
    complain,
    configure_logging,
    outlive_readers,
    stdout,
)
from audit_plugin.cli.demonstrating import demo
from audit_plugin.cli.policy import policy_app
from audit_plugin.cli.webhook import webhook_app
from audit_plugin.errors import AuditError, UsageError

__all__ = ["EXIT_CODES", "EXIT_ERROR", "EXIT_USAGE", "FORMATS", "app", "main"]

_TYPER_INTERRUPTED = 130  # what newer typers make of Ctrl-C; no command of ours returns it
_click_errors = sys.modules[typer.BadParameter.__module__]  # click's own, or those of the copy that newer typers carry
_log = logging.getLogger(__name__)

app = typer.Typer(
    help="Audit registered image classifiers for backdoors.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        stdout.print(f"mlflow-backdoor-audit {importlib.metadata.version('mlflow-backdoor-audit')}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None: ...


def doctor() -> int:
    """Say what this installation can do: versions, execution providers that really load, whether MLflow answers."""
    from audit_plugin.doctor import diagnose
    from audit_plugin.report.sanitise import clean_text

    configure_logging(verbose=False)
    table = Table("", "what", "found", box=None, pad_edge=False)
    findings = diagnose()
    for finding in findings:
        mark = "[green]ok[/green]" if finding.works else "[red]no[/red]" if finding.required else "[yellow]--[/yellow]"
        table.add_row(mark, finding.name, Text(clean_text(finding.detail, LONGEST_MESSAGE)))
    stdout.print(table)
    return 0 if all(finding.works for finding in findings if finding.required) else EXIT_ERROR


app.command(epilog=auditing.RUN_EXAMPLES)(auditing.run)
app.command(epilog=scanning.SCAN_EXAMPLES)(scanning.scan)
app.command(epilog=repairing.REPAIR_EXAMPLES)(repairing.repair)
app.command(epilog=repairing.GUARD_EXAMPLES)(repairing.guard)
app.command(epilog=gating.GATE_EXAMPLES)(gating.gate)
app.command(epilog=gating.VERIFY_EXAMPLES)(gating.verify)
app.command(epilog=gating.WAIVE_EXAMPLES)(gating.waive)
app.command()(gating.keygen)
app.add_typer(policy_app, name="policy")
app.add_typer(webhook_app, name="webhook")
app.command()(doctor)
app.command()(demo)


def main() -> None:
    """Entry point: one clear line and the right exit code for everything that can go wrong."""
    # Read when torch is first imported. Threads that spin while they wait made an audit ten times slower on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    outlive_readers()
    _take_signals_for_ctrl_c()
    sys.exit(_main(sys.argv[1:]))


def _take_signals_for_ctrl_c() -> None:
    """SIGTERM, or a terminal that is closed, ends a command in order, so that no copy of a private model is left behind.

    Either may come twice, as `timeout` sends SIGTERM: once the end has begun, they disturb no more. Commands with handlers of
    their own put them in place of this one.
    """
    is_ending = False

    def interrupt(number: int, frame: object) -> None:
        nonlocal is_ending
        if not is_ending:
            is_ending = True
            raise KeyboardInterrupt

    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):  # Windows has no SIGHUP
        if signal.getsignal(number) is signal.SIG_DFL:  # who started this may have it ignored, as nohup does
            signal.signal(number, interrupt)


def _main(arguments: Sequence[str]) -> int:
    try:
        code = app(list(arguments), prog_name="backdoor-audit", standalone_mode=False)
    except _click_errors.ClickException as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
        else:
            complain(error.format_message())
        return EXIT_USAGE
    except UsageError as error:
        complain(str(error))
        return EXIT_USAGE
    except AuditError as error:
        complain(str(error))
        return EXIT_ERROR
    except (KeyboardInterrupt, typer.Abort):
        code = _TYPER_INTERRUPTED
    except SystemExit as ended:
        if not isinstance(ended.__context__, BrokenPipeError):
            raise
        # Another pipe than standard output's, for which typer takes it and ends with the code of a failed audit.
        complain(str(ended.__context__.strerror))
        return EXIT_ERROR
    except OSError as error:
        complain(f"{error.strerror or error}: {error.filename}" if error.filename else str(error))
        return EXIT_ERROR
    except Exception as error:
        _log.debug("Unexpected error.", exc_info=True)
        complain(
            f"Unexpected {type(error).__name__}: {' '.join(str(error).split())[:300]}. Run again with --verbose for details."
        )
        return EXIT_ERROR
    if code == _TYPER_INTERRUPTED:
        complain("Interrupted.")
        return EXIT_ERROR
    return code if isinstance(code, int) else 0
