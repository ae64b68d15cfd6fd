"""A file that is exchanged between the check and the use (time of check, time of use; CWE-367): everything reads a private copy.

onnx closed a race of this kind, of a link put in place of external data, in its own loader (pull request 7686).
"""

from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from audit_plugin.errors import AuditError, IntakeError
from audit_plugin.intake import inspect
from audit_plugin.manifest import digest_of, manifest_of
from audit_plugin.model.load import load_network
from audit_plugin.registry import PinnedModel, pin
from audit_plugin.registry.pinning import download

_EXCHANGE = """
import os, sys
good, bad, target = sys.argv[1:]
print("ready", flush=True)
while True:
    for source in (good, bad):
        os.link(source, target + ".new")
        os.replace(target + ".new", target)
"""


class Touch:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mknod, ("swapped.fired",)


@pytest.fixture
def source(tmp_path: Path, tiny_pt2: bytes) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "model.pt2").write_bytes(tiny_pt2)
    return folder


@contextmanager
def exchanging(target: Path, good: bytes, bad: bytes) -> Iterator[None]:
    """Another process puts now the one, now the other file in place, as fast as it can."""
    spare = target.parent.parent / "spare"
    spare.mkdir()
    (spare / "good").write_bytes(good)
    (spare / "bad").write_bytes(bad)
    command = [sys.executable, "-c", textwrap.dedent(_EXCHANGE), str(spare / "good"), str(spare / "bad"), str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield
        finally:
            process.kill()


def is_what_it_says(pinned: PinnedModel) -> bool:
    """Whether digest, manifest and bytes of a pinned model still agree."""
    return pinned.reference.digest == digest_of(manifest_of(pinned.folder)) == digest_of(pinned.reference.manifest)


@pytest.mark.timeout(120)
def test_a_file_that_changes_while_it_is_copied_is_judged_as_the_copy_is(
    source: Path, tiny_pt2: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which of the two was caught is chance; what was hashed, checked and loaded is one and the same."""
    monkeypatch.chdir(tmp_path)
    good, bad = (hashlib.sha256(content).hexdigest() for content in (tiny_pt2, pickle.dumps(Touch())))
    seen = set()
    with exchanging(source / "model.pt2", tiny_pt2, pickle.dumps(Touch())):
        for attempt in range(40):
            try:
                pinned = pin(str(source), tmp_path / f"copy{attempt}")
            except (AuditError, OSError):
                continue  # the file was gone for a moment
            names = {entry.path: entry.sha256 for entry in pinned.reference.manifest}
            caught = names["model.pt2"]
            seen.add(caught)
            assert caught in (good, bad)
            assert is_what_it_says(pinned)
            if caught == bad:
                with pytest.raises(IntakeError):
                    inspect(pinned.folder)
    assert seen
    assert not (tmp_path / "swapped.fired").exists()


def test_what_is_exchanged_after_the_copy_is_never_read(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pinned = pin(str(source), tmp_path / "copy")
    intake = inspect(pinned.folder)
    (source / "model.pt2").write_bytes(pickle.dumps(Touch()))
    assert load_network(pinned.folder / intake.data_path, intake).class_count == 3
    assert is_what_it_says(pinned)
    assert not (tmp_path / "swapped.fired").exists()


def test_a_link_that_takes_the_place_of_the_file_is_refused(source: Path, tmp_path: Path) -> None:
    """The copy keeps links as links, so that they are seen."""
    (tmp_path / "secret.pt2").write_bytes((source / "model.pt2").read_bytes())
    (source / "model.pt2").unlink()
    (source / "model.pt2").symlink_to(tmp_path / "secret.pt2")
    pinned = pin(str(source), tmp_path / "copy")
    with pytest.raises(IntakeError, match="a symbolic link"):
        inspect(pinned.folder)


def test_the_copy_shares_no_bytes_with_its_source(source: Path, tmp_path: Path) -> None:
    pinned = pin(str(source), tmp_path / "copy")
    original, copied = ((folder / "model.pt2").stat() for folder in (source, pinned.folder))
    assert original.st_ino != copied.st_ino
    with (source / "model.pt2").open("r+b") as stream:  # the same inode, other bytes
        stream.write(b"changed")
    assert is_what_it_says(pinned)


ADDED: dict[str, Callable[[Path], None]] = {
    "link to a file": lambda place: place.symlink_to("/etc/hostname"),
    "link to a folder": lambda place: place.symlink_to("/etc"),
    "link to nothing": lambda place: place.symlink_to("nowhere"),
    "pipe": os.mkfifo,
}


@pytest.mark.parametrize("added", ADDED)
def test_what_is_no_plain_file_changes_the_digest(source: Path, added: str) -> None:
    """MLflow's loader would take ``model.pth`` rather than the ``model.pt2`` that was audited, and follow it."""
    before = manifest_of(source)
    ADDED[added](source / "model.pth")
    (entry,) = set(manifest_of(source)) - set(before)
    assert (entry.path, entry.size) == ("model.pth", 0)
    assert digest_of(manifest_of(source)) != digest_of(before)
    (source / "model.pth").unlink()
    (source / "model.pth").touch()
    assert entry not in manifest_of(source), "an empty file is another"


def test_a_link_to_another_place_is_another_entry(source: Path) -> None:
    digests = set()
    for target in ("/etc/hostname", "/etc/hosts", "hosts"):
        (source / "model.pth").symlink_to(target)
        digests.add(digest_of(manifest_of(source)))
        (source / "model.pth").unlink()
    assert len(digests) == 3


def test_a_link_added_after_the_audit_shows_in_a_new_copy(source: Path, tmp_path: Path) -> None:
    before = digest_of(manifest_of(download(str(source), tmp_path / "first")))
    (source / "model.pth").symlink_to("/etc/hostname")
    assert digest_of(manifest_of(download(source.as_uri(), tmp_path / "second"))) != before
