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


def last_feature_map(shapes: Mapping[str, tuple[int, ...]], dimensions: tuple[int, ...] = (3, 4)) -> FeatureMap | None:
    """The last tap with a feature map, or None.

    Values of four dimensions are (N, channels, height, width), or (N, height, width, channels) if the first two sizes are
    equal and the third is another (as in a Swin transformer; no other sign tells). Values of three are a transformer's
    (N, tokens, channels), each token a position. A map of one position has no norm worth the name and is passed over.

    Args:
        shapes: without the batch, by tap, in the order of the network.
        dimensions: how many, the batch included, are accepted.
    """
    for layer, shape in reversed(list(shapes.items())):
        if len(shape) + 1 not in dimensions or 0 in shape:
            continue
        found = FeatureMap(layer, shape, len(shape) == 2 or shape[0] == shape[1] != shape[2])
        if found.position_count > 1:
            return found
    return None
