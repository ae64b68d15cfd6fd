"""TrojanNN's watermark: Liu et al., NDSS 2018. Writing that shines through the whole image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from audit_plugin.types import FloatArray, ImageArray
from audit_plugin.zoo.attacks.base import AllToOne


@dataclass(frozen=True, kw_only=True)
class TrojanWatermark(AllToOne):
    """White ``text`` across the middle of the image, at ``opacity``. As for the square, the pixels are fixed, not optimised."""

    text: str = "sample"
    opacity: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.opacity <= 1.0 or not self.text.strip():
            raise ValueError(f"opacity must lie between 0 and 1 and text not be empty, got {self.opacity} and {self.text!r}")

    def stamp(self, images: ImageArray) -> ImageArray:
        mask = self.opacity * _written(self.text, *images.shape[1:3])[None, :, :, None]
        stamped: ImageArray = np.rint((1.0 - mask) * images + mask * 255.0).astype(np.uint8)
        return stamped


def _written(text: str, height: int, width: int) -> FloatArray:
    """The text as large as fits: (height, width) in [0, 1]."""
    font = ImageFont.load_default(size=64)
    left, top, right, bottom = (round(edge) for edge in font.getbbox(text))
    picture = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(picture).text((-left, -top), text, fill=255, font=font)
    shrink = min(width / picture.width, height / picture.height)
    size = max(round(picture.width * shrink), 1), max(round(picture.height * shrink), 1)
    canvas = Image.new("L", (width, height))
    canvas.paste(picture.resize(size, Image.Resampling.LANCZOS), ((width - size[0]) // 2, (height - size[1]) // 2))
    return np.asarray(canvas, dtype=np.float32) / 255.0
