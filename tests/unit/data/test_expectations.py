"""The clean set's contract: every expectation can hold and can break, and what cannot be measured is an error."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from audit_plugin.data.expectations import check_clean_set, clean_set_suite, clean_set_tables, run_suite
from audit_plugin.errors import AuditError, CleanSetError, UsageError
from audit_plugin.types import Expectation, InputSpec, LabelledImages

SPEC = InputSpec(height=4, width=6, channels=3)
NAMES = ("cat", "dog", "fish")
REQUIRED = {"labels-in-range", "images-per-class", "image-shape", "pixel-bounds", "images-not-constant", "clean-accuracy"}
REQUIRED |= {"errors-even-over-classes", "errors-even-over-folds"}
ADVICE = {"pixel-range-used", "images-unique", "labels-consistent", "classes-balanced", "accuracy-per-class"}


def good_set() -> tuple[LabelledImages, np.ndarray]:
    """Twenty images a class, and predictions of which six are wrong: 2 cats, 4 fish."""
    images = np.random.default_rng(0).integers(0, 256, (60, 4, 6, 3), dtype=np.uint8)
    labels = np.repeat(np.arange(3), 20)
    predictions = labels.copy()
    predictions[[0, 10]] = 1
    predictions[[40, 45, 50, 55]] = 0
    return LabelledImages(images, labels), predictions


def check(
    data: LabelledImages,
    predictions: np.ndarray | None,
    *,
    minimum_images: int = 10,
    minimum_accuracy: float = 0.8,
    sources: list[str] | None = None,
) -> dict[str, Expectation]:
    results = check_clean_set(
        data,
        class_names=NAMES,
        predictions=predictions,
        input_spec=SPEC,
        minimum_images_per_class=minimum_images,
        minimum_clean_accuracy=minimum_accuracy,
        sources=sources,
    )
    by_name = {result.name: result for result in results}
    assert len(by_name) == len(results)
    return by_name


def broken(results: dict[str, Expectation]) -> set[str]:
    return {name for name, result in results.items() if not result.success}


def test_a_good_set_meets_every_expectation() -> None:
    data, predictions = good_set()
    results = check(data, predictions)
    assert broken(results) == set()
    assert {name for name, result in results.items() if result.required} == REQUIRED
    assert {name for name, result in results.items() if not result.required} == ADVICE
    assert results["clean-accuracy"].observed == "accuracy 0.9"  # 54 of 60
    assert results["labels-in-range"].observed == "all 60 images"
    assert results["images-per-class"].observed == "all 3 classes"
    assert results["pixel-bounds"].observed == f"brightest pixel {data.images.max()}"
    assert all(type(result.success) is bool for result in results.values())
    assert all(result.description.endswith(".") for result in results.values())


def few_dogs(data: LabelledImages, predictions: np.ndarray) -> tuple[LabelledImages, np.ndarray]:
    kept = np.r_[0:29, 40:60]
    return LabelledImages(data.images[kept], data.labels[kept]), predictions[kept]


def one_label_outside(data: LabelledImages, predictions: np.ndarray) -> tuple[LabelledImages, np.ndarray]:
    labels = data.labels.copy()
    labels[5] = 3
    return LabelledImages(data.images, labels), predictions


def turned(data: LabelledImages, predictions: np.ndarray) -> tuple[LabelledImages, np.ndarray]:
    return LabelledImages(np.ascontiguousarray(data.images.transpose(0, 2, 1, 3)), data.labels), predictions


def zero_or_one(data: LabelledImages, predictions: np.ndarray) -> tuple[LabelledImages, np.ndarray]:
    return LabelledImages((data.images > 127).astype(np.uint8), data.labels), predictions


def zero_to_sixteen(data: LabelledImages, predictions: np.ndarray) -> tuple[LabelledImages, np.ndarray]:
    return LabelledImages(data.images // 16, data.labels), predictions


def four_flat(data: LabelledImages, predictions: np.ndarray) -> tuple[LabelledImages, np.ndarray]:
    images = data.images.copy()
    images[:4] = np.arange(4, dtype=np.uint8).reshape(4, 1, 1, 1)
    return LabelledImages(images, data.labels), predictions


def two_pairs(data: LabelledImages, predictions: np.ndarray) -> tuple[LabelledImages, np.ndarray]:
    images = data.images.copy()
    images[0], images[2] = images[1], images[3]
    return LabelledImages(images, data.labels), predictions


def one_contradiction(data: LabelledImages, predictions: np.ndarray) -> tuple[LabelledImages, np.ndarray]:
    images = data.images.copy()
    images[0] = images[59]
    return LabelledImages(images, data.labels), predictions


def mostly_fish(data: LabelledImages, predictions: np.ndarray) -> tuple[LabelledImages, np.ndarray]:
    images = np.random.default_rng(1).integers(0, 256, (200, 4, 6, 3), dtype=np.uint8)
    labels = np.repeat([0, 1, 2], [10, 10, 180])
    return LabelledImages(images, labels), labels


def mostly_wrong(data: LabelledImages, predictions: np.ndarray) -> tuple[LabelledImages, np.ndarray]:
    return data, np.where(np.arange(60) % 2, data.labels, (data.labels + 1) % 3)


def wrong_on_dogs(data: LabelledImages, predictions: np.ndarray) -> tuple[LabelledImages, np.ndarray]:
    return data, np.where((data.labels == 1) & (np.arange(60) < 33), 2, data.labels)


@pytest.mark.parametrize(
    ("change", "expected", "words"),
    [
        (few_dogs, "images-per-class", "1 of 3 classes are exceptions (33.3%): dog (9)"),
        (one_label_outside, "labels-in-range", "1 of 60 images are exceptions (1.7%): row 5 (3)"),
        (turned, "image-shape", "60 of 60 images are exceptions (100.0%): row 0 (6 x 4 x 3), row 1 (6 x 4 x 3)"),
        (zero_to_sixteen, "pixel-range-used", "brightest pixel 15"),
        (four_flat, "images-not-constant", "4 of 60 images are exceptions (6.7%): row 0 (0), row 1 (0), row 2 (0), row 3 (0)"),
        (two_pairs, "images-unique", "4 of 60 images are exceptions (6.7%): row 0, row 1, row 2, row 3"),
        (one_contradiction, "labels-consistent", "2 of 60 images are exceptions (3.3%): row 0 (2), row 59 (2)"),
    ],
)
def test_each_fault_breaks_exactly_its_own_expectation(change: Callable[..., Any], expected: str, words: str) -> None:
    results = check(*change(*good_set()), minimum_accuracy=0.75)
    assert broken(results) == {expected}
    assert results[expected].observed.startswith(words)


def test_a_class_that_the_model_does_not_know_is_seen_twice() -> None:
    results = check(*wrong_on_dogs(*good_set()), minimum_accuracy=0.75)
    assert broken(results) == {"accuracy-per-class", "errors-even-over-classes"}
    assert results["accuracy-per-class"].observed == "1 of 3 classes are exceptions (33.3%): dog (0.35)"
    assert results["errors-even-over-classes"].observed.startswith("1 of 3 classes are exceptions (33.3%): dog (")


def test_pixels_of_0_and_1_break_both_expectations_on_scale() -> None:
    results = check(*zero_or_one(*good_set()))
    assert broken(results) == {"pixel-bounds", "pixel-range-used"}
    assert results["pixel-bounds"].observed == "brightest pixel 1"


def test_imbalance_is_advice() -> None:
    # Means of 66.7: 10 is 0.15 of it, 180 is 2.7 times.
    results = check(*mostly_fish(*good_set()))
    assert broken(results) == {"classes-balanced"}
    assert results["classes-balanced"].observed == "2 of 3 classes are exceptions (66.7%): cat (0.15), dog (0.15)"
    assert not results["classes-balanced"].required


def test_accuracy_below_the_minimum() -> None:
    data, predictions = mostly_wrong(*good_set())
    results = check(data, predictions)
    assert broken(results) == {"clean-accuracy"}  # each class is right in half, above half of the minimum
    assert results["clean-accuracy"].observed == "accuracy 0.5"
    assert "80.0%" in results["clean-accuracy"].description


def test_thresholds_themselves_are_enough() -> None:
    data, predictions = good_set()
    assert broken(check(data, predictions, minimum_images=20, minimum_accuracy=0.9)) == set()
    assert broken(check(data, predictions, minimum_images=21, minimum_accuracy=0.91)) == {"images-per-class", "clean-accuracy"}


def test_a_few_copies_are_tolerated() -> None:
    data, predictions = good_set()
    data.images[0] = data.images[1]  # 2 of 60 have a copy: 3.3 %
    results = check(data, predictions)
    assert broken(results) == set()
    assert results["images-unique"].observed == "2 of 60 images are exceptions (3.3%): row 0, row 1"


def test_a_class_without_images_is_reported_and_has_no_accuracy() -> None:
    data, predictions = good_set()
    results = check(LabelledImages(data.images[:40], data.labels[:40]), predictions[:40])
    assert broken(results) == {"images-per-class"}
    assert results["images-per-class"].observed == "1 of 3 classes are exceptions (33.3%): fish (0)"
    assert results["accuracy-per-class"].observed == "all 2 classes"
    assert results["classes-balanced"].observed == "all 2 classes"


def test_balance_is_judged_among_the_classes_that_occur() -> None:
    data, predictions = good_set()
    part = LabelledImages(data.images[:30], data.labels[:30])
    classes = clean_set_tables(part, class_names=NAMES, predictions=predictions[:30])["classes"].frame
    np.testing.assert_allclose(classes["relative_count"], [20 / 15, 10 / 15, np.nan])
    np.testing.assert_allclose(classes["accuracy"], [0.9, 1.0, np.nan])


def test_without_predictions_accuracy_is_not_measured_rather_than_met() -> None:
    data, _ = good_set()
    results = check(data, None)
    assert set(results) == (REQUIRED | ADVICE) - {
        "clean-accuracy",
        "accuracy-per-class",
        "errors-even-over-classes",
        "errors-even-over-folds",
    }
    assert broken(results) == set()


def test_images_are_named_by_their_files_and_long_lists_are_cut() -> None:
    data, predictions = turned(*good_set())
    results = check(data, predictions, sources=[f"cat/{row}.png" for row in range(60)])
    observed = results["image-shape"].observed
    assert "cat/0.png (6 x 4 x 3)" in observed
    assert observed.endswith("cat/4.png (6 x 4 x 3) and 55 more")


def test_tables_agree_with_a_plain_computation() -> None:
    data, predictions = one_contradiction(*good_set())
    tables = clean_set_tables(data, class_names=NAMES, predictions=predictions)
    images, classes = tables["images"].frame, tables["classes"].frame
    assert images["label"].tolist() == data.labels.tolist()
    assert set(zip(images["height"], images["width"], images["channels"], strict=True)) == {(4, 6, 3)}
    for row, image in enumerate(data.images):
        values = [int(value) for value in image.flatten()]
        mean = sum(values) / len(values)
        assert images["pixel_min"][row] == min(values)
        assert images["pixel_max"][row] == max(values)
        assert images["pixel_std"][row] == pytest.approx((sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5)
        assert images["sha256"][row] == hashlib.sha256(image.tobytes()).hexdigest()
        assert images["correct"][row] == float(predictions[row] == data.labels[row])
        assert images["labels_of_content"][row] == (2 if row in (0, 59) else 1)
    assert classes["name"].tolist() == list(NAMES)
    assert classes["count"].tolist() == [20, 20, 20]
    assert classes["relative_count"].tolist() == [1.0, 1.0, 1.0]
    assert classes["accuracy"].tolist() == pytest.approx([18 / 20, 1.0, 16 / 20])


# --------------------------------------------------------------------------------------------- suites are data


def suite() -> list[dict[str, Any]]:
    return clean_set_suite(class_count=3, input_spec=SPEC, minimum_images_per_class=10, minimum_clean_accuracy=0.8)


def run(changed: list[dict[str, Any]]) -> tuple[Expectation, ...]:
    data, predictions = good_set()
    return run_suite(clean_set_tables(data, class_names=NAMES, predictions=predictions), changed)


def test_a_suite_survives_a_file_and_keeps_its_order() -> None:
    from_file = json.loads(json.dumps(suite()))
    assert from_file == suite()
    results = run(from_file)
    assert [result.name for result in results] == [spec["meta"]["name"] for spec in from_file]
    assert {result.name for result in results} == REQUIRED | ADVICE
    assert all(set(spec) == {"type", "kwargs", "meta"} for spec in from_file)


def test_an_edited_suite_is_obeyed() -> None:
    stricter = suite()
    per_class = next(spec for spec in stricter if spec["meta"]["name"] == "images-per-class")
    per_class["kwargs"]["min_value"] = 21
    per_class["kwargs"]["mostly"] = 0.0
    per_class["meta"].pop("required")
    result = next(result for result in run(stricter) if result.name == "images-per-class")
    assert result.success  # three of three are short, and none was asked for
    assert result.required  # what does not say otherwise is required
    assert result.observed.startswith("3 of 3 classes are exceptions")


def test_the_same_test_under_two_names_gives_two_results() -> None:
    first, second = suite()[0], suite()[0]
    second["meta"]["name"] = "labels-again"
    assert [result.name for result in run([first, second])] == ["labels-in-range", "labels-again"]


@pytest.mark.parametrize(
    ("kwargs", "kind", "meta", "words"),
    [
        ({"column": "lable"}, None, {}, r"unknown column 'lable' of table 'images'\. Did you mean 'label'\?"),
        ({}, "expect_column_values_to_be_betwen", {}, r"unknown type .* Did you mean 'expect_column_values_to_be_between'\?"),
        ({"min_valeu": 1}, None, {}, r"malformed: .*min_valeu"),
        ({}, None, {"table": "image"}, r"unknown table 'image'\. Did you mean 'images'\?"),
        ({}, None, {"name": None}, r"expectation number 1 .* lacks"),
    ],
)
def test_a_malformed_suite_is_a_usage_error_that_teaches(
    kwargs: dict[str, Any], kind: str | None, meta: dict[str, Any], words: str
) -> None:
    spec = suite()[0]
    spec["kwargs"] |= kwargs
    spec["meta"] |= meta
    spec["type"] = kind or spec["type"]
    with pytest.raises(UsageError, match=words) as caught:
        run([spec])
    assert "\n" not in str(caught.value)


def test_an_empty_suite_and_twice_the_same_name_are_refused() -> None:
    with pytest.raises(UsageError, match="empty"):
        run([])
    with pytest.raises(UsageError, match="two expectations called 'labels-in-range'"):
        run([suite()[0], suite()[0]])


def test_what_great_expectations_cannot_evaluate_is_an_error_not_a_failure() -> None:
    # A column that only great-expectations can miss, and a comparison of text with numbers.
    pair = suite()[0] | {
        "type": "expect_column_pair_values_to_be_equal",
        "kwargs": {"column_A": "label", "column_B": "nowhere"},
    }
    with pytest.raises(AuditError, match=r"'labels-in-range' could not be evaluated: .*nowhere"):
        run([pair])
    text = suite()[0]
    text["kwargs"]["column"] = "sha256"
    with pytest.raises(AuditError, match="'labels-in-range' could not be evaluated"):
        run([text, suite()[1]])


@pytest.mark.parametrize("kind", ["expect_column_values_to_be_between", "expect_column_mean_to_be_between"])
def test_a_column_without_values_is_an_error_not_a_success(kind: str) -> None:
    data, predictions = good_set()
    tables = clean_set_tables(data, class_names=NAMES, predictions=predictions)
    tables["images"].frame["correct"] = np.nan
    spec = suite()[0] | {"type": kind, "kwargs": {"column": "correct", "min_value": 0}}
    with pytest.raises(AuditError, match="column 'correct' is empty"):
        run_suite(tables, [spec])


@pytest.mark.parametrize(
    ("images", "labels", "predictions", "words"),
    [
        (np.zeros((0, 4, 6, 3), np.uint8), np.zeros(0, int), None, "at least one image"),
        (np.zeros((2, 4, 6, 3), np.float32), np.zeros(2, int), None, "got float32"),
        (np.zeros((2, 4, 6), np.uint8), np.zeros(2, int), None, r"shape \(2, 4, 6\)"),
        (np.zeros((2, 4, 6, 3), np.uint8), np.zeros(3, int), None, r"integer labels of shape \(2,\)"),
        (np.zeros((2, 4, 6, 3), np.uint8), np.zeros(2, int), np.zeros(1, int), r"integer predictions of shape \(2,\)"),
        (np.zeros((2, 4, 6, 3), np.uint8), np.zeros(2, int), np.zeros((2, 3)), "got float64"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    images: np.ndarray, labels: np.ndarray, predictions: np.ndarray | None, words: str
) -> None:
    with pytest.raises(CleanSetError, match=words):
        check(LabelledImages(images, labels), predictions)


def test_senseless_requests_are_refused() -> None:
    data, predictions = good_set()
    with pytest.raises(UsageError, match="at least 1, got 0"):
        check(data, predictions, minimum_images=0)
    with pytest.raises(UsageError, match=r"\[0, 1\], got 80; 0.8 means 80 %"):
        check(data, predictions, minimum_accuracy=80)
    with pytest.raises(CleanSetError, match="expected 60 sources, one an image; got 1"):
        check(data, predictions, sources=["a"])


# --------------------------------------------------------------------------------------------------- good guest


def test_nothing_is_printed_and_no_state_is_left(capfd: pytest.CaptureFixture[str]) -> None:
    import great_expectations
    from great_expectations.data_context.data_context.context_factory import project_manager, set_context

    mine = great_expectations.get_context(mode="ephemeral")
    environment = dict(os.environ)
    check(*good_set())
    assert project_manager.get_current_project() is mine
    assert dict(os.environ) == environment
    set_context(None)
    check(*good_set())
    with pytest.raises(great_expectations.exceptions.DataContextRequiredError):
        project_manager.get_current_project()
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def test_importing_the_package_stays_cheap() -> None:
    program = (
        "import sys, audit_plugin.data.clean_set, audit_plugin.data.splits, audit_plugin.data.expectations\n"
        "print([name for name in ('great_expectations', 'pandas', 'torch', 'mlflow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
