"""A small exported model, ways to rewrite it into an attack, and a child process in which attacks may really fire."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

from audit_plugin.errors import IntakeError
from audit_plugin.intake import inspect

Rewrite = Callable[[Mapping[str, bytes | None]], bytes]
Refused = Callable[[Mapping[str, bytes], str], None]
Fired = Callable[[Mapping[str, bytes]], set[str]]

_LOADER = """
import pathlib, sys, warnings
warnings.filterwarnings("ignore")
import torch
for file in sorted(pathlib.Path(sys.argv[1]).glob("*.pt*")):
    try:
        if file.suffix == ".pt2":
            program = torch.export.load(file)
            program.module()(torch.rand(4, 3, 8, 8))
        else:
            torch.load(file, weights_only=False)
    except BaseException as error:
        print(file.name, type(error).__name__, str(error)[-300:], file=sys.stderr)
"""


class TinyNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(64, 3)
        self.register_buffer("scale", torch.ones(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x * self.scale))


def export(module: nn.Module, *, dynamic: bool = True) -> bytes:
    buffer = io.BytesIO()
    shapes = ({0: torch.export.Dim.AUTO},) if dynamic else None
    program = torch.export.export(module.eval(), (torch.rand(4 if dynamic else 1, 3, 8, 8),), dynamic_shapes=shapes)
    torch.export.save(program, buffer)
    return buffer.getvalue()


def repack(archive: bytes, changes: Mapping[str, bytes | None]) -> bytes:
    """The archive with members (named without the root folder) replaced, added, or left out where None."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as source, zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as target:
        root = source.namelist()[0].split("/")[0]
        members: dict[str, bytes | None] = {name.removeprefix(root + "/"): source.read(name) for name in source.namelist()}
        for name, content in {**members, **changes}.items():
            if content is not None:
                target.writestr(zipfile.ZipInfo(f"{root}/{name}"), content)
    return buffer.getvalue()


def read_member(archive: bytes, name: str) -> bytes:
    with zipfile.ZipFile(io.BytesIO(archive)) as source:
        return source.read(f"{source.namelist()[0].split('/')[0]}/{name}")


@pytest.fixture(scope="session")
def tiny_network() -> nn.Module:
    torch.manual_seed(0)
    return TinyNetwork().eval()


@pytest.fixture(scope="session")
def tiny_pt2(tiny_network: nn.Module) -> bytes:
    return export(tiny_network)


@pytest.fixture(scope="session")
def rewritten(tiny_pt2: bytes) -> Rewrite:
    """The exported model with some members replaced."""
    return lambda changes: repack(tiny_pt2, changes)


@pytest.fixture(scope="session")
def edited_graph(tiny_pt2: bytes) -> Callable[[Callable[[dict], None]], bytes]:
    """The exported model after a function has edited the parsed ``models/model.json``."""

    def edit(change: Callable[[dict], None]) -> bytes:
        program = json.loads(read_member(tiny_pt2, "models/model.json"))
        change(program)
        return repack(tiny_pt2, {"models/model.json": json.dumps(program).encode()})

    return edit


@pytest.fixture
def refused(tmp_path: Path) -> Refused:
    """Assert that a folder of these files is refused with a one-line message that matches, and that nothing ran."""

    def check(files: Mapping[str, bytes], message: str) -> None:
        folder = tmp_path / "model"
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        with pytest.raises(IntakeError, match=message) as caught:
            inspect(folder)
        assert "\n" not in str(caught.value)
        assert "Refused:" in str(caught.value)

    return check


@pytest.fixture(scope="session")
def fired(tmp_path_factory: pytest.TempPathFactory) -> Fired:
    """Load the files with torch itself in a child process; the names of those whose marker ``<name>.fired`` appeared.

    The attacks write their marker relative to the current folder, so the same bytes serve for the check and for this.
    """

    def load(files: Mapping[str, bytes]) -> set[str]:
        folder = tmp_path_factory.mktemp("fired")
        for name, content in files.items():
            (folder / name).write_bytes(content)
        command = [sys.executable, "-c", _LOADER, str(folder)]
        subprocess.run(command, cwd=folder, check=True, timeout=120, capture_output=True)
        return {marker.name.removesuffix(".fired") for marker in folder.glob("*.fired")}

    return load
