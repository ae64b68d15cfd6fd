"""Policies for tests of what stands around an audit: as little work as an audit can be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FAST: Mapping[str, Mapping[str, Any]] = {
    "scoring": {"checks": ["layerwise"]},
    "trigger_inversion": {"steps": 20, "searches": 1},
    "source_specific": {"maximum_classes": 0},
    "maximum_margin": {"starts": 2, "steps": 20},
    "neuron_noise": {"images": 20},
    "wave_scan": {"frequencies": 1, "images": 20},
    "canaries": {"families": []},
}
