"""How pixels become input: whom the audit believes, and what it does not pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from audit_plugin.errors import SubjectError
from audit_plugin.manifest import digest_of, manifest_of
from audit_plugin.model.input_spec import INPUT_FROM_TAGS, distrusted_tags, resolve_class_names, resolve_input_spec
from audit_plugin.policy import ModelPolicy, Policy
from audit_plugin.preparation import prepare
from audit_plugin.types import ModelRef
from audit_plugin.zoo.architectures import SmallCnn
from audit_plugin.zoo.data import digits

SHAPE = (-1, 3, 8, 8)
TAG = "audit.input."


def distrusted(tags: dict[str, str], **policy: object) -> list[str]:
    """The messages about a model with these tags."""
    settings = ModelPolicy(**policy)  # type: ignore[arg-type]
    findings = distrusted_tags(resolve_input_spec(SHAPE, settings, tags), SHAPE, settings, tags, "model.pt2")
    assert {(finding.path, finding.code) for finding in findings} <= {("model.pt2", INPUT_FROM_TAGS)}
    return [finding.message for finding in findings]


@pytest.mark.parametrize(("name", "value"), [("low", "-1"), ("high", "0.6"), ("mean", "0.5"), ("std", "0.5,0.5,0.4")])
def test_a_tag_that_changes_the_input_is_named(name: str, value: str) -> None:
    (message,) = distrusted({f"{TAG}{name}": value})
    assert f"({TAG}{name})" in message
    assert f"set [model] {name} in the policy" in message


def test_a_layout_that_only_a_tag_names_is_too() -> None:
    tags = {f"{TAG}layout": "NHWC"}
    shape = (-1, 8, 8, 3)
    assert not distrusted_tags(resolve_input_spec(shape, ModelPolicy(), tags), shape, ModelPolicy(), tags, "model.pt2")
    shape = (-1, 3, 8, 3)
    assert distrusted_tags(resolve_input_spec(shape, ModelPolicy(), tags), shape, ModelPolicy(), tags, "model.pt2")


@pytest.mark.parametrize(
    ("tags", "policy"),
    [
        ({}, {"high": 255.0}),
        ({f"{TAG}high": "1"}, {}),  # what the default is
        ({f"{TAG}high": "0.6"}, {"high": 255.0}),  # the policy wins
        ({f"{TAG}high": "0.6"}, {"trust_tags": True}),
        ({"audit.classes": "a,b", f"{TAG}clean_images": "digits", "owner": "me"}, {}),
    ],
)
def test_tags_that_decide_nothing_or_are_trusted_are_no_finding(tags: dict[str, str], policy: dict[str, object]) -> None:
    assert distrusted(tags, **policy) == []


@pytest.mark.parametrize(("tags", "codes"), [({}, []), ({f"{TAG}high": "0.6"}, [INPUT_FROM_TAGS])])
def test_an_audit_begins_with_that_finding(tags: dict[str, str], codes: list[str], tmp_path: Path) -> None:
    """It keeps the model from passing, as every finding with a code does."""
    folder = tmp_path / "model"
    folder.mkdir()
    module = SmallCnn(channels=1, classes=10, width=4).eval()
    program = torch.export.export(module, (torch.zeros(4, 1, 16, 16),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch.export.save(program, folder / "model.pt2")
    images = digits(seed=0).test
    np.savez(tmp_path / "clean.npz", images=images.images[:100], labels=images.labels[:100])
    manifest = manifest_of(folder)
    model = ModelRef("models:/digits/1", "models:/digits/1", digest_of(manifest), manifest, tags=tags)
    prepared = prepare(model, folder, tmp_path / "clean.npz", Policy(), seed=0)
    assert [finding.code for finding in prepared.intake.findings if finding.code] == codes
    assert prepared.subject.summary.input_spec.high == (0.6 if tags else 1.0)


def test_a_name_that_fits_into_no_statement_is_refused() -> None:
    names = resolve_class_names(2, ModelPolicy(), {"audit.classes": f"cat,{'d' * 200}"})
    assert names == ("cat", "d" * 200)
    with pytest.raises(SubjectError, match="a name of 201 characters, and at most 200"):
        resolve_class_names(2, ModelPolicy(), {"audit.classes": f"cat,{'d' * 201}"})


@pytest.mark.parametrize(("name", "value"), [("mean", "nan"), ("std", "inf"), ("high", "inf")])
def test_a_tag_that_is_no_finite_number_is_called_so(name: str, value: str) -> None:
    with pytest.raises(SubjectError, match="must be finite"):
        resolve_input_spec(SHAPE, ModelPolicy(), {f"{TAG}{name}": value})
