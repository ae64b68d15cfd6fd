"""The model under audit, ready to be measured: pixels in, taps and logits out, in torch and in ONNX Runtime alike."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field

import numpy as np
import onnx
import torch
from torch import fx, nn

from audit_plugin.errors import ExportError, InapplicableError, SubjectError
from audit_plugin.maths.pixels import to_pixels
from audit_plugin.model.export import LOGITS, Exported, InBatches, PixelModel, export, logits_network
from audit_plugin.model.load import Network
from audit_plugin.model.onnx_to_torch import OnnxModule
from audit_plugin.model.runtime import Session, serialised
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
        network: what it was made from, on its own input scale.
    """

    summary: SubjectSummary
    network: Network = field(repr=False)
    onnx_model: onnx.ModelProto
    session: Session
    require_gpu: bool
    _module: nn.Module | None = field(repr=False)
    _module_missing: str = ""

    @property
    def class_count(self) -> int:
        return self.summary.class_count

    @property
    def may_hide_scores(self) -> bool:
        """Whether it answers with probabilities that are no softmax: where one is nearly zero, no gradient leads to its class."""
        return logits_network(self.network).gives_probabilities

    def torch_module(self) -> nn.Module:
        """pixels (N, channels, height, width) -> (tap, ..., logits), with gradients; weights are frozen.

        Raises:
            InapplicableError: the model is an ONNX graph with operators that torch has no equivalent for.
        """
        if self._module is None:
            raise InapplicableError(f"This check needs gradients, and the ONNX graph cannot be converted: {self._module_missing}")
        return self._module

    def trainable_copy(self) -> nn.Module:
        """As :meth:`torch_module`, a copy whose floating-point weights may be trained.

        Batch normalisation keeps the running statistics that the model was saved with: an exported graph has no training mode.

        Raises:
            InapplicableError: see :meth:`torch_module`.
        """
        copied = copy.deepcopy(self.torch_module())
        for parameter in copied.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        if not any(parameter.requires_grad for parameter in copied.parameters()):
            raise InapplicableError(
                "This check changes the weights of a copy of the model, and the model stores no trainable weights."
            )
        return copied

    def retrained(self, module: nn.Module) -> Subject:
        """The subject with the weights of ``module``, a :meth:`trainable_copy`; in the same flavour, exported anew.

        Raises:
            ExportError: see :func:`prepare_subject`.
        """
        return self.with_network(self._with_weights_of(module))

    def with_network(self, network: Network) -> Subject:
        """The subject made from ``network``, a changed copy of :attr:`network`; in the same flavour, exported anew.

        Raises:
            ExportError: see :func:`prepare_subject`.
        """
        summary = self.summary
        return prepare_subject(
            network, summary.input_spec, flavour=summary.flavour, class_names=summary.class_names, require_gpu=self.require_gpu
        )

    def export(self, module: nn.Module) -> onnx.ModelProto:
        """:attr:`onnx_model` with the weights of ``module``, a :meth:`trainable_copy`."""
        return export(self._with_weights_of(module), self.summary.input_spec).onnx_model

    def _with_weights_of(self, module: nn.Module) -> Network:
        return dataclasses.replace(self.network, program=_with_weights(self.network.program, module))

    def logits(self, images: ImageArray) -> FloatArray:
        """Class scores (N, classes) for images uint8 (N, height, width, channels), by ONNX Runtime.

        Raises:
            SubjectError: a score is NaN or infinite, and comparing it with others would name a class at random.
        """
        scores = self.session.collect(images, LOGITS)
        broken = int((~np.isfinite(scores)).any(axis=1).sum())
        if broken:
            raise SubjectError(
                f"The model answers NaN or infinity for {broken} of {len(images)} images, so its answers cannot be judged."
            )
        return scores

    def predict(self, images: ImageArray) -> LabelArray:
        """Predicted class (N,) of images uint8 (N, height, width, channels)."""
        if len(images) == 0:
            return np.zeros(0, dtype=np.int64)
        return np.asarray(self.logits(images).argmax(axis=1), dtype=np.int64)

    def open_session(self, model: onnx.ModelProto) -> Session:
        """A session for a model derived from :attr:`onnx_model`, with the same provider and batch rules."""
        return Session(serialised(model), batch_size=self.summary.batch_size, require_gpu=self.require_gpu)


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
    session = Session(serialised(exported.onnx_model), batch_size=network.batch_size, require_gpu=require_gpu)
    summary = SubjectSummary(
        flavour=flavour,
        input_spec=spec,
        class_names=class_names,
        parameter_count=network.parameter_count,
        taps=exported.taps,
        batch_size=network.batch_size,
    )
    return Subject(summary, network, exported.onnx_model, session, require_gpu, exported.module, exported.module_missing)


def _with_weights(program: fx.GraphModule | onnx.ModelProto, module: nn.Module) -> fx.GraphModule | onnx.ModelProto:
    """A copy of ``program`` with the weights of ``module``, which was exported from it and trained since."""
    inner = module.inner if isinstance(module, InBatches) else module
    if isinstance(program, onnx.ModelProto):
        assert isinstance(inner, OnnxModule)  # noqa: S101  (what the export makes of an ONNX model; for the type checker)
        return inner.write_weights(program)
    assert isinstance(inner, PixelModel)  # noqa: S101  (as above)
    copied = copy.deepcopy(program)
    trained = dict(inner.inner.named_parameters())
    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            if name in trained:  # what only the unused part of a graph reads is not in the exported module
                parameter.copy_(trained[name])
    return copied


def check_answers(subject: Subject, images: ImageArray, tolerance: float = PARITY_TOLERANCE) -> None:
    """Make sure that a model answers for each image alone: alike when it is asked again, whatever lies beside it in the batch.

    Each image goes through ONNX Runtime with all others (twice), in reversed order, in pairs, and by itself. Other
    batch sizes are not tried.

    Args:
        images: a few different ones, uint8 (N, height, width, channels).
        tolerance: largest difference over the largest magnitude of the answers.

    Raises:
        SubjectError: the answers differ, or are not finite.
    """
    expected = subject.logits(images)
    scale = max(float(np.abs(expected).max()), 1e-6)
    pairs = (subject.logits(images[start : start + 2]) for start in range(0, len(images), 2))
    ways = {
        "when it is asked again": subject.logits(images),
        "in another order": subject.logits(images[::-1])[::-1],
        "in pairs": np.concatenate(list(pairs)),
        "one by one": np.concatenate([subject.logits(image[None]) for image in images]),
    }
    for way, answers in ways.items():
        difference = float(np.abs(answers - expected).max()) / scale
        if not difference <= tolerance:
            raise SubjectError(
                f"The model answers differently {way}: the relative difference is {difference:.1e}, at most {tolerance:.0e} is "
                "accepted. A classifier must answer for each image by itself, always alike; without that nothing can be measured."
            )


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
