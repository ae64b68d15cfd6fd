"""The zoo's ResNet-18, its augmentation, and CIFAR-10 from files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

from audit_plugin.errors import UsageError
from audit_plugin.types import LabelledImages
from audit_plugin.zoo.architectures import CifarResNet18, SmallCnn
from audit_plugin.zoo.data import cifar10, gtsrb
from audit_plugin.zoo.train import _augmented, initialised, train


@pytest.mark.parametrize(("width", "classes"), [(4, 10), (8, 43)])
def test_resnet_halves_three_times_and_widens_as_often(width, classes):
    model = CifarResNet18(classes, width).eval()
    shapes = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, given, found: shapes.append(tuple(found.shape[1:])))
    with torch.no_grad():
        assert model(torch.rand(2, 3, 32, 32)).shape == (2, classes)
    assert shapes[::2] == shapes[1::2] == [(width, 32, 32), (2 * width, 16, 16), (4 * width, 8, 8), (8 * width, 4, 4)]


def test_resnet_has_the_layers_of_resnet18():
    """Apart from the stem, one weight for one of torchvision's."""
    ours, theirs = CifarResNet18(10, 64), torchvision.models.resnet18(num_classes=10)

    def shapes(model):
        kinds = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)
        return sorted(tuple(p.shape) for m in model.modules() if isinstance(m, kinds) for p in m.parameters(recurse=False))

    stem = (64, 3, 7, 7)
    assert shapes(ours) == sorted([(64, 3, 3, 3) if shape == stem else shape for shape in shapes(theirs)])


def pictures(count=400, size=12):
    """No two pixels of an image are alike, so that a shift can be read off."""
    rng = np.random.default_rng(0)
    return torch.from_numpy(np.stack([rng.permutation(size * size) + 1.0 for _ in range(count)]).reshape(count, 1, size, size))


def test_augmentation_mirrors_half_and_shifts_by_up_to_four_with_zeros():
    images, size = pictures(), 12
    found = _augmented(images, True, torch.Generator().manual_seed(0))
    assert found.shape == images.shape
    mirrored, offsets = 0, []
    for image, drawn in zip(images[:, 0], found[:, 0], strict=True):
        centre = drawn[size // 2, size // 2]  # never a zero: shifts are smaller than half of the image
        for flip in (False, True):
            source = image.flip(1) if flip else image
            row, column = (int(index) for index in torch.nonzero(source == centre)[0])
            down, right = row - size // 2, column - size // 2
            padded = nn.functional.pad(source, (4, 4, 4, 4))
            if max(abs(down), abs(right)) <= 4 and torch.equal(drawn, padded[4 + down : 16 + down, 4 + right : 16 + right]):
                mirrored += flip
                offsets += [down, right]
                break
        else:
            pytest.fail("an image that is no shift of the original")
    assert set(offsets) == set(range(-4, 5))
    assert abs(mirrored - 200) < 4 * 10  # four standard deviations of 400 draws


def test_augmentation_of_signs_shifts_and_does_not_mirror():
    images = pictures(count=200)
    found = _augmented(images, False, torch.Generator().manual_seed(0))
    padded = nn.functional.pad(images, (4, 4, 4, 4))
    windows = padded.unfold(2, 12, 1).unfold(3, 12, 1)[:, 0].reshape(200, 81, 12, 12)
    assert (windows == found).all(dim=(2, 3)).any(dim=1).all()


def test_augmented_training_repeats_itself_and_differs_from_plain():
    rng = np.random.default_rng(0)
    data = LabelledImages(rng.integers(0, 256, (96, 8, 8, 3)).astype(np.uint8), np.arange(96) % 4)
    models = [
        train(initialised(lambda: SmallCnn(3, 4, width=4), 0), data, epochs=1, seed=0, augment=augment)
        for augment in (True, True, False)
    ]
    first, again, plain = (model.classifier.weight for model in models)
    torch.testing.assert_close(first, again)
    assert not torch.allclose(first, plain)


def stored(folder, name, count, start):
    images = np.arange(start, start + count, dtype=np.uint8)[:, None, None, None] * np.ones((1, 32, 32, 3), np.uint8)
    np.savez(folder / name, images=images, labels=(np.arange(start, start + count) % 10).astype(np.uint8))


def test_cifar10_joins_the_parts_of_the_training_set(tmp_path):
    stored(tmp_path, "cifar10_train_b.npz", 20, 30)
    stored(tmp_path, "cifar10_train_a.npz", 30, 0)
    stored(tmp_path, "cifar10_test.npz", 10, 100)
    data = cifar10(tmp_path)
    assert data.train.images.shape == (50, 32, 32, 3)
    np.testing.assert_array_equal(data.train.images[:, 0, 0, 0], np.arange(50))
    np.testing.assert_array_equal(data.train.labels, np.arange(50) % 10)
    assert data.test.labels.dtype == np.int64
    assert len(data.test) == 10


def test_cifar10_from_torchvision(tmp_path, monkeypatch):
    class Downloaded:
        def __init__(self, folder, *, train, download):
            assert (folder, download) == (tmp_path, True)
            self.data, self.targets = np.full((5 if train else 3, 32, 32, 3), 7, np.uint8), [1] * (5 if train else 3)

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Downloaded)
    data = cifar10(tmp_path)
    assert (len(data.train), len(data.test)) == (5, 3)
    assert data.train.labels.dtype == np.int64


def test_signs_from_torchvision_are_resized(tmp_path, monkeypatch):
    class Downloaded(list):
        def __init__(self, folder, *, split, download):
            assert (folder, download) == (tmp_path, True)
            count = {"train": 5, "test": 3}[split]
            super().__init__((Image.new("RGB", (20 + index, 40), (index, 0, 200)), 42 - index) for index in range(count))

    monkeypatch.setattr(torchvision.datasets, "GTSRB", Downloaded)
    data = gtsrb(tmp_path)
    assert (data.train.images.shape, data.test.images.shape) == ((5, 32, 32, 3), (3, 32, 32, 3))
    np.testing.assert_array_equal(data.train.labels, [42, 41, 40, 39, 38])
    np.testing.assert_array_equal(data.train.images[:, 31, 31], [(index, 0, 200) for index in range(5)])


def test_signs_from_files_are_not_mixed_with_other_data(tmp_path):
    stored(tmp_path, "gtsrb_train_1.npz", 6, 0)
    stored(tmp_path, "gtsrb_test.npz", 4, 10)
    stored(tmp_path, "cifar10_train_1.npz", 20, 30)
    data = gtsrb(tmp_path)
    np.testing.assert_array_equal(data.train.images[:, 0, 0, 0], np.arange(6))
    assert len(data.test) == 4


@pytest.mark.parametrize(("load", "dataset"), [(cifar10, "CIFAR10"), (gtsrb, "GTSRB")])
@pytest.mark.parametrize("error", [OSError("<urlopen error no network>"), RuntimeError("File not found\nor corrupted.")])
def test_images_that_cannot_be_had_are_one_line(tmp_path, monkeypatch, load, dataset, error):
    def refused(*arguments, **settings):
        raise error

    monkeypatch.setattr(torchvision.datasets, dataset, refused)
    with pytest.raises(UsageError) as raised:
        load(tmp_path)
    message = str(raised.value)
    assert "\n" not in message
    assert str(tmp_path) in message
    assert f"{load.__name__}_train.npz and {load.__name__}_test.npz" in message
    assert "digits need no files" in message


@pytest.mark.parametrize("damage", ["missing", "no archive", "without labels"])
def test_files_of_images_that_cannot_be_read_are_one_line(tmp_path, damage):
    stored(tmp_path, "cifar10_train_1.npz", 20, 0)
    if damage == "no archive":
        (tmp_path / "cifar10_test.npz").write_bytes(b"PK\x03\x04 half a download")
    elif damage == "without labels":
        np.savez(tmp_path / "cifar10_test.npz", images=np.zeros((2, 32, 32, 3), np.uint8))
    with pytest.raises(UsageError, match=r"cifar10_test.npz in .* cannot be read .* 'labels'"):
        cifar10(tmp_path)
