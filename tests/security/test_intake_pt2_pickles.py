"""Pickles inside a .pt2: every place from which torch.export.load unpickles.

MLflow follows up GHSA-wm54-77rw-968c with a check of its own (its pull request 25849), because a .pt2 was loaded although pickles
were switched off.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"


class Touch:
    """Creates a file when unpickled."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mknod, (self.name,)


def torch_pickle(name: str) -> bytes:
    buffer = io.BytesIO()
    torch.save((Touch(f"{name}.fired"),), buffer)
    return buffer.getvalue()


def with_pickled_entry(configuration: bytes, path_name: str) -> bytes:
    parsed = json.loads(configuration)
    entry = next(iter(parsed["config"].values()))
    entry.update(path_name=path_name, use_pickle=True)
    return json.dumps(parsed).encode()


@pytest.fixture(scope="module")
def attacks(tiny_pt2: bytes, rewritten: Callable[..., bytes]) -> dict[str, tuple[bytes, str]]:
    """Name -> (file, what the refusal says)."""
    with zipfile.ZipFile(io.BytesIO(tiny_pt2)) as archive:
        root = archive.namelist()[0].split("/")[0]
        weights, constants = (archive.read(f"{root}/{name}") for name in (WEIGHTS, CONSTANTS))
    files = {
        "sample": ({"data/sample_inputs/model.pt": torch_pickle("sample.pt2")}, "calls or builds '.*mknod'"),
        "weight": (
            {WEIGHTS: with_pickled_entry(weights, "weight_0"), "data/weights/weight_0": torch_pickle("weight.pt2")},
            "use_pickle",
        ),
        "constant": (
            {CONSTANTS: with_pickled_entry(constants, "tensor_0"), "data/constants/tensor_0": torch_pickle("constant.pt2")},
            "use_pickle",
        ),
        "opaque": (
            {
                CONSTANTS: with_pickled_entry(constants, "opaque_obj_0"),
                "data/constants/opaque_obj_0": pickle.dumps(Touch("opaque.pt2.fired")),
            },
            "opaque_obj_0",
        ),
        "legacy-weights": ({"data/weights/model.pt": torch_pickle("legacy-weights.pt2")}, "data/weights/model.pt"),
        "legacy-constants": ({"data/constants/model.pt": torch_pickle("legacy-constants.pt2")}, "data/constants/model.pt"),
    }
    return {f"{name}.pt2": (rewritten(changes), message) for name, (changes, message) in files.items()}


ATTACKS = ["sample", "weight", "constant", "opaque", "legacy-weights", "legacy-constants"]


@pytest.mark.parametrize("name", ATTACKS)
def test_a_pickle_inside_the_archive_is_refused(
    name: str, attacks: dict, refused: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content, message = attacks[f"{name}.pt2"]
    refused({f"{name}.pt2": content}, message)
    assert not list(tmp_path.glob("*.fired"))


@pytest.mark.slow  # a control: that the attacks are some
def test_the_same_files_run_code_when_torch_loads_them(attacks: dict, fired: Callable) -> None:
    assert fired({name: content for name, (content, _) in attacks.items()}) == {f"{name}.pt2" for name in ATTACKS}


def test_the_old_format_that_torch_falls_back_to_is_refused(refused: Callable) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("version", "8.20")
        archive.writestr("serialized_exported_program.json", "{}")
        archive.writestr("serialized_example_inputs.pt", torch_pickle("old"))
    refused({"model.pt2": buffer.getvalue()}, "member name 'version'")


@pytest.mark.parametrize(
    "member",
    [
        "data/aotinductor/model/library.so",
        "data/constants/custom_obj_0",
        "models/other.json",
        "data/executorch/model.pte",
        "extra/notes.txt",
    ],
)
def test_members_that_a_plain_graph_does_not_need_are_refused(
    member: str, rewritten: Callable[..., bytes], refused: Callable
) -> None:
    refused({"model.pt2": rewritten({member: b"x"})}, member)


def test_torchscript_in_the_sample_inputs_is_refused(tiny_pt2: bytes, rewritten: Callable[..., bytes], refused: Callable) -> None:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), buffer)
    refused({"model.pt2": rewritten({"data/sample_inputs/model.pt": buffer.getvalue()})}, "sample_inputs.*TorchScript")
