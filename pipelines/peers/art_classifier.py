"""A subject as the Adversarial Robustness Toolbox (ART) wants a classifier."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from audit_plugin.errors import InapplicableError
from audit_plugin.model.fine_tuning import compute_device
from audit_plugin.model.subject import Subject
from audit_plugin.types import FloatArray

_SMALLEST_PROBABILITY = 1e-12  # ART takes logarithms
_BATCH = 256


class _Probabilities(nn.Module):
    """pixels -> class probabilities."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, pixels: Tensor) -> Tensor:
        probabilities: Tensor = self.module(pixels)[-1].softmax(dim=1).clamp(min=_SMALLEST_PROBABILITY)
        return probabilities


def art_classifier(subject: Subject, classes: int | None = None) -> Any:
    """A ``PyTorchClassifier`` of pixels in [0, 1] that answers with probabilities; its only activations are those of the last
    block before the logits, each channel of feature maps averaged.

    Args:
        classes: how many classes ART is to believe in; all if None.

    Raises:
        InapplicableError: the network has no block before its logits.
        ModuleNotFoundError: ART is missing.
    """
    from art.estimators.classification import PyTorchClassifier  # of the extra 'benchmark'

    if not subject.summary.taps:
        raise InapplicableError("The network has no intermediate block, so it has no activations.")
    module, device, spec = subject.torch_module(), compute_device(), subject.summary.input_spec

    class Classifier(PyTorchClassifier):  # type: ignore[misc, unused-ignore]  # ART is not typed
        def get_activations(self, x: FloatArray, *arguments: object, **named: object) -> FloatArray:
            with torch.no_grad():
                maps = torch.cat([module(part.to(device))[-2].cpu() for part in torch.from_numpy(x).split(_BATCH)])
            activations: FloatArray = (maps.mean(dim=(2, 3)) if maps.ndim == 4 else maps.flatten(1)).numpy()
            return activations

    return Classifier(
        model=_Probabilities(module).eval(),
        loss=nn.NLLLoss(),  # never used: nothing is trained
        input_shape=(spec.channels, spec.height, spec.width),
        nb_classes=classes or subject.class_count,
        clip_values=(0.0, 1.0),
        device_type="gpu" if device.type == "cuda" else "cpu",
    )


@contextlib.contextmanager
def seeded(rng: np.random.Generator) -> Iterator[None]:
    """ART draws from NumPy's global state: seeded from ``rng`` meanwhile, and as it was afterwards."""
    state = np.random.get_state()
    np.random.seed(int(rng.integers(2**32)))
    try:
        yield
    finally:
        np.random.set_state(state)
