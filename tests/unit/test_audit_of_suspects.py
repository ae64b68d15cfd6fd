"""Suspect inputs in an audit: scored and flagged, and what becomes of a check that breaks on them."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from audit_plugin import audit as audit_module
from audit_plugin.audit import audit
from audit_plugin.checks import FittedScorer, InputScorer
from audit_plugin.manifest import digest_of, manifest_of
from audit_plugin.maths.pixels import to_pixels
from audit_plugin.model.subject import Subject
from audit_plugin.policy import policy_from
from audit_plugin.types import AuditReport, Failed, FitSplit, FloatArray, ImageArray, LabelArray, Measured, ModelRef, Verdict
from tests.policies import FAST

CLEAN, SUSPECTS = 60, 7


class Brightness(InputScorer):
    """Scores images by their mean; breaks where there are ``unbearable`` many of them."""

    name = "layerwise"

    def __init__(self, unbearable: int | None) -> None:
        self.unbearable = unbearable

    def fit(self, subject: Subject, fit_split: FitSplit, rng: np.random.Generator) -> FittedScorer:
        unbearable = self.unbearable

        class Fitted(FittedScorer):
            def __init__(self) -> None:
                self.own_thresholds = {"half": 127.5}

            def _score(self, images: ImageArray) -> FloatArray:
                if len(images) == unbearable:
                    raise RuntimeError("out of memory")
                return images.mean(axis=(1, 2, 3), dtype=np.float32)

        return Fitted()


@pytest.fixture
def audited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """``audited(scorer)``: the audit of a linear network that is right on every image, with dark and bright suspects."""

    def run(scorer: InputScorer) -> AuditReport:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()
        program = torch.export.export(network, (torch.zeros(2, 1, 8, 8),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
        folder = tmp_path / "model"
        folder.mkdir()
        torch.export.save(program, folder / "model.pt2")
        images = np.random.default_rng(0).integers(0, 256, (4 * CLEAN, 8, 8, 1), np.uint8)
        with torch.no_grad():
            labels = network(torch.from_numpy(to_pixels(images))).argmax(dim=1).numpy()
        rows = np.concatenate([np.flatnonzero(labels == label)[: CLEAN // 3] for label in range(3)])
        assert len(rows) == CLEAN
        np.savez(tmp_path / "clean.npz", images=images[rows], labels=labels[rows])
        suspects = np.repeat(np.array([0, 255], np.uint8), [3, SUSPECTS - 3])
        np.savez(tmp_path / "suspects.npz", images=np.broadcast_to(suspects[:, None, None, None], (SUSPECTS, 8, 8, 1)))
        monkeypatch.setattr(audit_module, "scorers_of", lambda policy: [scorer])
        manifest = manifest_of(folder)
        model = ModelRef(str(folder), str(folder), digest_of(manifest), manifest)
        return audit(model, folder, tmp_path / "clean.npz", suspects=tmp_path / "suspects.npz", policy=policy_from(FAST))

    return run


def test_each_suspect_has_its_score_and_is_flagged_above_the_threshold(audited) -> None:
    report = audited(Brightness(unbearable=None))
    assert isinstance(report.outcomes[-1], Measured)
    assert [suspect.scores["layerwise"] for suspect in report.suspects] == [0.0] * 3 + [255.0] * 4
    assert [suspect.flagged["layerwise"] for suspect in report.suspects] == [False] * 3 + [True] * 4


def test_a_check_that_breaks_on_the_suspects_has_failed_and_the_audit_goes_on(audited) -> None:
    report = audited(Brightness(unbearable=SUSPECTS))
    assert report.outcomes[-1] == Failed("layerwise", "RuntimeError: out of memory")
    assert [dict(suspect.scores) for suspect in report.suspects] == [{}] * SUSPECTS
    assert report.decision.verdict is Verdict.INCONCLUSIVE
    assert "layerwise" in report.decision.not_measured


@pytest.mark.parametrize("message", ["a leaf is written to\nat some place", ""])
def test_attention_maps_that_fail_are_left_out_and_end_no_audit(
    audited, message: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(subject: Subject, images: ImageArray, classes: LabelArray) -> FloatArray:
        raise RuntimeError(message)

    monkeypatch.setattr(audit_module, "grad_cam", broken)
    with caplog.at_level(logging.INFO, "audit_plugin.audit"):
        report = audited(Brightness(unbearable=None))
    assert report.examples is not None
    assert report.examples.clean_attention is None
    assert f"The report is without attention maps: {message.partition(chr(10))[0] or 'RuntimeError'}" in caplog.messages
