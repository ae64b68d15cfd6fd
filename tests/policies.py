"""Policies for tests of what stands around an audit: as little work as an audit can be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

FAST: Mapping[str, Mapping[str, Any]] = {
    "scoring": {"checks": ["layerwise"]},
    "trigger_inversion": {"steps": 20, "searches": 1},
    "source_specific": {"maximum_classes": 0},
    "maximum_margin": {"starts": 2, "steps": 20},
    "neuron_noise": {"images": 20, "kept_accuracy": []},
    "wave_scan": {"frequencies": 1, "images": 20},
    "canaries": {"families": []},
}


def as_toml(policy: Mapping[str, Mapping[str, Any]]) -> str:
    """The text of a policy file; numbers, truth values, texts and lists of them are written in JSON as in TOML."""
    sections = (
        [f"[{section}]", *(f"{json.dumps(key)} = {json.dumps(value)}" for key, value in settings.items())]
        for section, settings in policy.items()
    )
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n"
