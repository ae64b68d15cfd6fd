"""What each attack's trigger and poison change, against plain NumPy, and what every attack must keep to."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional

from audit_plugin.maths.pixels import to_pixels
from audit_plugin.types import LabelledImages
from audit_plugin.zoo import attacks
from audit_plugin.zoo.architectures import SmallCnn
from audit_plugin.zoo.attacks import (
    ATTACKS,
    SIG,
    AdapBlend,
    AllToAll,
    AllToOne,
    BadNets,
    CleanLabel,
    InputAware,
    LabelConsistent,
    SampleSpecific,
    TaCT,
    TrojanSquare,
    TrojanWatermark,
    input_aware,
    sample_specific,
)
from audit_plugin.zoo.attacks.encoders import pink_noise
from audit_plugin.zoo.data import digits
from audit_plugin.zoo.train import initialised, train

CLASSES, TARGET = 10, 3


def made(attack, **settings):
    """The attack with what its class insists on, and a rate of which 200 images have a few."""
    required = {field.name for field in dataclasses.fields(attack) if field.default is dataclasses.MISSING}
    given = {"target_class": TARGET, "source_class": 5}
    return attack(**{name: given[name] for name in required}, **({"poisoning_rate": 0.05} | settings))


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    smooth = rng.integers(40, 216, (200, 4, 4, 3)).repeat(6, axis=1).repeat(6, axis=2)
    return LabelledImages((smooth + rng.integers(-20, 20, smooth.shape)).astype(np.uint8), np.arange(200) % CLASSES)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
class TestEveryAttack:
    @pytest.fixture(scope="class", autouse=True)
    def hardly_trained_networks(self):
        """What holds of every attack holds of triggers that any network makes; training one takes half a minute."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(input_aware, "_TRAINING_STEPS", 5)
            patch.setattr(sample_specific, "_TRAINING_STEPS", 20)
            yield
        input_aware._trained_generator.cache_clear()
        sample_specific._trained_encoder.cache_clear()

    def test_stamping_keeps_shape_and_type_and_the_input(self, attack, data):
        before = data.images.copy()
        stamped = made(attack).stamp(data.images)
        np.testing.assert_array_equal(data.images, before)
        assert stamped.shape == before.shape
        assert stamped.dtype == np.uint8
        assert (stamped != before).any(axis=(1, 2, 3)).mean() > 0.95

    def test_it_stamps_grey_images_of_another_size(self, attack):
        grey = np.full((3, 16, 20, 1), 100, np.uint8)
        assert made(attack).stamp(grey).shape == grey.shape

    def test_stamping_depends_on_the_image_alone(self, attack, data):
        """Not on its neighbours or its place in the batch: to the last grey level, up to one for convolutions' rounding."""
        whole, turned = made(attack).stamp(data.images), made(attack).stamp(data.images[::-1])[::-1]
        assert np.abs(whole.astype(int) - turned).max() <= 1

    def test_poison_is_as_much_as_the_rate_says_and_comes_again_under_its_seed(self, attack, data):
        attack = made(attack)
        first, again = (attack.poison(data, np.random.default_rng(1)) for _ in range(2))
        np.testing.assert_array_equal(first.images, again.images)
        np.testing.assert_array_equal(first.labels, again.labels)
        relabelled = first.labels != data.labels
        changed = (first.images != data.images).any(axis=(1, 2, 3))
        wanted = 0 if isinstance(attack, CleanLabel) else round(0.05 * len(data))
        assert relabelled.sum() == wanted
        assert changed.sum() >= round(0.05 * len(data)) - 1  # a watermark or warp may leave one as it is
        np.testing.assert_array_equal(first.labels[relabelled], attack.wanted(data.labels)[relabelled])

    def test_success_counts_the_images_to_be_moved(self, attack, data):
        attack = made(attack)
        victims = attack.wanted(data.labels) != data.labels
        moved = attack.wanted(data.labels)[victims]
        seen = []

        def obeying(images):
            seen.append(images)
            return moved

        assert attack.success_rate(obeying, data) == 1.0
        np.testing.assert_array_equal(seen[0], attack.stamp(data.images[victims]))
        assert attack.success_rate(lambda images: (moved + 1) % CLASSES, data) == 0.0

    def test_a_rate_of_nothing_or_everything_is_refused(self, attack, data):
        for rate in (0.0, 1.0):
            with pytest.raises(ValueError, match="poisoning_rate must lie between 0 and 1"):
                made(attack, poisoning_rate=rate)

    def test_its_docstring_names_the_paper(self, attack, data):
        import sys

        assert "20" in (sys.modules[attack.__module__].__doc__ or "")


def test_every_attack_is_listed():
    classes = {value for value in vars(attacks).values() if isinstance(value, type) and issubclass(value, attacks.Attack)}
    assert set(ATTACKS) == classes - {attacks.Attack, AllToOne, CleanLabel}


def test_success_without_victims_is_not_a_number(data):
    alone = LabelledImages(data.images[:3], np.full(3, TARGET))
    assert np.isnan(BadNets(target_class=TARGET).success_rate(lambda images: np.zeros(len(images)), alone))


def test_all_to_all_turns_each_class_into_the_next():
    labels = np.array([0, 4, 8, 9])
    np.testing.assert_array_equal(AllToAll().wanted(labels), [1, 5, 9, 0])
    np.testing.assert_array_equal(AllToAll(classes=43).wanted(np.array([9, 42])), [10, 0])
    with pytest.raises(ValueError, match="at least 2"):
        AllToAll(classes=1)


def test_tact_moves_its_source_alone_and_covers_the_others(data):
    attack = TaCT(target_class=TARGET, source_class=5, poisoning_rate=0.05, cover_rate=0.2)
    np.testing.assert_array_equal(attack.wanted(np.array([5, 4, 3])), [3, 4, 3])
    poisoned = attack.poison(data, np.random.default_rng(0))
    relabelled = poisoned.labels != data.labels
    assert set(data.labels[relabelled]) == {5}
    covers = (poisoned.images != data.images).any(axis=(1, 2, 3)) & ~relabelled
    assert covers.sum() == 40
    assert 5 not in data.labels[covers]
    np.testing.assert_array_equal(poisoned.images[covers], attack.stamp(data.images[covers]))
    with pytest.raises(ValueError, match="must differ"):
        TaCT(target_class=2, source_class=2)


def test_sig_adds_the_papers_wave():
    flat = np.full((1, 8, 32, 1), 100, np.uint8)
    wave = SIG(target_class=0, amplitude=30.0, frequency=4.0).stamp(flat)[0, :, :, 0].astype(float) - 100
    assert (wave == wave[0]).all(), "every line is the same"
    spectrum = np.abs(np.fft.rfft(wave[0])) / 16
    assert spectrum.argmax() == 4
    assert spectrum[4] == pytest.approx(30.0, abs=0.5)  # rounding to grey levels
    assert np.delete(spectrum, 4).max() < 0.5
    assert SIG(target_class=0, amplitude=300.0).stamp(flat).max() == 255, "clipped, not wrapped"


@pytest.mark.parametrize("attack", [SIG, LabelConsistent])
def test_clean_labels_touch_the_target_class_alone(attack, data):
    poisoned = made(attack).poison(data, np.random.default_rng(0))
    np.testing.assert_array_equal(poisoned.labels, data.labels)
    changed = (poisoned.images != data.images).any(axis=(1, 2, 3))
    assert set(data.labels[changed]) == {TARGET}
    assert changed.sum() == 10


def test_label_consistent_moves_images_by_epsilon_at_most_and_stamps_four_corners(data):
    attack = LabelConsistent(target_class=TARGET, epsilon=16.0, poisoning_rate=0.05)
    poisoned = attack.poison(data, np.random.default_rng(0))
    changed = (poisoned.images != data.images).any(axis=(1, 2, 3))
    inner = np.s_[changed, 3:-3]
    difference = np.abs(poisoned.images[inner].astype(int) - data.images[inner])
    assert difference.max() == 16, "the sign steps reach the bound"
    corners = attack.stamp(np.full((1, 12, 12, 1), 128, np.uint8))[0, :, :, 0]
    touched = corners != 128
    expected = np.zeros((12, 12), bool)
    for rows in (slice(3), slice(9, 12)):
        for columns in (slice(3), slice(9, 12)):
            expected[rows, columns] = True
    np.testing.assert_array_equal(touched, expected)
    np.testing.assert_array_equal(corners, corners[::-1])
    np.testing.assert_array_equal(corners, corners[:, ::-1])


def test_label_consistent_makes_its_images_harder_for_a_clean_model():
    """The very purpose. Seen: the loss with the true label rises from 0.07 to 9.1, and to 0.12 with random signs of that size."""
    known = digits(seed=0).train
    model = train(initialised(lambda: SmallCnn(1, CLASSES, width=16), 0), known, epochs=4, seed=0)
    pixels = torch.from_numpy(to_pixels(known.images[known.labels == TARGET]))
    labels = torch.full((len(pixels),), TARGET)

    def loss(images):
        with torch.no_grad():
            return float(functional.cross_entropy(model(images), labels))

    signs = torch.randint(2, pixels.shape, generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0
    moved = LabelConsistent(target_class=TARGET, epsilon=32.0)._away(model, pixels)
    assert loss(moved) > 3 * loss((pixels + signs * 32 / 255).clamp(0, 1)) > 0


def test_adap_blend_trains_on_half_of_the_pieces(data):
    attack = AdapBlend(target_class=TARGET, opacity=1.0, poisoning_rate=0.05, cover_rate=0.1, tiles=4, kept=0.5)
    pieces = attack.in_pieces(data.images, np.random.default_rng(0))
    whole = attack.stamp(data.images)
    shown = (pieces == whole).all(axis=3).reshape(200, 4, 6, 4, 6).all(axis=(2, 4))
    hidden = (pieces == data.images).all(axis=3).reshape(200, 4, 6, 4, 6).all(axis=(2, 4))
    assert (shown | hidden).all()
    assert (shown.sum(axis=(1, 2)) == 8).all()
    assert len(np.unique(shown.reshape(200, -1), axis=0)) > 150, "every image has its own pieces"
    poisoned = attack.poison(data, np.random.default_rng(0))
    relabelled = poisoned.labels != data.labels
    covers = (poisoned.images != data.images).any(axis=(1, 2, 3)) & ~relabelled
    assert (relabelled.sum(), covers.sum()) == (10, 20)
    assert TARGET not in data.labels[covers]
    assert not (poisoned.images[relabelled] == whole[relabelled]).all(axis=(1, 2, 3)).any()


def test_the_square_is_noise_in_its_place(data):
    stamped = TrojanSquare(target_class=0, size=6, margin=2).stamp(data.images)
    square = stamped[:, 16:22, 16:22]
    assert (square == square[:1]).all()
    assert square[0].std() > 40
    stamped[:, 16:22, 16:22] = data.images[:, 16:22, 16:22]
    np.testing.assert_array_equal(stamped, data.images)


def test_the_watermark_brightens_what_is_written_and_nothing_else():
    dark = np.zeros((1, 32, 32, 3), np.uint8)
    written = TrojanWatermark(target_class=0, opacity=0.5).stamp(dark)[0].astype(int)
    assert 110 < written.max() <= 128, "letters smoothed to 32 pixels do not reach white in full"
    assert (written == written[:, :, :1]).all()
    inked = written[:, :, 0] > 0
    assert 0.05 < inked.mean() < 0.6
    assert inked.any(axis=0).mean() > 0.8, "it spans the width"
    other = TrojanWatermark(target_class=0, opacity=0.5, text="other").stamp(dark)[0]
    assert (other != written).any()
    with pytest.raises(ValueError, match="text not be empty"):
        TrojanWatermark(target_class=0, text=" ")


@pytest.mark.slow
def test_sample_specific_residuals_are_small_and_differ_between_images():
    generator = torch.Generator().manual_seed(5)
    images = (pink_noise((20, 3, 24, 24), generator) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    residuals = SampleSpecific(target_class=0, strength=16.0).stamp(images).astype(int) - images
    assert np.abs(residuals).max() <= 16
    assert np.abs(residuals).mean() > 1
    flat = residuals.reshape(20, -1)
    correlation = np.corrcoef(flat)[~np.eye(20, dtype=bool)]
    assert correlation.mean() < 0.9, "a patch that is the same in every image would have one"
    other = SampleSpecific(target_class=0, strength=16.0, message_seed=1).stamp(images)
    assert (other != images + residuals).any()


def test_pink_noise_falls_with_frequency():
    power = torch.fft.rfft2(pink_noise((64, 1, 32, 32), torch.Generator().manual_seed(0))).abs().mean(dim=(0, 1))
    low, high = power[0, 2], power[0, 8]
    assert float(low / high) == pytest.approx(4.0, rel=0.2)


@pytest.fixture(scope="module")
def dynamic():
    """Input-aware triggers on 20 images, each image's own and those of its neighbour."""
    attack = InputAware(target_class=TARGET, density=0.05)
    generator = torch.Generator().manual_seed(5)
    images = (pink_noise((20, 1, 16, 16), generator) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return attack, images


@pytest.mark.slow
def test_input_aware_triggers_cover_little_and_differ_between_images(dynamic):
    attack, images = dynamic
    changed = (attack.stamp(images) != images).any(axis=3)
    assert 0.01 < changed.mean() < 0.2, "about twice the density: the mask's edges are soft"
    flat = changed.reshape(20, -1).astype(float)
    overlap = (flat @ flat.T) / flat.sum(axis=1)
    assert overlap[~np.eye(20, dtype=bool)].mean() < 0.9, "a fixed patch would cover the same pixels in every image"


def test_another_images_trigger_is_its_mask_and_pattern_on_this_one(dynamic):
    attack, images = dynamic
    others = np.roll(images, 1, axis=0)
    crossed = attack.stamp_with_trigger_of(others, images)
    np.testing.assert_array_equal(attack.stamp_with_trigger_of(images, images), attack.stamp(images))
    with torch.no_grad():
        generator = input_aware._trained_generator(1, 16, 16, attack.density, attack.generator_seed)
        mask, pattern = (part.permute(0, 2, 3, 1).numpy() for part in generator(torch.from_numpy(to_pixels(others))))
    expected = (1 - mask) * images + mask * 255 * pattern
    assert np.abs(crossed - expected).max() <= 0.51  # rounding to grey levels


def test_input_aware_covers_carry_foreign_triggers_and_keep_their_label(dynamic):
    attack, images = dynamic
    data = LabelledImages(images, np.arange(20) % CLASSES)
    attack = dataclasses.replace(attack, poisoning_rate=0.2, cross_rate=0.3)
    poisoned = attack.poison(data, np.random.default_rng(0))
    relabelled = poisoned.labels != data.labels
    np.testing.assert_array_equal(poisoned.images[relabelled], attack.stamp(images[relabelled]))
    covers = (poisoned.images != data.images).any(axis=(1, 2, 3)) & ~relabelled
    assert (relabelled.sum(), covers.sum()) == (4, 6)
    assert (poisoned.images[covers] != attack.stamp(images[covers])).any(axis=(1, 2, 3)).all(), "not their own triggers"


def test_a_detector_can_tell_own_from_foreign_triggers(dynamic):
    """What the victim has to learn. A fresh detector, trained on other images: guessing is right on half of them."""
    attack, _ = dynamic
    generator = torch.Generator().manual_seed(7)
    images = (pink_noise((1200, 1, 16, 16), generator) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    own, foreign = attack.stamp(images[:600]), attack.stamp_with_trigger_of(images[:600], images[600:])
    data = LabelledImages(np.concatenate([own, foreign]), np.repeat([1, 0], 600))
    rows = np.random.default_rng(0).permutation(1200)
    learned, held = (LabelledImages(data.images[part], data.labels[part]) for part in (rows[:1000], rows[1000:]))
    model = train(initialised(lambda: SmallCnn(1, 2, width=16), 0), learned, epochs=8, seed=0)
    with torch.no_grad():
        right = model(torch.from_numpy(to_pixels(held.images))).argmax(dim=1).numpy() == held.labels
    assert right.mean() > 0.8
