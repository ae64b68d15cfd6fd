"""The charts say what the numbers say, and the pictures hold every pixel."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from audit_plugin.report.figures import (
    Axis,
    attention_picture,
    bar_chart,
    data_uri,
    distribution_chart,
    histogram_chart,
    mask_thumbnail,
    picture_png,
    profile_chart,
    stamped_part,
    trigger_png,
)
from audit_plugin.report.summaries import Histogram, distribution_histogram, score_histogram
from audit_plugin.types import Distribution, Trigger

SVG = "{http://www.w3.org/2000/svg}"


def marks(svg, kind, tag="*"):
    """Elements whose class attribute contains the word ``kind``."""
    return [
        item for item in ElementTree.fromstring(svg).iter() if kind in item.get("class", "").split() and tag in ("*", item.tag)
    ]


def described(svg):
    root = ElementTree.fromstring(svg)
    assert root.get("role") == "img"
    title, description = root.find(f"{SVG}title"), root.find(f"{SVG}desc")
    assert root.get("aria-labelledby") == f"{title.get('id')} {description.get('id')}"
    return title.text, description.text


def bars(values, **options):
    labels = [f"class {index}" for index in range(len(values))]
    return bar_chart(values, labels, identifier="b", title="Sizes", quantity="mask size, pixels", **options)


def test_linear_bars_are_proportional_to_their_values():
    values = [10.0, 20.0, 30.0, 2.5]
    drawn = marks(bars(values), "bar")
    heights = [float(item.get("height")) for item in drawn]
    assert np.array(heights) / heights[0] == pytest.approx(np.array(values) / values[0], abs=0.002)
    assert [float(item.get("data-value")) for item in drawn] == values
    feet = {round(float(item.get("y")) + float(item.get("height")), 1) for item in drawn}
    assert len(feet) == 1


def test_logarithmic_bars_grow_by_the_same_step_for_the_same_factor():
    values = [2.0, 20.0, 200.0]
    chart = bars(values)
    heights = [float(item.get("height")) for item in marks(chart, "bar")]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.05)
    assert "logarithmic" in described(chart)[1]


@pytest.mark.parametrize(
    ("largest_matter", "kept", "order"), [(False, range(1, 101), "ascending"), (True, range(1000, 900, -1), "descending")]
)
def test_of_too_many_bars_those_that_matter_are_drawn(largest_matter, kept, order):
    values = (np.random.default_rng(0).permutation(1000) + 1.0).tolist()
    chart = bars(values, largest_matter=largest_matter)
    drawn = marks(chart, "bar")
    assert [float(item.get("data-value")) for item in drawn] == [float(value) for value in kept]
    assert [values[int(item.get("data-index"))] for item in drawn] == [float(value) for value in kept]
    assert f"Only the 100 {'largest' if largest_matter else 'smallest'} are drawn, in {order} order" in described(chart)[1]


def test_median_line_lies_where_a_bar_of_that_value_would_end():
    chart = bars([10.0, 20.0, 30.0])
    (median,) = marks(chart, "median")
    assert float(median.get("data-value")) == 20.0
    assert float(median.get("y1")) == pytest.approx(float(marks(chart, "bar")[1].get("y")), abs=0.01)


def test_the_suspected_bar_is_marked_by_more_than_colour():
    chart = bars([40.0, 3.0, 42.0], highlighted=[1])
    (marked,) = marks(chart, "marked")
    assert marked.get("data-index") == "1"
    texts = [item.text for item in ElementTree.fromstring(chart).iter(f"{SVG}text")]
    assert "class 1: 3" in texts
    assert "Highlighted: class 1, 3." in described(chart)[1]


def test_values_that_are_not_finite_are_not_drawn_as_numbers():
    chart = bars([10.0, math.nan, math.inf, 20.0])
    assert len(marks(chart, "bar")) == 2
    assert "nan" not in chart
    assert "No finite value" in bars([math.nan])
    assert len(marks(bars([0.0, 0.0]), "bar")) == 2


def test_profile_draws_means_band_and_stamped_values(failing_report):
    profile = failing_report.outcomes[1].measurement.profile
    chart = profile_chart(profile, identifier="p", title="Profile", clean_name="clean", stamped_name="stamped")
    root = ElementTree.fromstring(chart)
    circles = list(root.iter(f"{SVG}circle"))
    squares = [item for item in marks(chart, "point") if item.tag == f"{SVG}rect"]
    assert [float(item.get("data-value")) for item in circles] == pytest.approx(profile.clean)
    assert [float(item.get("data-value")) for item in squares] == pytest.approx(profile.stamped)
    (band,) = marks(chart, "band")
    corners = [tuple(map(float, pair.split(","))) for pair in band.get("points").split()]
    count = len(profile.layers)
    assert len(corners) == 2 * count
    scale = (float(circles[6].get("cy")) - float(circles[0].get("cy"))) / (profile.clean[0] - profile.clean[6])
    for index in range(count):
        height = corners[2 * count - 1 - index][1] - corners[index][1]
        assert height == pytest.approx(2 * profile.clean_spread[index] * scale, abs=0.1)
    assert "layer4.0" in described(chart)[1]


def test_profile_with_values_that_are_not_finite(failing_report):
    profile = failing_report.outcomes[1].measurement.profile
    odd = dataclasses.replace(profile, clean=(math.nan, *profile.clean[1:]), stamped=(math.inf,) * len(profile.layers))
    chart = profile_chart(odd, identifier="p", title="Profile", clean_name="clean", stamped_name="stamped")
    assert len(list(ElementTree.fromstring(chart).iter(f"{SVG}circle"))) == len(profile.layers) - 1
    assert "nan" not in chart


def histogram(thresholds, clean=(4, 4, 2, 0), stamped=(0, 0, 1, 3)):
    return histogram_chart(
        Histogram((0.0, 1.0, 2.0, 3.0, 4.0), clean, stamped),
        thresholds,
        identifier="h",
        title="Scores",
        clean_name="clean",
        stamped_name="stamped",
    )


def test_histogram_areas_are_shares_and_the_threshold_is_at_its_score():
    chart = histogram([("tau = 2.5", 2.5), ("quantile", 1.0)])
    clean, stamped = marks(chart, "clean"), marks(chart, "stamped")
    assert [float(item.get("data-value")) for item in clean] == [0.4, 0.4, 0.2]
    assert [float(item.get("data-value")) for item in stamped] == [0.25, 0.75]
    assert float(stamped[1].get("height")) / float(clean[0].get("height")) == pytest.approx(0.75 / 0.4, abs=0.01)
    centre = float(clean[0].get("y")) + float(clean[0].get("height"))
    assert float(stamped[0].get("y")) == pytest.approx(centre, abs=0.02)
    (decides,) = marks(chart, "decides")
    left = float(clean[0].get("x")) - 0.5
    width = float(clean[1].get("x")) - float(clean[0].get("x"))
    assert float(decides.get("x1")) == pytest.approx(left + 2.5 * width, abs=0.05)
    assert [float(item.get("data-value")) for item in marks(chart, "threshold")] == [2.5, 1.0]


def test_histogram_names_a_threshold_outside_of_it_and_empty_groups():
    chart = histogram([("far", 1e6)], stamped=(0, 0, 0, 0))
    assert not marks(chart, "threshold")
    assert "Threshold 'far'" in described(chart)[1]
    assert "no stamped images" in described(chart)[1]


def test_one_enormous_score_does_not_squeeze_the_histogram(failing_report):
    scores = failing_report.outcomes[1].measurement
    clean = scores.clean.copy()
    clean[0] = 1e9
    counted = score_histogram(dataclasses.replace(scores, clean=clean))
    assert counted.edges[-1] < 20
    assert sum(counted.clean) == len(clean)
    empty = np.full(3, np.nan, np.float32)
    assert score_histogram(dataclasses.replace(scores, clean=empty, stamped=empty)) is None
    constant = score_histogram(dataclasses.replace(scores, clean=np.ones(9, np.float32), stamped=empty[:0], thresholds=()))
    assert sum(constant.clean) == 9


def multiple(suspects, quantity="l1 norm, channel 3"):
    counts = Histogram((0.0, 1.0, 2.0, 3.0, 4.0), (4, 4, 2, 0), (0, 0, 1, 3), suspects)
    return distribution_chart(counts, identifier="d", quantity=quantity, title="Norms", description="Clean images: 10.")


def test_small_multiple_shares_one_scale_and_tells_the_groups_apart_by_shape():
    chart = multiple((30, 10, 0, 0))
    clean = marks(chart, "clean")
    assert [float(item.get("data-value")) for item in clean] == [0.4, 0.4, 0.2]
    stamped, suspects = marks(chart, "outline")
    assert [float(value) for value in stamped.get("data-value").split()] == [0, 0, 0.25, 0.75]
    assert [float(value) for value in suspects.get("data-value").split()] == [0.75, 0.25, 0, 0]
    assert (stamped.get("stroke-dasharray"), suspects.get("stroke-dasharray")) == ("none", "4 2.5")
    floor = float(clean[0].get("y")) + float(clean[0].get("height"))
    corners = [tuple(map(float, pair.split(","))) for pair in stamped.get("points").split()]
    assert (floor - min(y for _, y in corners)) / float(clean[0].get("height")) == pytest.approx(0.75 / 0.4, abs=0.01)
    assert corners[0] == pytest.approx((float(clean[0].get("x")), floor), abs=0.02)
    texts = [item.text for item in ElementTree.fromstring(chart).iter(f"{SVG}text")]
    assert "% of images" in texts
    assert "l1 norm, channel 3" in texts
    assert described(chart) == ("Norms", "Clean images: 10.")


def test_few_suspects_are_single_marks_that_squeeze_nothing():
    few, none = multiple((0, 0, 0, 2)), multiple((0, 0, 0, 0))
    (mark,) = marks(few, "suspect")
    assert mark.get("data-value") == "2"
    assert len(marks(few, "outline")) == 1
    assert [item.get("y") for item in marks(few, "clean")] == [item.get("y") for item in marks(none, "clean")]
    assert not marks(none, "suspect")


def test_one_enormous_suspect_does_not_squeeze_the_others():
    clean, stamped = np.linspace(0, 10, 200, dtype=np.float32), np.linspace(8, 20, 200, dtype=np.float32)
    suspects = np.array([5.0, 1e30, -np.inf], np.float32)
    counted = distribution_histogram(Distribution("norm", clean, stamped, suspects))
    plain = distribution_histogram(Distribution("norm", clean, stamped, suspects[:1]))
    assert len(counted.clean) == 30
    assert counted.edges[-1] - counted.edges[0] <= 2.01 * (plain.edges[-1] - plain.edges[0])
    assert (sum(counted.suspects), counted.suspects[-1]) == (2, 1)
    alone = distribution_histogram(Distribution("norm", clean[:0], clean[:0], clean))
    assert (sum(alone.clean), sum(alone.suspects)) == (0, 200)
    silent = np.zeros(5, np.float32)
    assert sum(distribution_histogram(Distribution("norm", silent, silent, silent)).stamped) == 5


def test_attention_leaves_the_grey_image_at_zero_and_grows_lighter():
    image = np.full((1, 3, 3), (0, 30, 60), np.uint8)
    shown = attention_picture(image, np.array([[0.0, 0.5, 1.0]], np.float32))
    assert shown[0, 0].tolist() == [30, 30, 30]
    red, green, blue = (0.8 * level + 0.2 * 30 for level in (240, 249, 33))
    assert shown[0, 2] == pytest.approx([red, green, blue], abs=1)
    brightness = shown.mean(axis=2)[0]
    assert brightness[0] < brightness[1] < brightness[2]
    odd = attention_picture(image[:, :, :1], np.array([[np.nan, -1.0, 7.0]], np.float32))
    assert odd[0, 0].tolist() == odd[0, 1].tolist() == [0, 0, 0]
    assert odd[0, 2] == pytest.approx([0.8 * level for level in (240, 249, 33)], abs=1)
    with pytest.raises(ValueError, match=r"attention of shape \(1, 3\), got \(3, 1\)"):
        attention_picture(image, np.zeros((3, 1), np.float32))


def test_hostile_labels_do_not_leave_their_element(hostile_strings):
    chart = bar_chart(
        [1.0 + index for index in range(len(hostile_strings))],
        hostile_strings,
        identifier='x"><script>',
        title=hostile_strings[0],
        quantity=hostile_strings[1],
        highlighted=[0],
    )
    tags = {item.tag.removeprefix(SVG) for item in ElementTree.fromstring(chart).iter()}
    assert tags <= {"svg", "title", "desc", "line", "text", "rect", "polygon", "g"}


def test_hostile_quantities_do_not_leave_their_element(hostile_strings):
    for text in hostile_strings:
        allowed = {"svg", "title", "desc", "line", "text", "rect", "polyline", "polygon"}
        assert {item.tag for item in ElementTree.fromstring(multiple((0, 1, 0, 0), text)).iter()} == {
            SVG + tag for tag in allowed
        }


def test_axis_ticks_are_round_and_inside():
    assert Axis(0.0, 100.0, 0.0, 1.0).ticks() == [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]
    assert Axis(1.0, 1000.0, 0.0, 1.0, logarithmic=True).ticks() == [1.0, 10.0, 100.0, 1000.0]
    assert Axis(-0.4, 0.25, 0.0, 1.0).ticks() == pytest.approx([-0.4, -0.2, 0.0, 0.2])


def decoded(png):
    return np.asarray(Image.open(io.BytesIO(png)))


def test_pictures_are_enlarged_without_smoothing():
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28, 1), dtype=np.uint8)
    image = decoded(picture_png(pixels, 5))
    assert image.shape == (140, 140)
    assert (image[::5, ::5] == pixels[:, :, 0]).all()
    assert (image[4::5, 4::5] == pixels[:, :, 0]).all()


def test_float_pixels_are_channels_first_and_clipped():
    pixels = np.zeros((3, 2, 4), np.float32)
    pixels[0], pixels[1], pixels[2, 0, 0] = 2.0, np.nan, 0.5
    image = decoded(picture_png(pixels))
    assert image.shape == (2, 4, 3)
    assert image[0, 0].tolist() == [255, 0, 128]


@pytest.mark.parametrize("pixels", [np.zeros((4, 4)), np.zeros((2, 4, 4)), np.zeros((4, 4, 3), np.int64)])
def test_pictures_refuse_other_shapes(pixels):
    with pytest.raises(ValueError, match="Expected"):
        picture_png(pixels)


def test_data_uri_holds_the_png():
    png = picture_png(np.zeros((4, 4, 3), np.uint8))
    assert base64.b64decode(data_uri(png).removeprefix("data:image/png;base64,")) == png


def test_trigger_picture_shows_the_paint_and_the_mask():
    mask = np.zeros((32, 32), np.float32)
    mask[3, 5] = 1.0
    pattern = np.zeros((3, 32, 32), np.float32)
    pattern[0] = 1.0
    trigger = Trigger(0, mask, pattern)
    assert stamped_part(trigger)[3, 5].tolist() == [255, 0, 0]
    assert stamped_part(trigger)[0, 0].tolist() == [128, 128, 128]
    image = decoded(trigger_png(trigger))
    assert image.shape == (160, 5 * (32 + 2 + 32), 3)
    assert image[3 * 5, 5 * (34 + 5)].tolist() == [255, 255, 255]
    assert image[0, 5 * 34].tolist() == [0, 0, 0]


def test_faint_additive_triggers_are_amplified():
    pattern = np.zeros((3, 8, 8), np.float32)
    pattern[:, 2, 2] = -0.01
    trigger = Trigger(0, np.abs(pattern).mean(axis=0), pattern, family="additive")
    assert stamped_part(trigger)[2, 2].tolist() == [0, 0, 0]


def test_thumbnail_keeps_a_single_pixel_of_a_large_mask():
    mask = np.zeros((225, 225), np.float32)
    mask[200, 17] = 0.2
    thumbnail = mask_thumbnail(Trigger(0, mask, np.zeros((1, 225, 225), np.float32)))
    assert max(thumbnail.shape) <= 32
    assert (thumbnail == 255).sum() == 1
