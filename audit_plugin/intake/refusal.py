"""The one way to say no: which file, what was found, why that is refused, what to do next, in one line."""

from __future__ import annotations

from audit_plugin.errors import IntakeError

LOG_AGAIN = (
    "Log the model again with mlflow.pytorch.log_model(model, name=..., input_example=..., serialization_format='pt2'), which "
    "writes a .pt2."
)
FETCH_AGAIN = "Download the model again; if the file is the same, it was damaged or crafted."

LARGEST_VALUE = 2**31
"""Numbers in a single tensor that a graph may declare or ask for, 8 GiB in float32: a few bytes can ask for terabytes. What a
graph computes at run time is limited by the process that runs it."""

_LONGEST_QUOTE = 120


def refusal(path: str, found: str, reason: str, next_step: str) -> IntakeError:
    """The error for ``path``. All four parts may quote untrusted text, so control characters are escaped.

    >>> str(refusal("data/model.pth", "a pickle", "it can run code", "Log it again."))
    'data/model.pth: found a pickle. Refused: it can run code. Log it again.'
    """
    return IntakeError(printable(f"{path}: found {found}. Refused: {reason}. {next_step}"))


def quoted(value: object) -> str:
    """``value`` as a short quotation for a message.

    >>> quoted("a" * 200)[-6:]
    "aa...'"
    """
    text = value if isinstance(value, str) else type(value).__name__
    return repr(text if len(text) <= _LONGEST_QUOTE else text[: _LONGEST_QUOTE - 3] + "...")


def printable(text: str) -> str:
    """``text`` with everything escaped that could move a terminal's cursor or break a log line.

    >>> printable("a" + chr(27) + "[2Jb")
    'a\\\\x1b[2Jb'
    """
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
