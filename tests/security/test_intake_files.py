"""Links, special files and sizes: bytes that could lie, or change, outside the model's folder.

Symbolic links (CVE-2026-27489, CVE-2026-34447) and hard links (CVE-2026-34446) beside a model led onnx to other files.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from audit_plugin.errors import IntakeError
from audit_plugin.intake import files, inspect


@pytest.fixture
def folder(tmp_path: Path, tiny_pt2: bytes) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.pt2").write_bytes(tiny_pt2)
    return folder


def test_a_symbolic_link_is_refused_even_beside_a_good_model(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("token")
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(IntakeError, match=r"notes\.txt: found a symbolic link"):
        inspect(folder)


def test_a_linked_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (folder / "data").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(IntakeError, match="data: found a symbolic link"):
        inspect(folder)


def test_the_folder_itself_may_not_be_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(IntakeError, match="no plain folder"):
        inspect(tmp_path / "link")


def test_a_hard_link_is_refused(folder: Path, tmp_path: Path) -> None:
    os.link(folder / "model.pt2", tmp_path / "second-name.pt2")
    with pytest.raises(IntakeError, match=r"model\.pt2: found a file with 2 hard links"):
        inspect(folder)


def test_a_pipe_is_refused_instead_of_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "pipe.pt2")
    with pytest.raises(IntakeError, match="device, pipe or socket"):
        inspect(folder)


def test_unusual_names_are_refused_and_shown_harmlessly(folder: Path) -> None:
    (folder / "a\x1b[2Jb.txt").touch()
    with pytest.raises(IntakeError, match="unusual file name") as caught:
        inspect(folder)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(("limit", "value"), [("MOST_FILES", 1), ("MOST_BYTES", 100)])
def test_numbers_and_sizes_have_limits(folder: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int) -> None:
    (folder / "notes.txt").write_text("a")
    monkeypatch.setattr(files, limit, value)
    with pytest.raises(IntakeError, match=f"more than {value}"):
        inspect(folder)
