"""STRIP: Gao, Xu, Wang, Chen, Ranasinghe and Nepal, ACSAC 2019.

Each input is added to clean images, one at a time. A trigger survives that and holds the answers to its class, so that the mean
entropy of the answers is low. An input is flagged when its entropy lies in the lowest 1 % of the normal distribution fitted
to the clean images' entropies.

Input level: of a model without inputs it says nothing. As in the authors' code both images keep their full weight; here the
sum is clipped to [0, 1]. The paper adds 100 images, ART and we 20; clean images are added to other clean images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

from audit_plugin.maths.pixels import to_pixels
from audit_plugin.model.fine_tuning import compute_device
from audit_plugin.model.subject import Subject
from audit_plugin.types import ImageArray, LabelledImages
from pipelines.peers.base import InputResult

_INPUTS_AT_ONCE = 64


@dataclass(frozen=True)
class Strip:
    """``overlays`` clean images an input, ``false_positive_rate`` that the threshold is meant to have."""

    name: ClassVar[str] = "strip"
    compares_inputs: ClassVar[bool] = False
    overlays: int = 20
    false_positive_rate: float = 0.01

    def judge_inputs(self, subject: Subject, clean: LabelledImages, inputs: ImageArray, rng: np.random.Generator) -> InputResult:
        """The scores are the entropies in bits, negated."""
        device, module = compute_device(), subject.torch_module()
        over, pixels = (torch.from_numpy(to_pixels(images)).to(device) for images in (clean.images, inputs))
        own = np.arange(len(over))
        others = (own[:, None] + rng.integers(1, len(over), (len(own), self.overlays))) % len(over)
        module.to(device)
        try:
            expected = self._entropies(module, over, over, others)
            found = self._entropies(module, pixels, over, rng.integers(len(over), size=(len(pixels), self.overlays)))
        finally:
            module.to("cpu")
        cut = stats.norm.ppf(self.false_positive_rate, *stats.norm.fit(expected))
        return InputResult(found < cut, -found)

    def _entropies(self, module: nn.Module, images: Tensor, over: Tensor, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Mean entropy in bits (N,) of the answers to each image with the given rows (N, overlays) of ``over`` added."""
        found = []
        with torch.no_grad():
            for part, chosen in zip(images.split(_INPUTS_AT_ONCE), torch.from_numpy(rows).split(_INPUTS_AT_ONCE), strict=True):
                mixed = (part[:, None] + over[chosen.to(over.device)]).clamp(max=1)
                logits = module(mixed.flatten(0, 1))[-1].double()
                entropy = -(logits.softmax(dim=1) * logits.log_softmax(dim=1)).sum(dim=1) / np.log(2)
                found.append(entropy.view(len(part), -1).mean(dim=1).cpu().numpy())
        return np.concatenate(found)
