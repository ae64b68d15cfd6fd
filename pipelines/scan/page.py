"""``summary.html``: one self-contained page over a whole scan; no script, nothing fetched, every expression escaped."""

from __future__ import annotations

import jinja2

from audit_plugin.registry import run_page
from audit_plugin.report.html import report_environment
from pipelines.scan.summary import OUTCOMES, Summary

MOST_ROWS = 5000


def run_address(experiment_id: str | None, run_id: str | None) -> str | None:
    """A run's page in MLflow's UI; None without an HTTP server, and for what is no id of a run."""
    return run_page(experiment_id, run_id) if experiment_id and run_id and run_id.isalnum() else None


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
