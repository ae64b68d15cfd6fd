"""Hostile text becomes visible, bounded, harmless text."""

from __future__ import annotations

import unicodedata

import pytest

from audit_plugin.report.sanitise import clean_text, escape_markdown, markdown_code, shorten


def test_nothing_invisible_is_left(hostile_strings):
    for text in hostile_strings:
        categories = {unicodedata.category(character) for character in clean_text(text)}
        assert not categories & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def test_control_and_bidi_characters_are_shown_not_dropped():
    assert clean_text("cat\x1b[31m\u202egpj") == "cat\\x1b[31m\\u202egpj"
    assert clean_text("a\u200bb") != clean_text("ab")
    assert clean_text("a\tb\nc") == "a b c"
    assert clean_text("a\r\nb\x00", multiline=True) == "a\nb\\x00"


def test_ordinary_text_of_any_language_is_untouched():
    for text in ("stop sign", "Größe 3/4 ±1", "猫と犬", "кошка", "🚗 car", "é", "e\u0301"):
        assert clean_text(text) == text


@pytest.mark.parametrize(("limit", "expected"), [(5, "ab…ij"), (4, "ab…j"), (1, "…"), (10, "abcdefghij"), (None, "abcdefghij")])
def test_shorten_keeps_both_ends(limit, expected):
    assert shorten("abcdefghij", limit) == expected


def test_cost_is_bounded_for_enormous_text():
    assert len(clean_text("\x1b" * 50_000_000, 100)) == 100


@pytest.mark.parametrize("text", ["# heading", "- item", "+ item", "1. item", "12) item", "= underline", "~~~", "> quote"])
def test_markdown_cannot_start_a_block(text):
    assert escape_markdown(text)[0] in "\\&1"
    assert escape_markdown(text)[:3] not in ("1. ", "12)")


def test_markdown_cannot_make_links_or_html():
    escaped = escape_markdown("](javascript:alert(1)) ![x](http://e.example/x.png) <b> www.e.example `code`")
    assert "<" not in escaped
    assert "://e" not in escaped
    assert "www.e" not in escaped
    unescaped = escaped.replace("\\\\", "").replace("\\]", "").replace("\\[", "").replace("\\`", "").replace("\\!", "")
    assert not set(unescaped) & set("[]`!")


def test_markdown_code_cannot_be_left():
    assert markdown_code("a`b``c\n# d") == "`a'b''c # d`"
    assert markdown_code("") == "(empty)"
