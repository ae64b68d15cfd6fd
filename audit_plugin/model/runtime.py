"""One place that creates ONNX Runtime sessions, knows which provider they really use, and streams images through them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from audit_plugin.errors import ExportError
from audit_plugin.maths.pixels import to_pixels
from audit_plugin.types import FloatArray, ImageArray

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"


@functools.cache
def _cuda_may_work() -> bool:
    """Whether a GPU is there to be tried; then the CUDA libraries that torch's wheels brought are loaded for ONNX Runtime.

    ``get_available_providers`` alone names the GPU on machines that have none. The session's own word decides in the end.
    """
    import torch  # its libraries must be in the process first

    if CUDA not in onnxruntime.get_available_providers() or not torch.cuda.is_available():
        return False
    onnxruntime.preload_dlls()
    return True


class Session:
    """An ONNX model ready to run on pixels, on the GPU when the CUDA provider really loads, else on the CPU.

    Provider and session options stored with a model are never honoured; custom operators are not loaded.

    Args:
        model: a file, or the serialised model itself.
        batch_size: set when the graph insists on one; inputs are then padded to it.
        require_gpu: fail instead of falling back to the CPU.

    Raises:
        ExportError: the model does not load, or ``require_gpu`` and no GPU session could be made.
    """

    def __init__(self, model: Path | bytes, *, batch_size: int | None = None, require_gpu: bool = False) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads leave the cores to torch
        providers = [(CUDA, {"use_tf32": "0"}), CPU] if _cuda_may_work() else [CPU]
        source = model if isinstance(model, bytes) else str(model)
        try:
            self._session = onnxruntime.InferenceSession(source, options, providers=providers)
        except Exception as error:  # ONNX Runtime raises a class of its own for every status code
            raise ExportError(f"ONNX Runtime cannot load the model: {_first_line(error)}") from error
        self.provider: str = self._session.get_providers()[0]
        if require_gpu and self.provider != CUDA:
            raise ExportError(
                f"A GPU was required, but ONNX Runtime runs this model on {self.provider}. "
                "Run 'backdoor-audit doctor' to see why, or drop --require-gpu."
            )
        self.batch_size = batch_size
        self.outputs: tuple[str, ...] = tuple(output.name for output in self._session.get_outputs())
        self._input = self._session.get_inputs()[0].name

    def run(self, pixels: FloatArray, outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """The named outputs for pixels (N, channels, height, width), or whatever else the model takes, each (N, ...)."""
        names = list(outputs or self.outputs)
        if self.batch_size is None:
            return dict(zip(names, self._run_once(pixels, names), strict=True))
        parts: list[list[np.ndarray]] = []
        for start in range(0, len(pixels), self.batch_size):
            chunk = pixels[start : start + self.batch_size]
            missing = self.batch_size - len(chunk)
            padded = np.concatenate([chunk, np.repeat(chunk[-1:], missing, axis=0)]) if missing else chunk
            parts.append([value[: len(chunk)] for value in self._run_once(padded, names)])
        return {name: np.concatenate([part[index] for part in parts]) for index, name in enumerate(names)}

    def stream(
        self, images: ImageArray, outputs: Sequence[str] | None = None, *, batch: int = 128
    ) -> Iterator[tuple[slice, dict[str, np.ndarray]]]:
        """Run ``images`` (N, height, width, channels) uint8 batch by batch, so that memory does not grow with N."""
        for start in range(0, len(images), batch):
            rows = slice(start, min(start + batch, len(images)))
            yield rows, self.run(to_pixels(images[rows]), outputs)

    def collect(self, images: ImageArray, output: str, *, batch: int = 128) -> np.ndarray:
        """One small output for all images, (N, ...)."""
        return np.concatenate([values[output] for _, values in self.stream(images, [output], batch=batch)])

    def _run_once(self, pixels: FloatArray, names: list[str]) -> list[np.ndarray]:
        try:
            values: list[np.ndarray] = self._session.run(names, {self._input: np.ascontiguousarray(pixels)})
        except Exception as error:  # see __init__
            raise ExportError(f"ONNX Runtime cannot run the model: {_first_line(error)}") from error
        return values


def serialised(model: onnx.ModelProto) -> bytes:
    """A model in ONNX's own format.

    Raises:
        ExportError: it is larger than that format can be in one piece.
    """
    try:
        content: bytes = model.SerializeToString()
    except Exception as error:  # protobuf raises a class of its own
        raise ExportError(
            f"The model, with what is added to it, cannot be written as one ONNX graph, of 2 GiB at most: {_first_line(error)}"
        ) from error
    return content


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
