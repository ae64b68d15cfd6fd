"""``summary.html``: one self-contained page over a whole scan; no script, nothing fetched, every expression escaped."""

from __future__ import annotations

import jinja2
import mlflow

from audit_plugin.registry import redacted
from audit_plugin.report.html import report_environment
from pipelines.scan.summary import OUTCOMES, Summary

MOST_ROWS = 5000


def run_address(experiment_id: str | None, run_id: str | None) -> str | None:
    """A run's page in MLflow's UI; None without an HTTP server."""
    server = redacted(mlflow.get_tracking_uri()).rstrip("/")
    if experiment_id is None or run_id is None or not run_id.isalnum() or not server.startswith(("http://", "https://")):
        return None
    return f"{server}/#/experiments/{experiment_id}/runs/{run_id}"


def render_page(summary: Summary, audits_experiment: str | None) -> str:
    """The whole page; ``audits_experiment`` is the id of the experiment that keeps the audits."""
    report = report_environment()
    environment = report.overlay(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader("pipelines.scan", "templates"), *filter(None, [report.loader])])
    )
    rows = sorted(summary.rows, key=lambda row: (OUTCOMES.index(row.outcome), not row.promoted))
    return environment.get_template("scan.html.jinja").render(
        summary=summary,
        kind="fail" if summary.of("fail") else "pass" if summary.exit_code("any") == 0 else "inconclusive",
        outcomes=OUTCOMES,
        rows=[(row, run_address(audits_experiment, row.run_id)) for row in rows[:MOST_ROWS]],
        left_out=max(len(rows) - MOST_ROWS, 0),
    )
