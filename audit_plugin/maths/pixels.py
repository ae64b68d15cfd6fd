"""Stored images and computed pixels."""

from __future__ import annotations

import numpy as np

from audit_plugin.types import FloatArray, ImageArray


def to_pixels(images: ImageArray) -> FloatArray:
    """uint8 (N, height, width, channels) -> float32 (N, channels, height, width) in [0, 1]."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32) / np.float32(255.0)
