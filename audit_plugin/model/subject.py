"""The model under audit, ready to be measured: pixels in, taps and logits out, in torch and in ONNX Runtime alike."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
import torch
from torch import nn

from audit_plugin.errors import ExportError, InapplicableError
from audit_plugin.maths.pixels import to_pixels
from audit_plugin.model.export import LOGITS, Exported, export
from audit_plugin.model.load import Network
from audit_plugin.model.runtime import Session
from audit_plugin.types import Flavour, FloatArray, ImageArray, InputSpec, LabelArray, SubjectSummary, TapParity

PARITY_TOLERANCE = 1e-3
"""Largest difference on a tap over the tap's largest magnitude. Folding normalisation into convolutions and summing in
another order costs about 1e-6 a layer in float32; a wrong operator or a lost normalisation costs far more than 1e-3."""


@dataclass(frozen=True)
class Subject:
    """One model under audit.

    Attributes:
        summary: what the report says of it.
        onnx_model: pixels -> every tap by name, ``logits`` last.
        session: an ONNX Runtime session of it.
    """

    summary: SubjectSummary
    onnx_model: onnx.ModelProto
    session: Session
    require_gpu: bool
    _module: nn.Module | None = field(repr=False)
    _module_missing: str = ""

    @property
    def class_count(self) -> int:
        return self.summary.class_count

    def torch_module(self) -> nn.Module:
        """pixels (N, channels, height, width) -> (tap, ..., logits), with gradients; weights are frozen.

        Raises:
            InapplicableError: the model is an ONNX graph with operators that torch has no equivalent for.
        """
        if self._module is None:
            raise InapplicableError(f"This check needs gradients, and the ONNX graph cannot be converted: {self._module_missing}")
        return self._module

    def logits(self, images: ImageArray) -> FloatArray:
        """Class scores (N, classes) for images uint8 (N, height, width, channels), by ONNX Runtime."""
        return self.session.collect(images, LOGITS)

    def predict(self, images: ImageArray) -> LabelArray:
        """Predicted class (N,) of images uint8 (N, height, width, channels)."""
        if len(images) == 0:
            return np.zeros(0, dtype=np.int64)
        return np.asarray(self.logits(images).argmax(axis=1), dtype=np.int64)

    def open_session(self, model: onnx.ModelProto) -> Session:
        """A session for a model derived from :attr:`onnx_model`, with the same provider and batch rules."""
        return Session(model.SerializeToString(), batch_size=self.summary.batch_size, require_gpu=self.require_gpu)


def prepare_subject(
    network: Network, spec: InputSpec, *, flavour: Flavour, class_names: tuple[str, ...], require_gpu: bool = False
) -> Subject:
    """Export a network and open it in ONNX Runtime.

    Raises:
        ExportError: the export fails, or a required GPU is missing.
    """
    exported: Exported = export(network, spec)
    if exported.module is not None:
        exported.module.requires_grad_(False)
    session = Session(exported.onnx_model.SerializeToString(), batch_size=network.batch_size, require_gpu=require_gpu)
    summary = SubjectSummary(
        flavour=flavour,
        input_spec=spec,
        class_names=class_names,
        parameter_count=network.parameter_count,
        taps=exported.taps,
        batch_size=network.batch_size,
    )
    return Subject(summary, exported.onnx_model, session, require_gpu, exported.module, exported.module_missing)


def check_parity(subject: Subject, images: ImageArray, tolerance: float = PARITY_TOLERANCE) -> tuple[TapParity, ...]:
    """Compare torch and ONNX Runtime on every tap and the logits.

    Args:
        images: a few real ones, uint8 (N, height, width, channels).

    Returns:
        One entry a tap, empty when the model has no torch form (its gradient checks are inapplicable then).

    Raises:
        ExportError: naming the first tap where the two part.
    """
    try:
        module = subject.torch_module()
    except InapplicableError:
        return ()
    pixels = to_pixels(images)
    in_runtime = subject.session.run(pixels)
    with torch.no_grad():
        in_torch = module(torch.from_numpy(pixels))
    entries = []
    for name, value in zip([*subject.summary.taps, LOGITS], in_torch, strict=True):
        expected = value.numpy()
        difference = float(np.abs(in_runtime[name] - expected).max() / max(float(np.abs(expected).max()), 1e-6))
        if not difference <= tolerance:
            raise ExportError(
                f"torch and ONNX Runtime part at '{name}': the relative difference is {difference:.1e}, "
                f"at most {tolerance:.0e} is accepted. The export of this model is not faithful, so nothing was measured."
            )
        entries.append(TapParity(name, difference))
    return tuple(entries)
