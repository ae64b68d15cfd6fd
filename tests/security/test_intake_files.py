"""Links, special files and sizes: bytes that could lie, or change, outside the model's folder.

Symbolic links (CVE-2026-27489, CVE-2026-34447) and hard links (CVE-2026-34446) beside a model led onnx to other files.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from audit_plugin.errors import IntakeError
from audit_plugin.intake import files, inspect
from audit_plugin.registry import pin, pinning


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


# --------------------------------------------------------------------------------------- before anything is copied


HUGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a file that is mostly a hole": ("bytes", lambda folder: os.truncate(folder / "model.pt2", files.MOST_BYTES + 1)),
    "many files": ("files", lambda folder: [(folder / str(number)).touch() for number in range(files.MOST_FILES)]),
    "many links": ("files", lambda folder: [(folder / str(number)).symlink_to("/") for number in range(files.MOST_FILES)]),
    "many folders": ("folders", lambda folder: [(folder / str(number)).mkdir() for number in range(files.MOST_FILES)]),
    "deep folders": ("nested folders", lambda folder: (folder / "/".join("a" * 34)).mkdir(parents=True)),
}


@pytest.mark.parametrize("case", HUGE)
def test_a_model_beyond_the_limits_is_refused_before_it_is_copied(folder: Path, tmp_path: Path, case: str) -> None:
    what, make = HUGE[case]
    make(folder)
    with pytest.raises(IntakeError, match=rf"found more than \d+ {what}\."):
        pin(str(folder), tmp_path / "copy")
    with pytest.raises(IntakeError, match=rf"found more than \d+ {what}\."):
        pinning.download(folder.as_uri(), tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_file_beyond_the_limit_is_refused_before_it_is_copied(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").touch()
    os.truncate(tmp_path / "model.onnx", files.MOST_BYTES + 1)
    with pytest.raises(IntakeError, match=r"model\.onnx: found more than \d+ bytes"):
        pin(str(tmp_path / "model.onnx"), tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_what_a_link_leads_to_does_not_count(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "huge").touch()
    os.truncate(tmp_path / "huge", files.MOST_BYTES + 1)
    (folder / "link").symlink_to(tmp_path / "huge")
    (folder / "around").symlink_to(tmp_path)
    assert {entry.path for entry in pin(str(folder), tmp_path / "copy").reference.manifest} == {"model.pt2", "link", "around"}


def entry(path: str, size: int | None = None, *, is_folder: bool = False) -> SimpleNamespace:
    return SimpleNamespace(path=path, file_size=size, is_dir=is_folder)


Tell = Callable[[str | None], list[SimpleNamespace]]


class Store:
    """Stands in for an artifact store: lists what ``tell(path)`` says, and hands nothing out."""

    def __init__(self, tell: Tell) -> None:
        self.tell, self.asked = tell, 0

    def list_artifacts(self, path: str | None) -> list[SimpleNamespace]:
        self.asked += 1
        return self.tell(path)


FAR: dict[str, tuple[str, int, Tell]] = {
    "a large file": ("bytes", 1, lambda path: [entry(f"{path}/a", files.MOST_BYTES), entry(f"{path}/b", 1)]),
    "a large file alone": ("bytes", 2, lambda path: [] if path else [entry("other", 1), entry("model", files.MOST_BYTES + 1)]),
    "many files of no told size": ("files", 1, lambda path: [entry(f"{path}/{number}") for number in range(10_001)]),
    "folders without end": ("nested folders", 33, lambda path: [entry(f"{path}/a", is_folder=True)]),
    "folders of folders": (
        "folders",
        10_000,
        lambda path: [entry(f"{path}/{number}", is_folder=True) for number in range(0 if "/" in str(path) else 10_001)],
    ),
}


@pytest.mark.parametrize("case", FAR)
def test_a_model_beyond_the_limits_is_refused_before_it_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    what, most_requests, tell = FAR[case]
    store = Store(tell)
    monkeypatch.setattr(pinning, "get_artifact_repository", lambda location: store)
    monkeypatch.setattr("mlflow.artifacts.download_artifacts", lambda **options: pytest.fail("fetched"))
    with pytest.raises(IntakeError, match=rf"found more than \d+ {what}\."):
        pinning.download("s3://bucket/model", tmp_path / "copy")
    assert store.asked <= most_requests
    assert not (tmp_path / "copy").exists()


def test_a_folder_that_lists_itself_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(lambda path: [entry(".", is_folder=True), entry(str(path), is_folder=True), entry(f"{path}/a", 3)])
    assert pinning.remote_files(store, "model") == {"model/a": 3}  # type: ignore[arg-type]


@pytest.mark.parametrize(("path", "logged"), [("model/data", ["s3://logged/data"]), ("model", ["s3://logged"]), ("it's", [])])
def test_all_that_mlflow_fetches_for_a_run_is_counted(monkeypatch: pytest.MonkeyPatch, path: str, logged: list[str]) -> None:
    """It lays the model that the run logged so over the run's own artifacts."""
    found = SimpleNamespace(artifact_location="s3://logged")
    monkeypatch.setattr(
        pinning, "_model_of_run", lambda client, run_id, name: found if (run_id, name) == ("0a", "model") else None
    )
    monkeypatch.setattr(pinning.RunsArtifactRepository, "get_underlying_uri", lambda uri: uri.replace("runs:/", "s3://runs/"))
    assert pinning._places_behind(f"runs:/0a/{path}") == [f"s3://runs/0a/{path}", *logged]
    assert pinning._places_behind("s3://bucket/model") == ["s3://bucket/model"]
