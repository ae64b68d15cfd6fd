"""What a peer is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from audit_plugin.model.subject import Subject
from audit_plugin.types import ImageArray, LabelledImages


@dataclass(frozen=True)
class PeerResult:
    """What a peer says of a model.

    Attributes:
        score: of the whole model, finite; higher is more suspicious.
        flagged: by the rule of the paper.
        suspected_class: the most suspicious class, whether the model is flagged or not.
        seconds: that it took.
        by_class: the paper's statistic of each class, (classes,).
    """

    score: float
    flagged: bool
    suspected_class: int
    seconds: float
    by_class: tuple[float, ...]


@dataclass(frozen=True)
class InputResult:
    """What a peer says of inputs: ``flagged`` (N,) by the rule of the paper, and ``scores`` (N,), higher is more suspicious; None
    where the method gives none."""

    flagged: NDArray[np.bool_]
    scores: NDArray[np.float64] | None


class ModelPeer(Protocol):
    """Judges a model from clean images."""

    @property
    def name(self) -> str: ...

    def judge(self, subject: Subject, clean: LabelledImages, rng: np.random.Generator) -> PeerResult:
        """Judge one model.

        Args:
            clean: whatever an audit would be given; a peer splits it as its paper does.

        Raises:
            InapplicableError: it cannot judge this model, with the reason.
        """
        ...


class InputPeer(Protocol):
    """Judges inputs: of a model alone it can say nothing."""

    @property
    def name(self) -> str: ...

    @property
    def compares_inputs(self) -> bool:
        """Whether what it says of an input depends on the other inputs, and so on how many of them are triggered."""
        ...

    def judge_inputs(self, subject: Subject, clean: LabelledImages, inputs: ImageArray, rng: np.random.Generator) -> InputResult:
        """Judge inputs, uint8 (N, height, width, channels).

        Args:
            clean: images known to be clean, disjoint from ``inputs``.

        Raises:
            InapplicableError: it cannot judge these inputs, with the reason.
        """
        ...
