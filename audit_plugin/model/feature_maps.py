"""Which tap holds the last feature map of a network, and along which axis its channels lie."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class FeatureMap:
    """A tap whose value has channels at more than one position.

    Attributes:
        layer: name of the tap.
        shape: of its value, without the batch.
        channels_last: (positions ..., channels) rather than (channels, positions ...).
    """

    layer: str
    shape: tuple[int, ...]
    channels_last: bool

    @property
    def channel_count(self) -> int:
        return self.shape[-1 if self.channels_last else 0]

    @property
    def position_count(self) -> int:
        return math.prod(self.shape) // self.channel_count


def has_channels_last(shape: tuple[int, ...], image_size: tuple[int, ...]) -> bool:
    """Whether a map is (height, width, channels), as in a Swin transformer, rather than (channels, height, width).

    No other sign tells than its sizes. Of square images, channels come last if the first two are equal and the third is
    another; of others, if the first two have the images' aspect ratio rather than the last two.

    Args:
        shape: of the map, three sizes above 0.
        image_size: height and width of the images.
    """
    first, second, third = shape
    height, width = image_size
    if height == width:
        return first == second != third
    apart_last, apart_first = (abs(math.log(tall * width / (wide * height))) for tall, wide in ((first, second), (second, third)))
    return apart_last < apart_first


def last_feature_map(
    shapes: Mapping[str, tuple[int, ...]], image_size: tuple[int, ...], dimensions: tuple[int, ...] = (3, 4)
) -> FeatureMap | None:
    """The last tap with a feature map, or None.

    Values of four dimensions are (N, channels, height, width), or (N, height, width, channels), see :func:`has_channels_last`.
    Values of three are a transformer's (N, tokens, channels), each token a position. A map of one position has no norm worth the
    name and is passed over.

    Args:
        shapes: without the batch, by tap, in the order of the network.
        image_size: height and width of the images.
        dimensions: how many, the batch included, are accepted.
    """
    for layer, shape in reversed(list(shapes.items())):
        if len(shape) + 1 not in dimensions or 0 in shape:
            continue
        found = FeatureMap(layer, shape, len(shape) == 2 or has_channels_last(shape, image_size))
        if found.position_count > 1:
            return found
    return None
