"""Results as plain data: nothing is lost, and nothing else is taken for one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from audit_plugin.policy import Policy, policy_from
from audit_plugin.records import ARRAYS_FILE, RECORD_FILE, RecordError, read_record, write_record
from audit_plugin.report.schema import plain_json
from audit_plugin.types import AuditReport, InputSpec, LabelledImages, Trigger
from tests.unit.report.conftest import failing, hostile, inconclusive, passing


def assert_same(first: object, second: object) -> None:
    """Equality field by field, since arrays have none of their own."""
    assert type(first) is type(second)
    if isinstance(first, np.ndarray) and isinstance(second, np.ndarray):
        assert first.dtype == second.dtype
        np.testing.assert_array_equal(first, second)
    elif dataclasses.is_dataclass(first):
        for field in dataclasses.fields(first):
            assert_same(getattr(first, field.name), getattr(second, field.name))
    elif isinstance(first, tuple) and isinstance(second, tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    elif isinstance(first, dict) and isinstance(second, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, float) and first != first:
        assert second != second
    else:
        assert first == second


@pytest.mark.parametrize("make", [failing, passing, inconclusive, hostile])
def test_a_report_comes_back_whole(make: Any, tmp_path: Path) -> None:
    report = make()
    report = dataclasses.replace(report, policy=plain_json(report.policy))  # as every real report's: no tuples
    write_record(report, tmp_path)
    assert_same(read_record(AuditReport, tmp_path), report)
    assert sorted(path.name for path in tmp_path.iterdir()) == [ARRAYS_FILE, RECORD_FILE]


def test_a_policy_comes_back_with_its_digest(tmp_path: Path) -> None:
    policy = policy_from({"model": {"mean": [0.1, 0.2, 0.3]}, "clean_images": {"a*": "b"}, "sandbox": {"required": True}})
    write_record(policy, tmp_path)
    assert read_record(Policy, tmp_path).digest == policy.digest


def test_arrays_of_another_type_are_refused(tmp_path: Path) -> None:
    write_record(LabelledImages(np.zeros((1, 2, 2, 3), np.uint8), np.zeros(1, np.int64)), tmp_path)
    np.savez(tmp_path / ARRAYS_FILE, array0=np.zeros((1, 2, 2, 3), np.float64), array1=np.zeros(1, np.int64))
    with pytest.raises(RecordError, match=r"no LabelledImages could be read \(TypeError\)"):
        read_record(LabelledImages, tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("height", "8"),
        ("height", 8.0),
        ("height", True),
        ("height", None),
        ("low", "0"),
        ("layout", "NCWH"),
        ("mean", "abc"),
        ("mean", [None]),
        ("unknown", 1),
    ],
)
def test_no_value_is_converted_and_none_added(tmp_path: Path, key: str, value: object) -> None:
    write_record(InputSpec(8, 8, 1), tmp_path)
    document = json.loads((tmp_path / RECORD_FILE).read_text())
    (tmp_path / RECORD_FILE).write_text(json.dumps(document | {key: value}))
    with pytest.raises(RecordError, match="no InputSpec could be read"):
        read_record(InputSpec, tmp_path)


def test_a_whole_number_is_a_number(tmp_path: Path) -> None:
    write_record(InputSpec(8, 8, 1), tmp_path)
    document = json.loads((tmp_path / RECORD_FILE).read_text())
    (tmp_path / RECORD_FILE).write_text(json.dumps(document | {"low": 1}))
    assert read_record(InputSpec, tmp_path) == InputSpec(8, 8, 1, low=1.0)


def test_a_missing_array_is_refused(tmp_path: Path) -> None:
    write_record(Trigger(0, np.zeros((2, 2), np.float32), np.zeros((1, 2, 2), np.float32)), tmp_path)
    np.savez(tmp_path / ARRAYS_FILE, array0=np.zeros((2, 2), np.float32))
    with pytest.raises(RecordError, match="no Trigger could be read"):
        read_record(Trigger, tmp_path)


def test_what_is_no_plain_value_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="object is no plain value"):
        write_record(dataclasses.replace(failing(), policy={"a": object()}), tmp_path)
