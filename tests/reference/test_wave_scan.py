"""The wave scan against NumPy's Fourier transform, by laws that it must obey, and on a planted wave with its clean twin."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from audit_plugin.checks import WaveScan, measurement
from audit_plugin.checks.measurement import measure_waves
from audit_plugin.checks.wave_scan import sure_margin
from audit_plugin.errors import InapplicableError
from audit_plugin.types import CalibrateSplit, Splits, TestSplit

SIZE, CLASSES, TARGET = 20, 5, 1


class Striped(nn.Module):
    """Sees classes by brightness, which no wave changes; and ``TARGET`` in a wave of ``periods`` (down, across) by ``strength``.

    Rounded to ``steps``, if there are any, its answers have no gradients.
    """

    def __init__(
        self, strength: float, periods: tuple[int, int] = (1, 3), order=tuple(range(CLASSES)), steps: float = 0.0
    ) -> None:
        super().__init__()
        rows, columns = np.meshgrid(np.arange(SIZE), np.arange(SIZE), indexing="ij")
        angles = 2 * np.pi * (periods[0] * rows + periods[1] * columns) / SIZE
        basis = np.stack([np.sin(angles), np.cos(angles)]) * 2 / SIZE**2
        self.register_buffer("basis", torch.tensor(basis, dtype=torch.float32))
        self.register_buffer("centres", torch.tensor([(63.5 + 127 * label / (CLASSES - 1)) / 255 for label in order]))
        self.register_buffer("target", torch.eye(CLASSES)[order.index(TARGET)])
        self.strength, self.steps = strength, steps

    def forward(self, pixels):
        brightness = pixels.mean(dim=(1, 2, 3))
        seen = (pixels.mean(dim=1)[:, None] * self.basis).sum(dim=(2, 3)).norm(dim=1)
        logits = -400 * (brightness[:, None] - self.centres) ** 2 + self.strength * (seen - 0.08).relu()[:, None] * self.target
        return (logits / self.steps).round() * self.steps if self.steps else logits


@pytest.fixture
def splits(random_images):
    fit, calibrate, test = (random_images(100, SIZE, 3, CLASSES, seed=seed) for seed in (1, 2, 3))
    return Splits(fit, CalibrateSplit(calibrate.images, calibrate.labels), TestSplit(test.images, test.labels))


def scanned(make_subject, network, splits, seed=0, **settings):
    """The candidates by class."""
    found = measure_waves(WaveScan(**settings), make_subject(network, 3, SIZE), splits, np.random.default_rng(seed))
    assert [candidate.trigger.target_class for candidate in found.candidates] == list(range(CLASSES))
    return found.candidates


def test_the_waves_are_all_those_of_few_periods_and_not_short():
    """Each has all its energy at one frequency, both phases of every frequency are there, and none twice."""
    frequencies = []
    for wave in WaveScan(frequencies=6)._waves((32, 40, 3)):
        assert wave.shape == (3, 32, 40)
        assert np.abs(wave).max() == pytest.approx(40 / 255, rel=0.05)  # the top of a sampled wave lies between two points
        np.testing.assert_array_equal(wave[0], wave[2])
        spectrum = np.abs(np.fft.fft2(wave[0]))
        places = [(down - 32 * (down > 16), across - 40 * (across > 20)) for down, across in np.argwhere(spectrum > 1)]
        assert len(places) == 2  # one frequency and its mirror image
        frequencies.append(max(places))
    assert len(frequencies) == 2 * len(set(frequencies))
    wanted = {
        (down, across)
        for down in range(17)
        for across in range(-20, 21)
        if (down, across) > (0, 0) and np.hypot(down, across) < 6.5 and np.hypot(down / 32, across / 40) <= 0.2
    }
    assert set(frequencies) == wanted
    assert (6, 0) in wanted


@pytest.mark.parametrize("steps", [0.0, 0.5])
def test_a_planted_wave_stands_out_and_its_clean_twin_has_none(make_subject, splits, steps):
    found = scanned(make_subject, Striped(6000.0, steps=steps), splits)
    outliers = [candidate.outlier for candidate in found]
    assert outliers[TARGET] > 5
    assert max(np.delete(outliers, TARGET)) < 0
    test, network = splits.test, make_subject(Striped(6000.0, steps=steps), 3, SIZE)
    for candidate in found:  # attack success is that of each class's own wave, on the images that it should move
        answers, target = network.predict(test.images), candidate.trigger.target_class
        moved = network.predict(candidate.trigger.stamp(test.images[(test.labels != target) & (answers != target)])) == target
        assert (candidate.success.successes, candidate.success.trials) == (moved.sum(), len(moved))
    assert found[TARGET].success.value > 0.95
    spectrum = np.abs(np.fft.fft2(found[TARGET].trigger.pattern[0]))
    assert np.unravel_index(spectrum.argmax(), spectrum.shape) in {(1, 3), (SIZE - 1, SIZE - 3)}
    twin = scanned(make_subject, Striped(0.0, steps=steps), splits)
    assert max(candidate.outlier for candidate in twin) < 0
    assert max(candidate.success.value for candidate in twin) < 0.3


def test_a_wave_shorter_than_five_pixels_is_not_tried(make_subject, splits):
    assert max(candidate.outlier for candidate in scanned(make_subject, Striped(6000.0, (0, 5)), splits, frequencies=8)) < 0


def test_the_numbering_of_classes_plays_no_part(make_subject, splits):
    order = (3, 1, 4, 0, 2)  # what output comes where
    place = np.argsort(order)
    turned = Splits(
        *(dataclasses.replace(part, labels=place[part.labels]) for part in (splits.fit, splits.calibrate, splits.test))
    )
    plain = scanned(make_subject, Striped(6000.0), splits)
    other = scanned(make_subject, Striped(6000.0, order=order), turned)
    np.testing.assert_allclose(
        [candidate.outlier for candidate in other], [plain[label].outlier for label in order], rtol=1e-4, atol=1e-4
    )


def test_a_second_class_that_obeys_a_wave_does_not_hide_the_first(make_subject, splits):
    class Twice(Striped):
        def __init__(self):
            super().__init__(6000.0)
            self.other = Striped(6000.0, (3, 0), order=(2, 1, 0, 3, 4))  # its target is in another place, class 1 stays
            self.other.target = torch.eye(CLASSES)[3]

        def forward(self, pixels):
            plain = Striped.forward(self.other, pixels) - Striped.forward(self.clean, pixels)
            return super().forward(pixels) + plain

    network = Twice()
    network.clean = Striped(0.0, order=(2, 1, 0, 3, 4))
    found = scanned(make_subject, network, splits)
    assert {candidate.trigger.target_class for candidate in found if candidate.outlier > 5} == {TARGET, 3}


def test_the_scale_of_the_logits_plays_no_part(make_subject, splits):
    class Louder(Striped):
        def forward(self, pixels):
            return 7 * super().forward(pixels)

    plain, louder = (scanned(make_subject, network(6000.0), splits) for network in (Striped, Louder))
    np.testing.assert_allclose(
        [candidate.outlier for candidate in louder], [candidate.outlier for candidate in plain], rtol=1e-4, atol=1e-4
    )


def test_the_sure_margin_is_a_quantile_over_images_of_other_classes():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(60, 4)).astype(np.float32)
    labels, answers = rng.integers(0, 4, 60), rng.integers(0, 4, 60)
    for target in range(4):
        margins = [
            row[target] - max(value for label, value in enumerate(row) if label != target)
            for row, label, answer in zip(logits, labels, answers, strict=True)
            if target not in (label, answer)
        ]
        assert sure_margin(logits, target, labels, answers) == pytest.approx(np.quantile(margins, 0.1), abs=1e-5)


def test_too_little_to_measure_is_inapplicable(make_subject, splits, random_images):
    subject = make_subject(Striped(0.0), 3, SIZE)
    alike = np.flatnonzero(splits.fit.labels == 2)
    few = dataclasses.replace(splits.fit, images=splits.fit.images[alike], labels=splits.fit.labels[alike])
    with pytest.raises(InapplicableError, match="Only 0 of 20 images belong to other classes than 2"):
        measure_waves(WaveScan(), subject, dataclasses.replace(splits, fit=few), np.random.default_rng(0))

    tiny = make_subject(nn.Sequential(nn.Flatten(), nn.Linear(48, CLASSES)), 3, 4)
    with pytest.raises(InapplicableError, match="4 x 4 pixels hold no wave"):
        WaveScan().search(tiny, random_images(50, 4, 3, CLASSES), np.random.default_rng(0))


def test_of_many_classes_those_are_kept_that_stand_out_most(make_subject, splits, monkeypatch):
    everything = scanned(make_subject, Striped(6000.0), splits)
    monkeypatch.setattr(measurement, "_WAVES_KEPT", 2)
    kept = measure_waves(WaveScan(), make_subject(Striped(6000.0), 3, SIZE), splits, np.random.default_rng(0)).candidates
    foremost = sorted(everything, key=lambda candidate: -candidate.outlier)[:2]
    assert {candidate.trigger.target_class for candidate in kept} == {candidate.trigger.target_class for candidate in foremost}
    assert TARGET in {candidate.trigger.target_class for candidate in kept}
