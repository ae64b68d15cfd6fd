"""Pictures of the report: inline SVG charts written by hand, and PNG pictures of images and triggers.

Charts take their colours from CSS variables (``--figure-...``) with a fallback, and text from ``currentColor``, so that
they follow the page into dark mode. Every mark carries ``data-value``: a chart can be read by a machine and checked by a
test. No meaning is carried by colour alone. Pictures are PNG, never JPEG: one pixel may be the trigger.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from audit_plugin.report.sanitise import clean_text
from audit_plugin.report.summaries import Histogram
from audit_plugin.report.wording import number
from audit_plugin.types import FloatArray, ImageArray, Profile, Trigger

WIDTH = 760.0
MOST_BARS = 100
LOGARITHMIC_RATIO = 20.0
LARGEST_PICTURE = 384
LARGEST_OVERLAY = 192
FEW_SUSPECTS = 30
"""Fewer suspect inputs than this are drawn as single marks: shares of so few would dwarf every other bar."""

_LEFT, _RIGHT = 64.0, 16.0
_BASE = "var(--figure-base,#6b83a8)"
_ALERT = "var(--figure-alert,#b3261e)"
_SUSPECT = "var(--figure-suspect,#8a5a00)"
_GRID = "var(--figure-grid,#8884)"
_PAPER = "var(--figure-paper,#fff)"
_GREY = 0.5

# Five stops of matplotlib's 'plasma', which grows lighter all the way, so that it also reads without colour vision.
_HEAT = np.array([[13, 8, 135], [126, 3, 168], [204, 71, 120], [248, 149, 64], [240, 249, 33]], dtype=np.float64) / 255.0
_MOST_HEAT = 0.8


# ------------------------------------------------------------------------------------------------------- pictures


def picture_png(pixels: NDArray[np.generic], scale: int = 1, largest: int = LARGEST_PICTURE) -> bytes:
    """A PNG of one image, every pixel enlarged to ``scale`` x ``scale`` without smoothing.

    Args:
        pixels: floating point (channels, height, width) in [0, 1], or uint8 (height, width, channels); 1 or 3 channels.
        scale: whole number of at least 1.
        largest: longer side in pixels beyond which the picture is shrunk.
    """
    if scale < 1:
        raise ValueError(f"Expected a scale of at least 1, got {scale}.")
    image = _to_bytes(pixels)
    enlarged = image.repeat(scale, axis=0).repeat(scale, axis=1)
    picture = Image.fromarray(enlarged[:, :, 0] if enlarged.shape[2] == 1 else enlarged)
    if max(enlarged.shape[:2]) > largest:
        picture.thumbnail((largest, largest), Image.Resampling.BOX)
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    return stream.getvalue()


def fitting_scale(height: int, width: int, wanted: int = 160) -> int:
    """The scale that brings the longer side near ``wanted`` pixels; 1 for images that are larger."""
    return max(1, round(wanted / max(height, width, 1)))


def data_uri(png: bytes) -> str:
    """``png`` as the address of an ``<img>`` that fetches nothing."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def stamped_part(trigger: Trigger) -> ImageArray:
    """What the trigger paints, on mid grey: uint8 (height, width, channels).

    An additive trigger is amplified until its largest change is black or white, since most would be invisible.
    """
    mask = np.nan_to_num(np.asarray(trigger.mask, dtype=np.float64))
    pattern = np.nan_to_num(np.asarray(trigger.pattern, dtype=np.float64))
    if trigger.is_added:
        return _to_bytes(_GREY + (1.0 - _GREY) * pattern / (np.abs(pattern).max(initial=0.0) or 1.0))
    return _to_bytes(mask * pattern + (1.0 - mask) * _GREY)


def mask_picture(trigger: Trigger) -> ImageArray:
    """The mask, white where the trigger covers the image (an additive one: relative to its largest change).

    Returns uint8 (height, width, 1).
    """
    mask = np.nan_to_num(np.asarray(trigger.mask, dtype=np.float64))
    if trigger.is_added:
        mask = mask / (mask.max(initial=0.0) or 1.0)
    return _to_bytes(mask[None])


def mask_thumbnail(trigger: Trigger, side: int = 32) -> ImageArray:
    """The mask in at most ``side`` pixels, relative to its largest value; a single covered pixel stays visible.

    Returns uint8 (height, width, 1).
    """
    mask = np.nan_to_num(np.asarray(trigger.mask, dtype=np.float64))
    block = max(1, math.ceil(max(mask.shape) / side))
    rows, columns = (math.ceil(length / block) for length in mask.shape)
    padded = np.zeros((rows * block, columns * block))
    padded[: mask.shape[0], : mask.shape[1]] = mask
    blocks = padded.reshape(rows, block, columns, block).max(axis=(1, 3))
    return _to_bytes((blocks / (blocks.max(initial=0.0) or 1.0))[None])


def attention_picture(image: ImageArray, attention: FloatArray) -> ImageArray:
    """A heat map over the grey image, from the bare image at 0 to mostly heat at 1: uint8 (height, width, 3).

    Args:
        image: uint8 (height, width, channels).
        attention: (height, width) in [0, 1]; what is not finite counts as 0.
    """
    if attention.shape != image.shape[:2]:
        raise ValueError(f"Expected attention of shape {image.shape[:2]}, got {attention.shape}.")
    values = np.nan_to_num(np.asarray(attention, dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0).clip(0.0, 1.0)
    stops = np.linspace(0.0, 1.0, len(_HEAT))
    heat = np.stack([np.interp(values, stops, _HEAT[:, channel]) for channel in range(3)], axis=2)
    grey = _to_bytes(image).astype(np.float64).mean(axis=2, keepdims=True) / 255.0
    weight = _MOST_HEAT * values[..., None]
    blended: ImageArray = np.rint(255.0 * ((1.0 - weight) * grey + weight * heat)).astype(np.uint8)
    return blended


def trigger_png(trigger: Trigger) -> bytes:
    """What is stamped (left) and the mask (right) in one PNG."""
    part = np.broadcast_to(stamped_part(trigger), (*trigger.mask.shape, 3))
    mask = np.broadcast_to(mask_picture(trigger), (*trigger.mask.shape, 3))
    gap = np.full((trigger.mask.shape[0], max(1, trigger.mask.shape[1] // 16), 3), 255, dtype=np.uint8)
    scale = fitting_scale(*trigger.mask.shape)
    return picture_png(np.concatenate([part, gap, mask], axis=1), scale)


def _to_bytes(pixels: NDArray[np.generic]) -> ImageArray:
    array = np.asarray(pixels)
    if array.ndim != 3:
        raise ValueError(f"Expected one image of three dimensions, got shape {array.shape}.")
    if array.dtype == np.uint8:
        image = np.asarray(array, dtype=np.uint8)
    elif np.issubdtype(array.dtype, np.floating):
        values = np.nan_to_num(np.asarray(array, dtype=np.float64)).clip(0.0, 1.0).transpose(1, 2, 0)
        image = np.round(values * 255.0).astype(np.uint8)
    else:
        raise ValueError(f"Expected float pixels (channels first) or uint8 (channels last), got {array.dtype}.")
    if image.shape[2] not in (1, 3):
        raise ValueError(f"Expected 1 or 3 channels, got {image.shape[2]} (shape {array.shape}).")
    return image


# --------------------------------------------------------------------------------------------------------- charts


@dataclass(frozen=True)
class Axis:
    """Maps values in [``low``, ``high``] to coordinates from ``start`` to ``stop``."""

    low: float
    high: float
    start: float
    stop: float
    logarithmic: bool = False

    def position(self, value: float) -> float:
        """The coordinate of ``value``, held inside the axis."""
        low, high, here = self.low, self.high, min(max(value, self.low), self.high)
        if self.logarithmic:
            low, high, here = math.log10(low), math.log10(high), math.log10(here)
        return self.start + (here - low) / (high - low) * (self.stop - self.start)

    def ticks(self, about: int = 5) -> list[float]:
        """Round values inside the axis."""
        if self.logarithmic:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1.0, 2.0, 5.0) if len(decades) <= 3 else (1.0,)
            candidates = [step * 10.0**decade for decade in decades for step in steps]
        else:
            rough = (self.high - self.low) / about
            power = 10.0 ** math.floor(math.log10(rough))
            step = next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= rough * 0.999)
            first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
            candidates = [index * step for index in range(first, last + 1)]
        slack = 1e-9 * (self.high - self.low)
        return [tick for tick in candidates if self.low - slack <= tick <= self.high + slack]


def bar_chart(
    values: Sequence[float],
    labels: Sequence[str],
    *,
    identifier: str,
    title: str,
    quantity: str,
    short_labels: Sequence[str] | None = None,
    highlighted: Collection[int] = (),
    logarithmic: bool | None = None,
    largest_matter: bool = False,
) -> str:
    """Bars from left to right with the median as a dashed line; ``highlighted`` bars carry an arrow, the smallest also its name.

    Args:
        values: one value a bar; one that is not finite is drawn as 'n/a'.
        labels: one (untrusted) label a bar.
        short_labels: what stands under the bars when there are too many of them for ``labels``.
        identifier: unique on the page.
        quantity: label of the value axis, with its unit.
        highlighted: positions in ``values``.
        logarithmic: None chooses a logarithmic axis when the values span a factor of more than 20.

    Beyond ``MOST_BARS`` bars only the smallest are drawn, in ascending order, or, if the ``largest_matter``, these in descending
    order; the description says so.
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return _empty(identifier, title)
    median = float(np.median(finite))
    shown = list(range(len(values)))
    if len(values) > MOST_BARS:
        drawable = (index for index in shown if math.isfinite(values[index]))
        shown = sorted(drawable, key=values.__getitem__, reverse=largest_matter)[:MOST_BARS]
    positive = min(finite) > 0
    if logarithmic is None:
        logarithmic = positive and max(finite) / min(finite) > LOGARITHMIC_RATIO
    top, bottom, height = 30.0, 222.0, 268.0
    if logarithmic and positive:
        axis = Axis(10.0 ** math.floor(math.log10(min(finite)) - 0.15), max(finite) * 1.25, bottom, top, True)
    else:
        axis = Axis(0.0, max(max(finite), 1e-12) * 1.12, bottom, top)
    scale = "logarithmic scale" if axis.logarithmic else "linear scale"
    description = (
        f"{quantity} of {len(values)} bars, {scale}; median {number(median)}, smallest {number(min(finite))}, "
        f"largest {number(max(finite))}."
    )
    if len(shown) < len(values):
        kept = "largest are drawn, in descending order" if largest_matter else "smallest are drawn, in ascending order"
        description += f" Only the {len(shown)} {kept}."
    for index in sorted(highlighted):
        description += f" Highlighted: {_label(labels[index], 40)}, {number(values[index])}."

    slot = (WIDTH - _LEFT - _RIGHT) / len(shown)
    bar_width = min(slot * 0.72, 44.0)
    crowded = slot < 40
    under = short_labels if crowded and short_labels is not None else labels
    every = max(1, math.ceil(_label_room(under, shown) / slot)) if crowded else 1
    parts = [_value_axis(axis, f"{quantity} ({'log' if axis.logarithmic else 'linear'})", top, bottom)]
    marks: list[tuple[float, float, float, str]] = []
    for place, index in enumerate(shown):
        middle = _LEFT + (place + 0.5) * slot
        value, label = values[index], _label(labels[index], 40)
        marked = index in highlighted
        if math.isfinite(value):
            y = axis.position(value)
            parts.append(
                f'<rect class="bar{" marked" if marked else ""}" data-value="{value:.6g}" data-index="{index}" '
                f'x="{middle - bar_width / 2:.2f}" y="{y:.2f}" width="{bar_width:.2f}" height="{bottom - y:.2f}" rx="1.5" '
                f'style="fill:{_ALERT if marked else _BASE}"><title>{_text(label)}: {number(value)}</title></rect>'
            )
            if marked:
                marks.append((value, middle, y, f"{label}: {number(value)}"))
        else:
            parts.append(f'<text x="{middle:.2f}" y="{bottom - 4:.2f}" text-anchor="middle" font-size="11">n/a</text>')
        if place % every == 0:
            short = _label(under[index], max(3, int(slot * every / 6.4)))
            parts.append(
                f'<text x="{middle:.2f}" y="{bottom + 17:.2f}" text-anchor="middle" font-size="11">{_text(short)}</text>'
            )
    # The median's name stands over the chart, on the side where the highlighted bar's name is not.
    y, named = axis.position(median), min(marks, default=None)
    left_side = named is not None and named[1] > WIDTH * 0.55
    x = _LEFT if left_side else WIDTH - _RIGHT - 104
    parts.append(
        f'<line class="median" data-value="{median:.6g}" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.2f}" y2="{y:.2f}" '
        f'style="stroke:currentColor" stroke-width="1.2" stroke-dasharray="5 4"/>'
        f'<line x1="{x}" x2="{x + 22}" y1="{top - 16}" y2="{top - 16}" style="stroke:currentColor" stroke-width="1.2" '
        f'stroke-dasharray="5 4"/><text x="{x + 28}" y="{top - 12}" font-size="12">median {number(median)}</text>'
    )
    for rank, (_, middle, y, label) in enumerate(sorted(marks)):
        parts.append(_marker(middle, y, label if rank == 0 else "", top - 12))
    parts.append(_horizontal_title("class" if len(shown) == len(values) else "class, smallest first", height - 10))
    return _svg(identifier, title, description, height, parts)


def profile_chart(profile: Profile, *, identifier: str, title: str, clean_name: str, stamped_name: str) -> str:
    """The layer-wise profile: clean mean with a band of one spread, and the stamped images as a dashed line with squares."""
    count = len(profile.layers)
    low = [mean - spread for mean, spread in zip(profile.clean, profile.clean_spread, strict=True)]
    high = [mean + spread for mean, spread in zip(profile.clean, profile.clean_spread, strict=True)]
    finite = [value for value in (*low, *high, *profile.stamped) if math.isfinite(value)]
    if not finite or count == 0:
        return _empty(identifier, title)
    top, bottom = 40.0, 232.0
    longest = max(len(_label(layer, 18)) for layer in profile.layers)
    height = bottom + 34.0 + min(longest, 18) * 3.4
    margin = 0.06 * (max(finite) - min(finite)) or 0.5
    vertical = Axis(min(finite) - margin, max(finite) + margin, bottom, top)
    horizontal = Axis(0.0, max(count - 1.0, 1.0), _LEFT + 22, WIDTH - _RIGHT - 22)
    across = [horizontal.position(float(index)) for index in range(count)]
    gaps = [
        abs(mean - value) / spread if spread > 0 else 0.0
        for mean, spread, value in zip(profile.clean, profile.clean_spread, profile.stamped, strict=True)
    ]
    description = f"{profile.quantity} over {count} layers, clean images (mean and one spread) and stamped images."
    if profile.stamped and any(math.isfinite(gap) and gap > 0 for gap in gaps):
        widest = max(range(count), key=lambda index: gaps[index] if math.isfinite(gaps[index]) else -1.0)
        description += (
            f" They differ most at {_label(profile.layers[widest], 40)}: {number(profile.clean[widest])} clean, "
            f"{number(profile.stamped[widest])} stamped."
        )
    parts = [_value_axis(vertical, _label(profile.quantity, 46), top, bottom)]
    band = [index for index in range(count) if math.isfinite(low[index]) and math.isfinite(high[index])]
    outline = [(across[index], vertical.position(high[index])) for index in band]
    outline += [(across[index], vertical.position(low[index])) for index in reversed(band)]
    parts.append(f'<polygon class="band" points="{_points(outline)}" style="fill:{_BASE};fill-opacity:.22"/>')
    parts.append(_curve("clean", profile.clean, across, vertical, _BASE, dashed=False))
    parts.append(_curve("stamped", profile.stamped, across, vertical, _ALERT, dashed=True))
    every = max(1, math.ceil(count * 15.0 / (WIDTH - _LEFT - _RIGHT)))
    for index in range(0, count, every):
        x, y = across[index] + 4, bottom + 16
        parts.append(
            f'<text x="{x:.2f}" y="{y:.2f}" font-size="11" text-anchor="end" transform="rotate(-32 {x:.2f} {y:.2f})">'
            f"{_text(_label(profile.layers[index], 18))}</text>"
        )
    parts.append(_horizontal_title("layer, input to output", height - 6))
    parts.append(
        f'<g font-size="12"><rect x="{_LEFT}" y="10" width="22" height="10" style="fill:{_BASE};fill-opacity:.22"/>'
        f'<line x1="{_LEFT}" x2="{_LEFT + 22}" y1="15" y2="15" stroke-width="2" style="stroke:{_BASE}"/>'
        f'<text x="{_LEFT + 29}" y="19">{_text(_label(clean_name, 44))}</text>'
        f'<line x1="{_LEFT + 330}" x2="{_LEFT + 352}" y1="15" y2="15" stroke-width="2" stroke-dasharray="5 3" '
        f'style="stroke:{_ALERT}"/><rect x="{_LEFT + 338}" y="12" width="6" height="6" style="fill:{_ALERT}"/>'
        f'<text x="{_LEFT + 359}" y="19">{_text(_label(stamped_name, 44))}</text></g>'
    )
    return _svg(identifier, title, description, height, parts)


def histogram_chart(
    histogram: Histogram,
    thresholds: Sequence[tuple[str, float]],
    *,
    identifier: str,
    title: str,
    clean_name: str,
    stamped_name: str,
) -> str:
    """Clean scores as bars upwards, stamped scores downwards, over one score axis; the first threshold is the solid line.

    A threshold outside the drawn range is not drawn; the description names it.
    """
    top, bottom, height = 46.0, 250.0, 292.0
    centre = (top + bottom) / 2
    clean_total, stamped_total = sum(histogram.clean), sum(histogram.stamped)
    clean_shares = [count / clean_total if clean_total else 0.0 for count in histogram.clean]
    stamped_shares = [count / stamped_total if stamped_total else 0.0 for count in histogram.stamped]
    if not stamped_total:
        centre = bottom
    largest = max(*clean_shares, *stamped_shares) or 1.0
    up = Axis(0.0, largest * 1.08, centre, top)
    down = Axis(0.0, largest * 1.08, centre, bottom)
    across = Axis(histogram.edges[0], histogram.edges[-1], _LEFT, WIDTH - _RIGHT)

    description = f"Scores of {clean_total} clean images (upwards)"
    description += f" and {stamped_total} stamped images (downwards)." if stamped_total else "; no stamped images."
    parts = [_vertical_title("% of images", (top + bottom) / 2), _share_axis(up, upwards=True)]
    if stamped_total:
        parts.append(_share_axis(down, upwards=False))
    for tick in across.ticks(7):
        x = across.position(tick)
        parts.append(
            f'<line x1="{x:.2f}" x2="{x:.2f}" y1="{bottom}" y2="{bottom + 4}" style="stroke:currentColor"/>'
            f'<text x="{x:.2f}" y="{bottom + 17}" font-size="11" text-anchor="middle">{number(tick)}</text>'
        )
    for kind, shares, counts, axis, colour in (
        ("clean", clean_shares, histogram.clean, up, _BASE),
        ("stamped", stamped_shares, histogram.stamped, down, _ALERT),
    ):
        for index, share in enumerate(shares):
            if not share:
                continue
            left, right = across.position(histogram.edges[index]), across.position(histogram.edges[index + 1])
            ends = sorted((axis.position(0.0), axis.position(share)))
            parts.append(
                f'<rect class="bin {kind}" data-value="{share:.6g}" x="{left + 0.5:.2f}" y="{ends[0]:.2f}" '
                f'width="{max(right - left - 1, 0.5):.2f}" height="{ends[1] - ends[0]:.2f}" style="fill:{colour}">'
                f"<title>{number(histogram.edges[index])} to {number(histogram.edges[index + 1])}: "
                f"{counts[index]} {kind} images</title></rect>"
            )
    parts.append(
        f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{centre}" y2="{centre}" style="stroke:currentColor" stroke-width="1"/>'
    )
    decision = ""
    for place, (rule, value) in enumerate(thresholds):
        if not (math.isfinite(value) and histogram.edges[0] <= value <= histogram.edges[-1]):
            description += f" Threshold '{_label(rule, 40)}' at {number(value)} lies outside the chart."
            continue
        x = across.position(value)
        decides = place == 0
        dashes = "" if decides else ' stroke-dasharray="3 4"'
        parts.append(
            f'<line class="threshold{" decides" if decides else ""}" data-value="{value:.6g}" x1="{x:.2f}" x2="{x:.2f}" '
            f'y1="{top - 12}" y2="{bottom}" style="stroke:currentColor" stroke-width="{1.8 if decides else 1}"'
            f"{dashes}><title>{_text(_label(rule, 60))}: {number(value)}</title></line>"
        )
        if decides:
            description += f" Threshold {number(value)}, {_label(rule, 40)}."
            anchor = "start" if x < WIDTH * 0.6 else "end"
            decision = _haloed(x + (6 if anchor == "start" else -6), top - 3, f"flagged above {number(value)} \u2192", anchor)
    parts.append(decision)
    parts.append(_horizontal_title("score (higher is more suspicious)", height - 8))
    parts.append(
        f'<g font-size="12"><rect x="{_LEFT}" y="7" width="11" height="11" style="fill:{_BASE}"/>'
        f'<text x="{_LEFT + 17}" y="17">{_text(_label(clean_name, 44))}{" (upwards)" if stamped_total else ""}</text>'
    )
    if stamped_total:
        parts.append(
            f'<rect x="{_LEFT + 330}" y="7" width="11" height="11" style="fill:{_ALERT}"/>'
            f'<text x="{_LEFT + 347}" y="17">{_text(_label(stamped_name, 44))} (downwards)</text>'
        )
    parts.append("</g>")
    return _svg(identifier, title, description, height, parts)


def distribution_chart(histogram: Histogram, *, identifier: str, quantity: str, title: str, description: str) -> str:
    """A small multiple: clean images as bars, stamped ones as a solid outline, suspects as a dashed one over one axis.

    Fewer than ``FEW_SUSPECTS`` suspects are triangles on the axis, one a bin. The page explains the marks once for all.

    Args:
        quantity: (untrusted) label of the value axis.
        description: what a reader who does not see the chart is told after its title.
    """
    width, height, left, right, top, bottom = 270.0, 168.0, 42.0, 8.0, 10.0, 126.0
    groups = {"clean": histogram.clean, "stamped": histogram.stamped, "suspects": histogram.suspects}
    totals = {kind: sum(counts) for kind, counts in groups.items()}
    few = totals["suspects"] < FEW_SUSPECTS
    shares = {kind: [count / (totals[kind] or 1) for count in counts] for kind, counts in groups.items()}
    drawn = ["clean", "stamped"] if few else ["clean", "stamped", "suspects"]
    up = Axis(0.0, 1.08 * (max((share for kind in drawn for share in shares[kind]), default=0.0) or 1.0), bottom, top)
    across = Axis(histogram.edges[0], histogram.edges[-1], left, width - right)

    parts = []
    for tick in up.ticks(4):
        y = up.position(tick)
        parts.append(
            f'<line x1="{left}" x2="{width - right}" y1="{y:.2f}" y2="{y:.2f}" style="stroke:{_GRID}"/>'
            f'<text x="{left - 5}" y="{y + 3.5:.2f}" font-size="10" text-anchor="end">{number(100 * tick)}</text>'
        )
    for tick in across.ticks(5):
        x = across.position(tick)
        anchor = "end" if x > width - right - 8 else "middle"
        parts.append(
            f'<line x1="{x:.2f}" x2="{x:.2f}" y1="{bottom}" y2="{bottom + 4}" style="stroke:currentColor"/>'
            f'<text x="{x:.2f}" y="{bottom + 16}" font-size="10" text-anchor="{anchor}">{number(tick)}</text>'
        )
    for index, share in enumerate(shares["clean"]):
        if share:
            x, end = across.position(histogram.edges[index]), across.position(histogram.edges[index + 1])
            y = up.position(share)
            parts.append(
                f'<rect class="bin clean" data-value="{share:.6g}" x="{x:.2f}" y="{y:.2f}" width="{end - x:.2f}" '
                f'height="{bottom - y:.2f}" style="fill:{_BASE};fill-opacity:.75"/>'
            )
    if totals["stamped"]:
        parts.append(_outline("stamped", shares["stamped"], histogram.edges, across, up, _ALERT, dashed=False))
    if totals["suspects"] and not few:
        parts.append(_outline("suspects", shares["suspects"], histogram.edges, across, up, _SUSPECT, dashed=True))
    parts.append(f'<line x1="{left}" x2="{width - right}" y1="{bottom}" y2="{bottom}" style="stroke:currentColor"/>')
    for index, count in enumerate(histogram.suspects if few else ()):
        if count:
            x = across.position((histogram.edges[index] + histogram.edges[index + 1]) / 2)
            parts.append(
                f'<polygon class="suspect" data-value="{count}" points="'
                f'{_points([(x - 5, bottom + 1), (x + 5, bottom + 1), (x, bottom - 9)])}" stroke-width="1.5" '
                f'style="fill:{_SUSPECT};stroke:{_PAPER}"><title>suspect inputs: {count}</title></polygon>'
            )
    middle = (top + bottom) / 2
    parts.append(
        f'<text x="9" y="{middle}" font-size="10.5" text-anchor="middle" transform="rotate(-90 9 {middle})">% of images</text>'
        f'<text x="{(left + width - right) / 2}" y="{height - 8}" font-size="11.5" font-weight="600" text-anchor="middle">'
        f"{_text(_label(quantity, 38))}</text>"
    )
    return _svg(identifier, title, description, height, parts, width)


# ------------------------------------------------------------------------------------------------- parts of charts


def _svg(identifier: str, title: str, description: str, height: float, parts: Sequence[str], width: float = WIDTH) -> str:
    name = _text(identifier)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-labelledby="{name}-title {name}-description" style="fill:currentColor" '
        f'font-family="inherit" font-size="12"><title id="{name}-title">{_text(title)}</title>'
        f'<desc id="{name}-description">{_text(description)}</desc>{"".join(parts)}</svg>'
    )


def _empty(identifier: str, title: str) -> str:
    return _svg(
        identifier,
        title,
        "There is no finite value to draw.",
        60.0,
        [f'<text x="{WIDTH / 2}" y="34" text-anchor="middle">No finite value to draw.</text>'],
    )


def _value_axis(axis: Axis, quantity: str, top: float, bottom: float) -> str:
    parts = [_vertical_title(quantity, (top + bottom) / 2)]
    for tick in axis.ticks():
        y = axis.position(tick)
        parts.append(
            f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.2f}" y2="{y:.2f}" style="stroke:{_GRID}"/>'
            f'<text x="{_LEFT - 7}" y="{y + 4:.2f}" font-size="11" text-anchor="end">{number(tick)}</text>'
        )
    return "".join(parts)


def _share_axis(axis: Axis, *, upwards: bool) -> str:
    parts = []
    for tick in axis.ticks(3 if abs(axis.stop - axis.start) < 150 else 5):
        y = axis.position(tick)
        if tick == 0 and not upwards:
            continue
        parts.append(
            f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.2f}" y2="{y:.2f}" style="stroke:{_GRID}"/>'
            f'<text x="{_LEFT - 7}" y="{y + 4:.2f}" font-size="11" text-anchor="end">{number(100 * tick)}</text>'
        )
    return "".join(parts)


def _vertical_title(text: str, y: float) -> str:
    return f'<text x="15" y="{y:.2f}" font-size="12" text-anchor="middle" transform="rotate(-90 15 {y:.2f})">{_text(text)}</text>'


def _horizontal_title(text: str, y: float) -> str:
    return f'<text x="{(_LEFT + WIDTH - _RIGHT) / 2}" y="{y:.2f}" font-size="12" text-anchor="middle">{_text(text)}</text>'


def _marker(x: float, y: float, text: str, above: float) -> str:
    """A small arrow on a bar; its name stands over the chart, at the end of a thin line, where no bar hides it."""
    arrow = f'<polygon points="{_points([(x - 5, y - 11), (x + 5, y - 11), (x, y - 3)])}" style="fill:{_ALERT}"/>'
    if not text:
        return arrow
    anchor = "start" if x < WIDTH * 0.25 else "end" if x > WIDTH * 0.75 else "middle"
    shift = {"start": -6.0, "middle": 0.0, "end": 6.0}[anchor]
    line = ""
    if y - 11 > above + 6:
        line = (
            f'<line x1="{x:.2f}" x2="{x:.2f}" y1="{above + 5:.2f}" y2="{y - 11:.2f}" stroke-width="1.2" style="stroke:{_ALERT}"/>'
        )
    return line + arrow + _haloed(x + shift, above, text, anchor, bold=True)


def _haloed(x: float, y: float, text: str, anchor: str, *, bold: bool = False) -> str:
    """Text with a halo in the paper's colour, so that it stays readable on bars and lines."""
    weight = ' font-weight="650"' if bold else ""
    return (
        f'<text x="{x:.2f}" y="{y:.2f}" font-size="12" text-anchor="{anchor}"{weight} stroke-width="4" '
        f'stroke-linejoin="round" paint-order="stroke" style="stroke:{_PAPER}">{_text(text)}</text>'
    )


def _curve(kind: str, values: Sequence[float], across: Sequence[float], vertical: Axis, colour: str, *, dashed: bool) -> str:
    marks = [(x, vertical.position(value), value) for x, value in zip(across, values, strict=True) if math.isfinite(value)]
    parts = [
        f'<polyline class="curve {kind}" points="{_points([(x, y) for x, y, _ in marks])}" stroke-width="2" '
        f'stroke-dasharray="{"6 4" if dashed else "none"}" style="fill:none;stroke:{colour}"/>'
    ]
    for x, y, value in marks:
        shape = (
            f'<rect class="point {kind}" data-value="{value:.6g}" x="{x - 3.5:.2f}" y="{y - 3.5:.2f}" width="7" height="7"'
            if dashed
            else f'<circle class="point {kind}" data-value="{value:.6g}" cx="{x:.2f}" cy="{y:.2f}" r="3.2"'
        )
        parts.append(f'{shape} style="fill:{colour}"><title>{number(value)} ({kind})</title></{shape[1:].split()[0]}>')
    return "".join(parts)


def _outline(
    kind: str, shares: Sequence[float], edges: Sequence[float], across: Axis, up: Axis, colour: str, *, dashed: bool
) -> str:
    """A histogram as one stepped line from axis to axis."""
    corners = [(across.position(edges[0]), up.start)]
    for index, share in enumerate(shares):
        corners += [(across.position(edges[place]), up.position(share)) for place in (index, index + 1)]
    corners.append((across.position(edges[-1]), up.start))
    values = " ".join(f"{share:.6g}" for share in shares)
    style = f"fill:none;stroke:{colour}" if dashed else f"fill:{colour};fill-opacity:.16;stroke:{colour}"
    return (
        f'<polyline class="outline {kind}" data-value="{values}" points="{_points(corners)}" stroke-width="1.6" '
        f'stroke-linejoin="round" stroke-dasharray="{"4 2.5" if dashed else "none"}" style="{style}"/>'
    )


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.2f},{y:.2f}" for x, y in points)


def _label_room(labels: Sequence[str], shown: Sequence[int]) -> float:
    """Width in pixels of the widest of the labels, at most that of twelve characters."""
    return 8.0 + 6.4 * max(min(len(labels[index]), 12) for index in shown)


def _label(value: str, limit: int) -> str:
    return clean_text(value, limit)


def _text(value: str) -> str:
    return html.escape(clean_text(value, None))
