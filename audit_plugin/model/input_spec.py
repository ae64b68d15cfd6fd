"""How pixels become what a model expects:

read from the policy, else from tags of the version, else from the model's own shape.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any, cast, get_args

from audit_plugin.errors import SubjectError
from audit_plugin.policy import ModelPolicy
from audit_plugin.types import InputSpec, IntakeFinding, Layout

TAG_PREFIX = "audit.input."
CLASSES_TAG = "audit.classes"
INPUT_FROM_TAGS = "input-from-tags"
"""Code of a model whose input is prepared as tags say that the policy does not trust."""

CHANNELS = (1, 3)

_SETTINGS = ("layout", "low", "high", "mean", "std")
_LONGEST_NAME = 200  # characters of a class's


def is_input_tag(name: str) -> bool:
    """Whether a tag of this name says how images become input, or what the classes are called."""
    return name.startswith(TAG_PREFIX) or name == CLASSES_TAG


def input_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Those of a version's tags that say how images become input, or what the classes are called."""
    return {name: value for name, value in tags.items() if is_input_tag(name)}


def open_shape(policy: ModelPolicy) -> tuple[int, int, int, int]:
    """What the policy says about the input shape, in the model's layout; -1 for what it leaves open."""
    channels, height, width = (size if size else -1 for size in (policy.channels, policy.height, policy.width))
    return _in_layout(channels, height, width, policy.layout)


def input_shape(spec: InputSpec) -> tuple[int, int, int, int]:
    """Of a model's input in its own layout; -1 for the batch."""
    return _in_layout(spec.channels, spec.height, spec.width, spec.layout)


def _in_layout(channels: int, height: int, width: int, layout: str | None) -> tuple[int, int, int, int]:
    return (-1, height, width, channels) if layout == "NHWC" else (-1, channels, height, width)


def resolve_input_spec(shape: tuple[int, ...], policy: ModelPolicy, tags: Mapping[str, str]) -> InputSpec:
    """The input specification of a model that takes ``shape``.

    A value in the policy wins over the tag ``audit.input.<name>`` (numbers separated by commas), which wins over the
    default: pixels in [0, 1], no normalisation.

    Raises:
        SubjectError: the shape holds no image of 1 or 3 channels, or mean, std or a tag do not fit it.
    """
    layout = _layout(shape, policy.layout or tags.get(f"{TAG_PREFIX}layout"))
    height, width, channels = shape[1:] if layout == "NHWC" else (shape[2], shape[3], shape[1])
    if channels not in CHANNELS:
        raise SubjectError(
            f"Expected images of 1 (grey) or 3 (RGB) channels, the model takes {channels} (shape {shape}, read as {layout}). "
            "If the layout is another one, set [model] layout in the policy."
        )
    mean = _per_channel("mean", _setting("mean", policy.mean, tags, (0.0,)), channels)
    std = _per_channel("std", _setting("std", policy.std, tags, (1.0,)), channels)
    (low,) = _single("low", _setting("low", policy.low, tags, (0.0,)))
    (high,) = _single("high", _setting("high", policy.high, tags, (1.0,)))
    if min(std) <= 0 or not low < high or not all(map(math.isfinite, (*mean, *std, low, high))):
        raise SubjectError(
            f"mean, std, low and high must be finite, std positive and low below high, got mean {mean}, std {std}, low {low}, "
            f"high {high}."
        )
    return InputSpec(height, width, channels, layout, low, high, mean, std)


def distrusted_tags(
    spec: InputSpec, shape: tuple[int, ...], policy: ModelPolicy, tags: Mapping[str, str], path: str
) -> tuple[IntakeFinding, ...]:
    """What keeps a model from passing whose input tags decide on: any client can set them, and triggers outside of the range
    that they name are never searched.

    Args:
        spec: as :func:`resolve_input_spec` made it from the others.
        path: of the model's file.
    """
    if policy.trust_tags:
        return ()
    with contextlib.suppress(SubjectError):  # without the tags there is no input at all
        if resolve_input_spec(shape, policy, {}) == spec:
            return ()
    names = [name for name in _SETTINGS if getattr(policy, name) is None and f"{TAG_PREFIX}{name}" in tags]
    told = (
        f"how pixels become input is read from tags of the version ({', '.join(TAG_PREFIX + name for name in names)}), which "
        f"any client can set, and a trigger outside of their range is never searched; set [model] {', '.join(names)} in the "
        "policy, or trust_tags where only people whom you trust can set tags"
    )
    return (IntakeFinding(path, told, INPUT_FROM_TAGS),)


def resolve_class_names(count: int, policy: ModelPolicy, tags: Mapping[str, str]) -> tuple[str, ...]:
    """Names in index order: from the policy, the tag ``audit.classes`` (separated by commas), or the numbers 0, 1, ...

    Raises:
        SubjectError: another number of names than the model has classes, a name twice, or one of more than 200 characters,
            which would not fit into a signed statement.
    """
    names = policy.classes
    if names is None and CLASSES_TAG in tags:
        names = tuple(name.strip() for name in tags[CLASSES_TAG].split(","))
    if names is None:
        return tuple(str(index) for index in range(count))
    if len(names) != count or len(set(names)) != count:
        raise SubjectError(f"The model has {count} classes, but {len(names)} names are given ({len(set(names))} different ones).")
    if (longest := max(map(len, names))) > _LONGEST_NAME:
        raise SubjectError(f"A class has a name of {longest} characters, and at most {_LONGEST_NAME} are read. Shorten it.")
    return names


def _layout(shape: tuple[int, ...], wanted: str | None) -> Layout:
    if wanted is None:
        return "NHWC" if shape[3] in CHANNELS and shape[1] not in CHANNELS else "NCHW"
    for layout in get_args(Layout):
        if wanted == layout:
            return cast(Layout, layout)
    raise SubjectError(f"The layout must be 'NCHW' or 'NHWC', got {wanted!r}.")


def _setting(name: str, from_policy: Any, tags: Mapping[str, str], default: tuple[float, ...]) -> tuple[float, ...]:
    if from_policy is not None:
        return from_policy if isinstance(from_policy, tuple) else (from_policy,)
    tag = tags.get(f"{TAG_PREFIX}{name}")
    if tag is None:
        return default
    try:
        return tuple(float(part) for part in tag.split(","))
    except ValueError as error:
        raise SubjectError(f"The tag '{TAG_PREFIX}{name}' must hold numbers separated by commas, got {tag!r}.") from error


def _per_channel(name: str, values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    if len(values) == 1:
        return values * channels
    if len(values) != channels:
        raise SubjectError(f"Expected 1 or {channels} values of {name} for {channels} channels, got {len(values)}.")
    return values


def _single(name: str, values: tuple[float, ...]) -> tuple[float]:
    if len(values) != 1:
        raise SubjectError(f"Expected one value of {name}, got {len(values)}.")
    return (values[0],)
