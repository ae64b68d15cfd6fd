"""Tells somebody that a promoted version newly fails. What goes wrong here is a warning, never the scan's failure."""

from __future__ import annotations

import json
import logging
import os
import shlex
import subprocess
import time
import uuid
from collections.abc import Mapping
from typing import Any

import requests

from audit_plugin.errors import UsageError
from audit_plugin.registry import redacted
from audit_plugin.report.sanitise import clean_text
from mlflow_plugins.deliveries import signature_of
from pipelines.scan.summary import Summary

log = logging.getLogger(__name__)

URL, SECRET = "BACKDOOR_AUDIT_NOTIFY_URL", "BACKDOOR_AUDIT_NOTIFY_SECRET"
_EVENT = "promoted-version-fails"
_TIMEOUT_SECONDS = 60


def parse_command(command: str | None) -> tuple[str, ...]:
    """The words of a command line; no shell will see them.

    Raises:
        UsageError: a quotation does not end, or there is no word.
    """
    if command is None:
        return ()
    try:
        words = tuple(shlex.split(command))
    except ValueError as error:
        raise UsageError(f"--notify-command is no command line: {error}.") from error
    if not words:
        raise UsageError("--notify-command is empty. Give a program and its arguments.")
    return words


def message_of(summary: Summary, page: str | None) -> dict[str, Any]:
    """What is told; names, classes and reasons in it belong to whoever made the model."""
    alarming = set(summary.drift.alarming)
    return {
        "event": _EVENT,
        "scan_run_id": summary.run_id,
        "scan_page": page,
        "versions": [
            {
                "uri": row.uri,
                "name": row.name,
                "version": row.version,
                "aliases": list(row.aliases),
                "suspected_class": row.suspected,
                "reason": row.reason,
                "audit_run_id": row.run_id,
            }
            for row in summary.rows
            if row.uri in alarming
        ],
    }


def notify(message: Mapping[str, Any], command: tuple[str, ...], environment: Mapping[str, str] = os.environ) -> None:
    """Give the message to the command's standard input, and POST it to the address in the environment."""
    body = json.dumps(message).encode()
    if command:
        _run(command, body)
    if url := environment.get(URL):
        _post(url, body, environment.get(SECRET, ""))


def _run(command: tuple[str, ...], body: bytes) -> None:
    try:
        done = subprocess.run(command, input=body, stdout=subprocess.DEVNULL, timeout=_TIMEOUT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("Nobody was notified: '%s' failed: %s", clean_text(command[0], 100), clean_text(error))
        return
    if done.returncode:
        log.warning("'%s' ended with %d, so perhaps nobody was notified.", clean_text(command[0], 100), done.returncode)


def _post(url: str, body: bytes, secret: str) -> None:
    identifier, timestamp = str(uuid.uuid4()), str(int(time.time()))
    headers = {
        "Content-Type": "application/json",
        "X-MLflow-Delivery-Id": identifier,
        "X-MLflow-Timestamp": timestamp,
    }
    if secret:
        headers["X-MLflow-Signature"] = signature_of(secret, identifier, timestamp, body)
    try:
        answer = requests.post(url, data=body, headers=headers, timeout=_TIMEOUT_SECONDS, allow_redirects=False)
        if answer.status_code // 100 != 2:
            log.warning("The address in %s answered %d, so perhaps nobody was notified.", URL, answer.status_code)
    except (requests.RequestException, ValueError) as error:
        log.warning("Nobody was notified: the address in %s failed: %s", URL, clean_text(redacted(str(error))))
