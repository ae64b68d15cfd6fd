from __future__ import annotations

import numpy as np
import pytest

from audit_plugin.maths.pixels import to_pixels


def test_pixels_are_channels_first_between_0_and_1():
    images = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3)).astype(np.uint8)
    images[0, 1, 2] = (0, 51, 255)
    pixels = to_pixels(images)
    assert pixels.dtype == np.float32
    assert pixels.shape == (6, 3, 5, 4)
    assert pixels.flags.c_contiguous
    assert pixels[0, :, 1, 2].tolist() == pytest.approx([0.0, 0.2, 1.0])
    np.testing.assert_array_equal(np.rint(pixels * 255).astype(np.uint8).transpose(0, 2, 3, 1), images)
