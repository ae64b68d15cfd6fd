"""Makes strings that a model, a tag or a file name brought safe to show to a person.

Class names, tags and paths belong to whoever made the model. Escaping for HTML is not enough for them: ANSI sequences repaint a
terminal, bidirectional overrides reverse what is read ('gpj.exe'), zero-width characters make two names look the same. Such
characters are made visible instead of dropped, so that a reader sees that something is odd.
"""

from __future__ import annotations

import unicodedata

ELLIPSIS = "\u2026"
DEFAULT_LIMIT = 300

# Cc control, Cf format (bidi, zero width, tags), Cs lone surrogates, Co private use, Cn unassigned, Zl and Zp line separators.
_MADE_VISIBLE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
# Letters and symbols by category, yet drawn as nothing.
_INVISIBLE = frozenset("\u115f\u1160\u2800\u3164\uffa0")
# More stacked accents than any script uses; beyond it they smear over the neighbouring lines.
_LONGEST_MARK_RUN = 4

_MARKDOWN_SPECIAL = "\\`*_[]~|#!"
_MARKDOWN_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def clean_text(value: object, limit: int | None = DEFAULT_LIMIT, *, multiline: bool = False) -> str:
    r"""``value`` as one line (or several) of harmless, visible text of at most ``limit`` characters.

    >>> clean_text("cat\x1b[31m\u202egpj")
    'cat\\x1b[31m\\u202egpj'
    """
    text = value if isinstance(value, str) else str(value)
    if limit is not None and len(text) > 4 * limit:
        # Escaping a gigabyte to show its first line would be a way to stop the report from being written.
        text = text[: 2 * limit] + ELLIPSIS + text[-2 * limit :]
    text = text.replace("\r\n", "\n")
    pieces: list[str] = []
    marks = 0
    for character in text:
        category = unicodedata.category(character)
        marks = marks + 1 if category in ("Mn", "Me") else 0
        if marks > _LONGEST_MARK_RUN:
            continue
        if character == "\n" and multiline:
            pieces.append(character)
        elif character in "\t\n":
            pieces.append(" ")
        elif category in _MADE_VISIBLE or character in _INVISIBLE:
            pieces.append(_escape_sequence(character))
        else:
            pieces.append(character)
    return shorten("".join(pieces), limit)


def shorten(text: str, limit: int | None) -> str:
    """``text`` in at most ``limit`` characters; the middle goes, because both ends of a path or name carry meaning.

    >>> shorten("abcdefghij", 5)
    'ab…ij'
    """
    if limit is None or len(text) <= limit:
        return text
    kept = max(limit - 1, 0)
    head = (kept + 1) // 2
    tail = kept - head
    return text[:head] + ELLIPSIS + (text[-tail:] if tail else "")


def escape_markdown(value: object, limit: int | None = DEFAULT_LIMIT) -> str:
    """``value`` as Markdown that shows exactly this text: no link, heading, list, image, table or HTML can come out of it.

    ``limit`` counts the characters that are shown, not the escapes.
    """
    text = clean_text(value, limit).strip()
    # Renderers turn bare addresses into links after unescaping; only a gap in the address stops all of them.
    text = text.replace("://", ":// ").replace("www.", "www .").replace("WWW.", "WWW .")
    escaped = "".join(
        _MARKDOWN_ENTITIES.get(character, "\\" + character if character in _MARKDOWN_SPECIAL else character) for character in text
    )
    if escaped[:1] in ("-", "+", "="):
        return "\\" + escaped
    number = escaped[: len(escaped) - len(escaped.lstrip("0123456789"))]
    if number and escaped[len(number) : len(number) + 1] in (".", ")"):
        return number + "\\" + escaped[len(number) :]
    return escaped


def markdown_code(value: object, limit: int | None = DEFAULT_LIMIT) -> str:
    """``value`` as a Markdown code span; backticks inside it become apostrophes, so that it cannot end early."""
    text = clean_text(value, limit).replace("`", "'").strip()
    return f"`{text}`" if text else "(empty)"


def _escape_sequence(character: str) -> str:
    code = ord(character)
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
