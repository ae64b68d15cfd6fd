"""Sessions: what they say of themselves, and that images go through them piece by piece."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from audit_plugin.errors import ExportError
from audit_plugin.maths.pixels import to_pixels
from audit_plugin.model.runtime import CPU, CUDA, Session

SIZE = 4


def model_of(batch: int | str = "batch") -> bytes:
    """pixels (N, 1, 4, 4) -> their sum (N,) as ``total``, and themselves doubled as ``large``."""
    graph = helper.make_graph(
        [
            helper.make_node("Add", ["pixels", "pixels"], ["large"]),
            helper.make_node("ReduceSum", ["pixels", "axes"], ["total"], keepdims=0),
        ],
        "sums",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, [batch, 1, SIZE, SIZE])],
        [
            helper.make_tensor_value_info("large", TensorProto.FLOAT, [batch, 1, SIZE, SIZE]),
            helper.make_tensor_value_info("total", TensorProto.FLOAT, [batch]),
        ],
        [helper.make_tensor("axes", TensorProto.INT64, [3], [1, 2, 3])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()


def images(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, SIZE, SIZE, 1), dtype=np.uint8)


def totals(of: np.ndarray) -> np.ndarray:
    return (of.astype(np.float64) / 255.0).sum(axis=(1, 2, 3))


def test_provider_is_what_the_session_really_uses() -> None:
    assert Session(model_of()).provider == (CUDA if torch.cuda.is_available() else CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_required_gpu_that_is_missing_is_an_error_with_a_next_step() -> None:
    with pytest.raises(ExportError, match="backdoor-audit doctor"):
        Session(model_of(), require_gpu=True)


def test_bytes_that_are_no_model_are_an_error_of_one_line() -> None:
    with pytest.raises(ExportError) as caught:
        Session(b"no model")
    assert "\n" not in str(caught.value)


def test_wrong_shape_is_an_error_of_one_line() -> None:
    with pytest.raises(ExportError, match="cannot run the model") as caught:
        Session(model_of()).run(np.zeros((1, 3, SIZE, SIZE), np.float32))
    assert "\n" not in str(caught.value)


def test_stream_yields_every_image_once_in_small_pieces() -> None:
    given = images(25)
    pieces = list(Session(model_of()).stream(given, ["total"], batch=8))
    assert [(rows.start, rows.stop) for rows, _ in pieces] == [(0, 8), (8, 16), (16, 24), (24, 25)]
    assert all(list(values) == ["total"] for _, values in pieces)
    np.testing.assert_allclose(np.concatenate([values["total"] for _, values in pieces]), totals(given), rtol=1e-5)


def test_stream_converts_no_image_before_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    converted: list[int] = []

    def counting(batch: np.ndarray) -> np.ndarray:
        converted.append(len(batch))
        return to_pixels(batch)

    monkeypatch.setattr("audit_plugin.model.runtime.to_pixels", counting)
    stream = Session(model_of()).stream(images(1000), ["total"], batch=10)
    next(stream)
    assert converted == [10]
    next(stream)
    assert converted == [10, 10]


def test_unnamed_outputs_are_all_of_them() -> None:
    assert set(Session(model_of()).run(np.zeros((2, 1, SIZE, SIZE), np.float32))) == {"large", "total"}


@pytest.mark.parametrize("count", [1, 4, 5, 8, 11])
@pytest.mark.parametrize("size", [1, 4])
def test_fixed_batch_is_padded_and_the_padding_dropped(count: int, size: int) -> None:
    given = images(count)
    session = Session(model_of(size), batch_size=size)
    collected = session.collect(given, "total", batch=6)
    assert collected.shape == (count,)
    np.testing.assert_allclose(collected, totals(given), rtol=1e-5)


def test_options_stored_with_a_model_are_not_honoured() -> None:
    model = onnx.load_from_string(model_of())
    model.metadata_props.add(key="ort_config", value='{"session_options": {"enable_profiling": 1}}')
    assert Session(model.SerializeToString()).run(np.zeros((1, 1, SIZE, SIZE), np.float32))["total"] == 0
