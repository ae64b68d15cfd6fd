"""State dicts: pickles that do more than rebuild tensors, however they spell it.

``weights_only`` alone let code run in CVE-2025-32434, and corrupted memory in CVE-2026-24747 of PyTorch; a scanner lost its way
in the instructions in GHSA-9gvj-pp9x-gcfr of picklescan.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch


def short(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


CALL_MKNOD = short("NAME.fired") + b"\x85R."
PROGRAMS = {
    "global": b"\x80\x02cos\nmknod\n" + CALL_MKNOD,
    "stack": b"\x80\x04" + short("os") + short("mknod") + b"\x93" + CALL_MKNOD,
    # The two names wait in the memo, with other strings pushed and dropped in between.
    "memo": b"\x80\x04" + short("os") + b"\x940" + short("mknod") + b"\x940" + short("torch") + b"0h\x00h\x01\x93" + CALL_MKNOD,
    "instance": b"\x80\x02(" + short("NAME.fired") + b"ios\nmknod\n.",
    "object": b"\x80\x02(cos\nmknod\n" + short("NAME.fired") + b"o.",
    "new": b"\x80\x02cbuiltins\nrange\nK\x01\x85\x81.",
    "extension": b"\x80\x02\x82\x01.",
    "setstate": b"\x80\x02ccollections\nOrderedDict\n)R}(" + short("__class__") + b"K\x01ub.",
    "dotted": b"\x80\x04" + short("torch") + short("os.mknod") + b"\x93" + CALL_MKNOD,
    "after-stop": b"\x80\x02}.cos\nmknod\n" + CALL_MKNOD,
    "no-tensors": b"\x80\x02}.",
    "not-a-pickle": b"\x80\x02\xff\xff",
}
FIRING = ["global", "stack", "memo", "instance", "object", "dotted"]


def torch_file(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        program = PROGRAMS[name].replace(short("NAME.fired"), short(f"{name}.pt.fired"))
        archive.writestr(zipfile.ZipInfo("archive/data.pkl"), program)
        archive.writestr(zipfile.ZipInfo("archive/version"), b"3\n")
        archive.writestr(zipfile.ZipInfo("archive/byteorder"), b"little")
    return buffer.getvalue()


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_pickle_that_does_more_than_tensors_is_refused(
    name: str, refused: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused({"state_dict.pth": torch_file(name)}, "state_dict.pth: found")
    assert not list(tmp_path.glob("*.fired"))


@pytest.mark.slow  # a control: that the attacks are some
def test_the_same_files_run_code_when_torch_loads_them(fired: Callable) -> None:
    assert fired({f"{name}.pt": torch_file(name) for name in FIRING}) == {f"{name}.pt" for name in FIRING}


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_a_whole_module_is_named(refused: Callable) -> None:
    refused({"model.pth": saved(torch.nn.Linear(2, 2))}, "calls or builds 'torch.nn.modules.linear.Linear'")


@pytest.mark.parametrize("shape", [(2**31 + 1,), (2**40, 2), (2**50, 3, 1, 1)])
def test_a_tensor_that_repeats_one_number_without_end_is_refused(shape: tuple[int, ...], refused: Callable) -> None:
    content = saved({"fc.weight": torch.zeros(1).expand(shape)})
    assert len(content) < 2_000
    refused({"model.pth": content}, "a tensor of more than 2147483648 numbers")


def test_a_tensor_larger_than_its_storage_is_refused(refused: Callable) -> None:
    content = saved({"weight": torch.arange(91.0)})
    pickled = pickle.dumps(91, 2)[2:4]
    assert content.count(pickled) == 2  # elements of the storage, size of the tensor
    first = content.index(pickled)
    grown = content[: first + 1] + struct.pack("B", 200) + content[first + 2 :]
    refused({"state_dict.pth": grown}, "more than the file holds")
    second = content.index(pickled, first + 1)
    grown = content[: second + 1] + struct.pack("B", 200) + content[second + 2 :]
    refused({"state_dict.pth": grown}, "more than its storage holds")


def test_torchscript_is_refused(refused: Callable) -> None:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), buffer)
    refused({"model.pt": buffer.getvalue()}, "TorchScript")
