"""The errors of an audit. Each carries one readable line: what was expected, what came, what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AuditError(Exception):
    """Base of every error that the tool raises on purpose; the command line prints its one line, without a traceback."""


class UsageError(AuditError, ValueError):
    """The request itself is wrong (a bad option, an unknown policy key): exit code 4."""


class RegistryError(AuditError):
    """MLflow could not be reached, or does not hold what was asked for."""


class IntakeError(AuditError):
    """The model's files were refused before anything of them was loaded."""


class SandboxError(AuditError):
    """What ran in the sandbox failed, was killed, or took too long."""


class SandboxLimitError(SandboxError):
    """What ran in the sandbox took more time, memory, disk or processes than it may."""


class SubjectError(AuditError):
    """The model was loaded but is nothing that can be audited (no classifier, NaN weights, a shape that does not fit)."""


class ExportError(AuditError):
    """The model could not be exported to ONNX, or torch and ONNX Runtime disagree about a tap."""


class CleanSetError(AuditError, ValueError):
    """The clean or suspect images cannot be used (missing folder, wrong size, labels outside the model's classes)."""


class RepairError(AuditError):
    """A model could not be repaired, or not within its accuracy budget; it is as it was."""


class InapplicableError(AuditError):
    """A check cannot measure this model; the audit records the reason and goes on."""


class AttestationError(AuditError):
    """A signed statement about a model does not hold: no envelope, a foreign signature, another model."""


def nearest(wrong: str, valid: Iterable[str]) -> str:
    """' Did you mean ...?' for an unknown name, or the list of valid ones when nothing is near.

    >>> nearest("taus", ["tau", "seed"])
    " Did you mean 'tau'?"
    """
    names = sorted(valid)
    close = difflib.get_close_matches(wrong, names, n=1)
    if close:
        return f" Did you mean '{close[0]}'?"
    return f" Valid names: {', '.join(names)}." if names else ""


def first_line(error: Exception) -> str:
    """What a library's exception says, as part of a message of our own: its first line, shortened, without the full stop."""
    text = str(error).strip()
    return text.splitlines()[0][:200].rstrip(".") if text else type(error).__name__
