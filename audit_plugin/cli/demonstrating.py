"""``backdoor-audit demo``."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from audit_plugin.cli.auditing import audit_and_publish
from audit_plugin.cli.console import configure_logging, print_report, show_progress, stdout
from audit_plugin.errors import AuditError


def demo(
    folder: Annotated[Path, typer.Option(help="Where the demo's models, data and MLflow database go.")] = Path("demo"),
) -> int:
    """Train a clean and a backdoored digit classifier, register both in an MLflow of their own, and audit them."""
    from pipelines.demo import EXPECTED, prepare_demo

    configure_logging(verbose=False)
    addresses = ["MLFLOW_TRACKING_URI"]
    if "MLFLOW_REGISTRY_URI" in os.environ:  # it would lead whoever repeats an audit away from the demo's models
        addresses.append("MLFLOW_REGISTRY_URI")
    with show_progress() as progress:
        prepared = prepare_demo(folder.resolve(), progress.stage)
    right = True
    for uri, expected in zip(prepared.model_uris, EXPECTED, strict=True):
        stdout.rule(uri)
        command = shlex.join(["backdoor-audit", "run", uri, "--clean", str(prepared.clean_images)])
        report, logged = audit_and_publish(
            uri,
            str(prepared.clean_images),
            output=folder / "reports" / uri.rsplit("/", 2)[-2],
            formats=("text", "json", "html"),
            command=" ".join([*(f"{name}={shlex.quote(prepared.tracking_uri)}" for name in addresses), command]),
        )
        print_report(report, ("text",), folder / "reports" / uri.rsplit("/", 2)[-2], logged)
        right = right and (report.decision.verdict, report.decision.suspected_class) == expected
    stdout.rule()
    stdout.print("Open the MLflow UI and look at the experiment 'backdoor-audits':")
    server = shlex.join([sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", prepared.tracking_uri, "--port", "5000"])
    stdout.print(f"  {server}", markup=False)
    if not right:
        raise AuditError("The demo did not find what it planted; please report this.")
    return 0
