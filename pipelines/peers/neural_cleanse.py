"""Neural Cleanse: Wang, Yao, Shan, Li, Viswanath, Zheng and Zhao, IEEE S&P 2019.

For each class t a mask m and a pattern p, x' = (1 - m) x + m p, minimise

    cross-entropy(f(x'), t) + lambda ||m||_1

with Adam (learning rate 0.1, betas 0.5 and 0.9) over clean images x of all classes. lambda is 0 until 99 % of images have flipped
for five rounds, then 0.001; it doubles when they flip for five rounds and is divided by 2^1.5 when they do not. The smallest
mask of a round that flipped 99 % is kept. The anomaly index of a class is |size - median| / (1.4826 MAD) of the mask's L1 norms;
the model is backdoored if a class below the median has an index above 2.

Settings are those of the authors' code for GTSRB (github.com/bolunwang/backdoor). What differs:

* a round is ten batches of 32 images rather than 31, and there are at most 100 rounds rather than 1,000, so at most 1,000 steps a
  class in all;
* every class starts from the same random mask and pattern and sees the same batches, so that sizes differ by class alone;
* sizes are measured as they are, not after rounding the mask to a picture of 256 levels.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from audit_plugin.maths.pixels import to_pixels
from audit_plugin.model.fine_tuning import compute_device
from audit_plugin.model.subject import Subject
from audit_plugin.types import LabelledImages
from pipelines.peers.base import PeerResult

_FLIP_RATE = 0.99
_FIRST_COST, _MULTIPLIER, _PATIENCE = 1e-3, 2.0, 5
_EARLY_STOP_PATIENCE = 5 * _PATIENCE
_THRESHOLD = 2.0
_MAD_TO_SIGMA = 1.4826
_SMALLEST_DEVIATION = 1e-9
_SQUASH = 2 - 1e-7  # keeps masks and patterns off 0 and 1, where tanh has no inverse
_MOST_IMAGES = 2048  # stamped images that go through the network at once


@dataclass(frozen=True)
class NeuralCleanse:
    """``rounds`` of ``batches`` batches of ``images`` clean images each."""

    name: ClassVar[str] = "neural_cleanse"
    rounds: int = 100
    batches: int = 10
    images: int = 32

    def judge(self, subject: Subject, clean: LabelledImages, rng: np.random.Generator) -> PeerResult:
        """``score`` is the anomaly index of the smallest mask, ``by_class`` the sizes of the masks in pixels."""
        started = time.perf_counter()
        sizes = self.mask_sizes(subject, clean, rng)
        score = float(anomaly_indices(sizes).max())
        seconds = time.perf_counter() - started
        return PeerResult(score, score > _THRESHOLD, int(sizes.argmin()), seconds, tuple(sizes.tolist()))

    def mask_sizes(self, subject: Subject, clean: LabelledImages, rng: np.random.Generator) -> NDArray[np.float64]:
        """L1 norm of each class's mask, (classes,); of the last mask where none flipped 99 % of the images."""
        device, module = compute_device(), subject.torch_module()
        pixels = torch.from_numpy(to_pixels(clean.images)).to(device)
        seed = int(rng.integers(2**62))
        group = max(_MOST_IMAGES // self.images, 1)
        module.to(device)
        try:
            parts = [
                self._sizes(module, pixels, part, torch.Generator().manual_seed(seed))
                for part in torch.arange(subject.class_count, device=device).split(group)
            ]
        finally:
            module.to("cpu")
        return np.concatenate(parts)

    def _sizes(self, module: nn.Module, pixels: Tensor, targets: Tensor, generator: torch.Generator) -> NDArray[np.float64]:
        classes, shape = len(targets), pixels.shape[1:]
        start = torch.rand(shape[0] + 1, *shape[1:], generator=generator).expand(classes, -1, -1, -1)
        values = torch.atanh((start - 0.5) * _SQUASH).to(pixels.device).requires_grad_(True)
        optimizer = torch.optim.Adam([values], lr=0.1, betas=(0.5, 0.9))
        costs = _Costs(classes)
        size = np.zeros(classes)
        for _ in range(self.rounds):
            flipped, size = np.zeros(classes), np.zeros(classes)
            cost = torch.from_numpy(costs.cost).to(values)
            for _ in range(self.batches):
                images = pixels[torch.randint(len(pixels), (self.images,), generator=generator).to(pixels.device)]
                squashed = values.tanh() / _SQUASH + 0.5
                mask, pattern = squashed[:, None, :1], squashed[:, None, 1:]
                logits = module(((1 - mask) * images + mask * pattern).flatten(0, 1))[-1]
                wanted = targets.repeat_interleave(len(images))
                losses = functional.cross_entropy(logits, wanted, reduction="none").view(classes, -1).mean(dim=1)
                norms = mask.sum(dim=(1, 2, 3, 4))
                optimizer.zero_grad()
                (losses + cost * norms).sum().backward()
                optimizer.step()
                flipped += (logits.argmax(dim=1) == wanted).view(classes, -1).double().mean(dim=1).cpu().numpy() / self.batches
                size += norms.detach().double().cpu().numpy() / self.batches
            costs.update(flipped, size)
            if costs.stopped.all():
                break
        return np.where(np.isfinite(costs.smallest), costs.smallest, size)


class _Costs:
    """lambda of each class, its smallest mask so far, and whether its search has ended: the authors' bookkeeping, by class."""

    def __init__(self, classes: int) -> None:
        self.cost = np.zeros(classes)
        self.smallest = np.full(classes, np.inf)
        self.stopped = np.zeros(classes, dtype=np.bool_)
        self._holding, self._failing, self._waiting, self._unchanged = (np.zeros(classes, dtype=np.int64) for _ in range(4))
        self._raised, self._lowered = np.zeros(classes, dtype=np.bool_), np.zeros(classes, dtype=np.bool_)

    def update(self, flipped: NDArray[np.float64], size: NDArray[np.float64]) -> None:
        """After a round, from the share of images that flipped and the mean size of the mask, (classes,) each."""
        holds = flipped >= _FLIP_RATE
        smaller = holds & (size < self.smallest) & ~self.stopped
        self.smallest = np.where(smaller, size, self.smallest)
        self._unchanged = np.where(np.isfinite(self.smallest) & ~smaller, self._unchanged + 1, 0)
        self.stopped |= self._raised & self._lowered & (self._unchanged >= _EARLY_STOP_PATIENCE)

        self._waiting = np.where((self.cost == 0) & holds, self._waiting + 1, 0)
        begins = self._waiting >= _PATIENCE
        self.cost[begins] = _FIRST_COST
        for counts in (self._holding, self._failing, self._raised, self._lowered):
            counts[begins] = 0

        self._holding = np.where(holds, self._holding + 1, 0)
        self._failing = np.where(holds, 0, self._failing + 1)
        raised, lowered = self._holding >= _PATIENCE, self._failing >= _PATIENCE
        self.cost[raised] *= _MULTIPLIER
        self.cost[lowered] /= _MULTIPLIER**1.5
        self._raised |= raised
        self._lowered |= lowered
        self._holding[raised] = 0
        self._failing[lowered] = 0


def anomaly_indices(sizes: NDArray[np.float64]) -> NDArray[np.float64]:
    """|size - median| / (1.4826 MAD) of each class, negative for classes above the median, which are never suspicious."""
    below = np.median(sizes) - sizes
    deviation = _MAD_TO_SIGMA * float(np.median(np.abs(below)))
    return np.asarray(below / max(deviation, _SMALLEST_DEVIATION))
