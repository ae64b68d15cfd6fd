"""Audit image classifiers for backdoors.

    from audit_plugin.audit import audit

Importing the package itself brings neither torch nor mlflow along, so that reports can be read anywhere.
"""

from audit_plugin.errors import AuditError
from audit_plugin.types import AuditReport, ModelRef, Verdict

__all__ = ["AuditError", "AuditReport", "ModelRef", "Verdict"]
