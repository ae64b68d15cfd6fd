"""A picture of what each attack of the zoo does to an image."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_sample_image

from audit_plugin.types import ImageArray
from audit_plugin.zoo.attacks import Attack

_SIZE, _ZOOM, _GAP, _LABEL, _COLUMNS = 32, 3, 8, 18, 7
_AMPLIFIED = 5
_ROWS = ("image", "triggered", f"difference x {_AMPLIFIED}")


def sample_image() -> ImageArray:
    """A square of scikit-learn's china.jpg (by danielbuechele, CC BY 2.0), uint8 (1, 32, 32, 3)."""
    square = Image.fromarray(load_sample_image("china.jpg")).crop((100, 20, 480, 400))
    return np.asarray(square.resize((_SIZE, _SIZE), Image.Resampling.LANCZOS))[None]


def attacks_picture(attacks: Mapping[str, Attack]) -> Image.Image:
    """For each attack, below its name: the image, the image with the trigger, and their absolute difference, made brighter."""
    clean = sample_image()
    tile, side = _SIZE * _ZOOM, 110
    lines = -(-len(attacks) // _COLUMNS)
    height = _LABEL + len(_ROWS) * (tile + _GAP) + _GAP
    canvas = Image.new("RGB", (side + _COLUMNS * (tile + _GAP), lines * height), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=11)
    for line in range(lines):
        for row, text in enumerate(_ROWS):
            draw.text((6, line * height + _LABEL + row * (tile + _GAP) + tile // 2 - 6), text, "black", font)
    for index, (name, attack) in enumerate(attacks.items()):
        line, column = divmod(index, _COLUMNS)
        left, top = side + column * (tile + _GAP), line * height
        triggered = attack.stamp(clean)
        difference = np.abs(triggered.astype(np.int64) - clean) * _AMPLIFIED
        draw.text((left, top + 2), name, "black", font)
        for row, shown in enumerate((clean, triggered, difference.clip(0, 255).astype(np.uint8))):
            picture = Image.fromarray(shown[0]).resize((tile, tile), Image.Resampling.NEAREST)
            canvas.paste(picture, (left, top + _LABEL + row * (tile + _GAP)))
    return canvas
