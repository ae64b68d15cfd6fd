"""``backdoor-audit webhook``: audit new versions when MLflow reports them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

webhook_app = typer.Typer(
    help="Audit new versions when MLflow's webhook reports them.", no_args_is_help=True, rich_markup_mode="rich"
)


@webhook_app.command()
def serve(
    host: Annotated[
        str, typer.Option(help="Address to listen on. MLflow asks for https, so put a TLS proxy in front.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 5055,
    jobs: Annotated[int, typer.Option(min=1, help="Audits that run at the same time.")] = 1,
    time_limit: Annotated[int, typer.Option(min=1, help="Seconds after which an audit is stopped.")] = 3600,
    policy: Annotated[
        Path | None,
        typer.Option(
            envvar="BACKDOOR_AUDIT_POLICY", help="Policy file, audit.toml, whose section clean_images says what to audit with."
        ),
    ] = None,
) -> int:
    """Receive model_version.created and audit each version in a process of its own. The secret: BACKDOOR_AUDIT_WEBHOOK_SECRET."""
    from mlflow_plugins import webhook

    secret = webhook.secret_from_environment()
    audits = webhook.start_jobs(policy, workers=jobs, time_limit_seconds=time_limit)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", force=True)
    logging.getLogger("mlflow_plugins").setLevel(logging.INFO)
    webhook.serve(host, port, secret, audits)
    return 0
