"""The only package here that talks to MLflow: a URI becomes a pinned reference plus files; a report becomes a run, tags, a note.

MLflow's own loaders are never called. What is downloaded goes into a folder of our own, so that nobody can exchange a file
between the check and its use.

Imports go one way: connection <- versions <- pinning, reports <- registering.
"""

from audit_plugin.registry.connection import (
    EXPERIMENT,
    check_server,
    check_writing,
    describe_tracking,
    redacted,
    registry_of,
    run_page,
)
from audit_plugin.registry.pinning import PinnedModel, check_remote, fetch_images, pin, remote_files
from audit_plugin.registry.registering import GUARD_OF_TAG, REPAIRED_FROM_TAG, register_guard, register_repaired
from audit_plugin.registry.reports import (
    ATTESTATION_FILE,
    VERDICT_TAG,
    LoggedReport,
    fetch_report_files,
    log_report,
    metrics_of,
    without_note,
)
from audit_plugin.registry.versions import facts_of, promote, put_statement, registered_version, statement_on, version_facts

__all__ = [
    "ATTESTATION_FILE",
    "EXPERIMENT",
    "GUARD_OF_TAG",
    "REPAIRED_FROM_TAG",
    "VERDICT_TAG",
    "LoggedReport",
    "PinnedModel",
    "check_remote",
    "check_server",
    "check_writing",
    "describe_tracking",
    "facts_of",
    "fetch_images",
    "fetch_report_files",
    "log_report",
    "metrics_of",
    "pin",
    "promote",
    "put_statement",
    "redacted",
    "register_guard",
    "register_repaired",
    "registered_version",
    "registry_of",
    "remote_files",
    "run_page",
    "statement_on",
    "version_facts",
    "without_note",
]
