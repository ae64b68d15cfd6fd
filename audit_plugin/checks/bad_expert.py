"""BaDExpert: Xie, Qi, He, Li, Wang and Mittal, ICLR 2024 (their algorithm 1 and section 3).

A copy of the model that is fine-tuned on a few deliberately mislabelled clean images forgets what it was trained for, but not
the backdoor: the *expert* B. Another copy, fine-tuned on the right labels, forgets the backdoor rather than its task: the
*auxiliary model* M'. With c the class that the model predicts, p = softmax(B(x))[c] and q = softmax(M'(x))[c],

    S = min( q / (k p), (1 - p) / max(k - q, 0) ),

and a low S means a backdoor input: the expert knows it and the auxiliary model does not.

What we do differently, and why:

* The score is m + P - k q with m = softmax(M(x))[c] and P the mean of p over three experts, not S, which is reported beside it.
  With a few hundred images and an exported graph M' often keeps a backdoor, and then p = q = 1 for its inputs. S = 1 / k puts
  those level with clean inputs that both copies doubt; P - k q falls back on the experts alone.
* Three experts instead of one, from one course of forgetting: when a tenth of the held-out accuracy is gone, when a quarter is,
  and when it is at most ``expert_accuracy``, which is the paper's expert. Some backdoors go before the task does, and then the
  early ones still know them. m, the model's own confidence, is that of an expert that has forgotten nothing.
* The wrong labels are any of the other classes, drawn anew with every pass, not always y + 1: taught that, the experts of a warp
  (WaNet) forgot it before the task.
* The experts' learning rate is found, not given. It grows by a twentieth with every step of Adam on wrong labels, from 1e-5 on,
  until the accuracy on held-out clean images is at most ``expert_accuracy``. The attack plays no part. Held out is a fifth of
  the fit split.
* The auxiliary model's rate is found too: the greatest at which the held-out accuracy falls by at most
  ``auxiliary_tolerance``, with gradients of norm one at most. It is divided by three after each fifth of the epochs: the
  authors' factor of ten leaves nothing to learn with.
* Normalisation keeps the statistics that the model was saved with, because an exported graph has no training mode.
* The only augmentation is a shift of a few pixels, which is harmless whatever the images show.
* Thresholds come from the calibrate split; the authors' come from the test images that they report.
* k is read off the graph: 0.2 with depthwise convolutions (MobileNet), 0.4 for networks without shortcuts (VGG), otherwise 0.5.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx
import torch

from audit_plugin.checks.base import FittedScorer, InputScorer
from audit_plugin.errors import InapplicableError
from audit_plugin.maths.rates import is_within
from audit_plugin.model.expert_graph import AUXILIARY, EXPERT, OWN, TRIANGLE, append_expert_score
from audit_plugin.model.fine_tuned_copies import LAST_RATE, FineTuned, Tuning, forgetting_copies
from audit_plugin.model.fine_tuning import trained_weights
from audit_plugin.model.onnx_graph import opset_version
from audit_plugin.model.runtime import Session
from audit_plugin.model.subject import Subject
from audit_plugin.types import FitSplit, FloatArray, ImageArray

log = logging.getLogger(__name__)

_EARLY_EXPERTS = (0.9, 0.75)  # shares of the model's accuracy on held-out images
_AUXILIARY_RATES = (0.1, 0.03, 0.01, 0.003, 0.001)
_AUXILIARY_PHASES = 5
_AUXILIARY_DECAY = 1 / 3  # after each phase
_LARGEST_GRAPH = 2 * 1024**3  # bytes: the limit of protobuf
_OLDEST_OPSET = 11  # GatherElements


@dataclass(frozen=True)
class BadExpertScorer(InputScorer):
    """The check.

    Attributes:
        expert_accuracy: the last expert is ready when its accuracy on held-out clean images is at most this.
        auxiliary_epochs: passes over the fit images for the auxiliary model, at least five; its rate is divided by three after
            each fifth of them.
        auxiliary_tolerance: how much accuracy the auxiliary model may lose.
        k: the paper's constant; None to read it off the architecture.
    """

    name: ClassVar[str] = "bad_expert"
    expert_accuracy: float = 0.25
    auxiliary_epochs: int = 5
    auxiliary_tolerance: float = 0.03
    k: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("expert_accuracy", self.expert_accuracy), ("k", self.k)):
            if value is not None and not 0.0 < value < 1.0:
                raise ValueError(f"{name} must lie between 0 and 1, got {value}")
        if self.auxiliary_epochs < _AUXILIARY_PHASES:
            raise ValueError(f"auxiliary_epochs must be at least {_AUXILIARY_PHASES}, got {self.auxiliary_epochs}")
        if not 0.0 <= self.auxiliary_tolerance < 1.0:
            raise ValueError(f"auxiliary_tolerance must lie between 0 and 1, got {self.auxiliary_tolerance}")

    def fit(self, subject: Subject, fit_split: FitSplit, rng: np.random.Generator) -> FittedScorer:
        """Make experts and auxiliary model, and join them with the model into one ONNX graph.

        Raises:
            InapplicableError: the model gives no gradients, is too large, in half precision, of an ONNX opset before 11 or hardly
                ever right, there are fewer than 50 images, or no learning rate made the expert forget or let the auxiliary model
                keep its accuracy.
        """
        copies = len(_EARLY_EXPERTS) + 2
        if (1 + copies) * subject.onnx_model.ByteSize() > _LARGEST_GRAPH:
            raise InapplicableError(
                f"The model and its {copies} fine-tuned copies would be larger than the 2 GiB that one ONNX file can hold "
                f"(the model alone has {subject.onnx_model.ByteSize() / 1024**3:.1f} GiB)."
            )
        if (opset := opset_version(subject.onnx_model)) < _OLDEST_OPSET:
            raise InapplicableError(
                f"The score needs ONNX opset {_OLDEST_OPSET}, the model has {opset}. Convert it with onnx.version_converter."
            )
        tuning = Tuning(subject, fit_split, rng)
        if tuning.accuracy <= self.expert_accuracy:
            raise InapplicableError(
                f"The model is right on {tuning.accuracy:.0%} of the held-out clean images and counts as having forgotten its "
                f"task at {self.expert_accuracy:.0%}, so there is nothing to forget. Check labels and preprocessing."
            )
        experts = self._experts(tuning)
        auxiliary = self._auxiliary(tuning)
        k = self.k or corner_of(subject.onnx_model)
        exported = [subject.export(copied.module) for copied in (*experts, auxiliary)]
        model = append_expert_score(subject.onnx_model, exported[:-1], exported[-1], k=k, score=self.name)
        expert = experts[-1]
        facts = {
            "k": k,
            "held_out_images": len(tuning.held_out_labels),
            "held_out_accuracy": tuning.accuracy,
            "expert_learning_rate": expert.learning_rate,
            "expert_accuracy": expert.accuracy,
            "early_expert_accuracies": [early.accuracy for early in experts[:-1]],
            "expert_largest_class_share": expert.largest_class_share,
            "auxiliary_learning_rate": auxiliary.learning_rate,
            "auxiliary_accuracy": auxiliary.accuracy,
        }
        return _FittedBadExpert(subject.open_session(model), facts)

    def _experts(self, tuning: Tuning) -> list[FineTuned]:
        """One copy at several times while it is taught wrong labels, until it has forgotten its task."""
        wanted = [max(share * tuning.accuracy, self.expert_accuracy) for share in _EARLY_EXPERTS] + [self.expert_accuracy]
        experts = list(forgetting_copies(tuning, wanted))
        if len(experts) < len(wanted):
            raise InapplicableError(
                f"No learning rate up to {LAST_RATE:g} made a copy of the model forget its task: its accuracy stayed above "
                f"{self.expert_accuracy:.0%}."
            )
        return experts

    def _auxiliary(self, tuning: Tuning) -> FineTuned:
        """The greatest rate that leaves a copy its accuracy."""
        for rate in _AUXILIARY_RATES:
            module = tuning.copy()
            optimizer = torch.optim.SGD(trained_weights(module), lr=rate, momentum=0.9, nesterov=True, weight_decay=1e-4)
            drops = [round(self.auxiliary_epochs * part / _AUXILIARY_PHASES) for part in range(1, _AUXILIARY_PHASES)]
            schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops, gamma=_AUXILIARY_DECAY)
            for _ in range(self.auxiliary_epochs):
                for _ in tuning.steps(module, optimizer, tuning.labels):
                    pass
                schedule.step()
            found = tuning.measured(module, rate)
            log.debug("Auxiliary model at rate %.1e: %s", rate, found)
            if is_within(tuning.accuracy, found.accuracy, self.auxiliary_tolerance):
                return found
        raise InapplicableError(
            f"Fine-tuning on clean images cost more than {self.auxiliary_tolerance:.0%} accuracy at every learning rate down to "
            f"{_AUXILIARY_RATES[-1]:g}; more clean images may help."
        )


def corner_of(model: onnx.ModelProto) -> float:
    """The paper's k for an architecture: 0.2 with depthwise convolutions, 0.4 for plain convolutional chains, else 0.5."""
    weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    weights.update({node.output[0]: _stored_shape(node) for node in model.graph.node if node.op_type == "Constant"})
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    if any(_groups(node) > 1 and weights.get(node.input[1], ())[1:2] == (1,) for node in convolutions):
        return 0.2
    joined = {
        node.op_type for node in model.graph.node if node.op_type in ("Add", "Sum", "Concat") and _reads_values(node, weights)
    }
    return 0.5 if joined or not convolutions else 0.4


def _stored_shape(constant: onnx.NodeProto) -> tuple[int, ...]:
    return next((tuple(attribute.t.dims) for attribute in constant.attribute if attribute.name == "value"), ())


def _groups(node: onnx.NodeProto) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == "group"), 1)


def _reads_values(node: onnx.NodeProto, stored: Mapping[str, Any]) -> bool:
    """Whether it joins two computed values, as a shortcut does, rather than adding a stored bias."""
    return sum(name not in stored for name in node.input) > 1


class _FittedBadExpert(FittedScorer):
    def __init__(self, session: Session, facts: Mapping[str, Any]) -> None:
        self._session = session
        self.facts = facts

    def _score(self, images: ImageArray) -> FloatArray:
        return self._session.collect(images, BadExpertScorer.name)

    def baselines(self, images: ImageArray) -> Mapping[str, FloatArray]:
        """The paper's combined score; B alone: p; M' alone: 1 - q; the model's own confidence: m."""
        names = (OWN, EXPERT, AUXILIARY, TRIANGLE)
        parts = [[values[name] for name in names] for _, values in self._session.stream(images, names)]
        none = [np.zeros(0, dtype=np.float32)] * len(names)
        own, expert, auxiliary, triangle = (np.concatenate(columns) for columns in zip(none, *parts, strict=True))
        return {
            "triangle score of the paper": triangle,
            "expert alone": expert,
            "auxiliary model alone": 1.0 - auxiliary,
            "model's own confidence": own,
        }
