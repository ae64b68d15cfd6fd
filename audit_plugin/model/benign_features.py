"""What benign features at one layer of a network look like, learned by a variational auto-encoder.

The detection and the repair of Li, Zhang and Ma 2024 (arXiv 2410.14723) both rest on it. The paper publishes neither sizes nor
weights, so the network is ours: standardised features and the predicted class in, one hidden layer each way, the latent mean
(no sampling) when it is used.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from audit_plugin.errors import InapplicableError
from audit_plugin.model.feature_maps import has_channels_last
from audit_plugin.model.runtime import Session
from audit_plugin.types import FloatArray, ImageArray

MOST_FEATURES = 8192
"""Maps with more numbers than this are averaged over windows."""

FEWEST_ROWS = 10
BYTES_LIMIT = 2 * 1024**3
_HIDDEN = 128
_BATCH = 64
_LEARNING_RATE = 2e-3
_WEIGHT_DECAY = 1e-4
_DIVERGENCE_WEIGHT = 0.5
_CHECK_EVERY, _PATIENCE = 25, 200  # steps
_SMALLEST_DEVIATION = 0.1  # of the root mean square over all features


@dataclass(frozen=True)
class Windows:
    """How maps of shape (channels, height, width) are averaged, and enlarged again by repeating each average.

    ``size`` is the side of the square windows, 1 where nothing is averaged (as for every other shape); the windows at the right
    and at the lower border may be smaller.
    """

    shape: tuple[int, ...]
    size: int

    @classmethod
    def of(cls, shape: tuple[int, ...], image_size: tuple[int, ...], most: int = MOST_FEATURES) -> Windows:
        """The smallest power of two that leaves at most ``most`` numbers, or one number a channel.

        Only maps are averaged, channels first: a transformer's tokens, or maps with channels last, are not.

        Args:
            image_size: height and width of the images.
        """
        size = 1
        if len(shape) == 3 and not has_channels_last(shape, image_size):
            while math.prod(cls(shape, size).averaged_shape) > most and size < max(shape[1:]):
                size *= 2
        return cls(shape, size)

    @property
    def averaged_shape(self) -> tuple[int, ...]:
        if self.size == 1:
            return self.shape
        return (self.shape[0], *(math.ceil(length / self.size) for length in self.shape[1:]))

    @property
    def feature_count(self) -> int:
        return math.prod(self.averaged_shape)

    def averaging(self) -> tuple[FloatArray, FloatArray]:
        """Matrices A (rows, height) and B (width, columns): A h B is the averaged map."""
        rows, columns = (_membership(length, self.size) for length in self.shape[1:])
        return rows / rows.sum(axis=1, keepdims=True), (columns / columns.sum(axis=1, keepdims=True)).T

    def enlarging(self) -> tuple[FloatArray, FloatArray]:
        """Matrices A (height, rows) and B (columns, width): A a B repeats each average over its window."""
        rows, columns = (_membership(length, self.size) for length in self.shape[1:])
        return rows.T, columns

    def average(self, features: FloatArray) -> FloatArray:
        """(N, *shape) -> (N, feature count)."""
        if self.size > 1:
            left, right = self.averaging()
            features = np.matmul(np.matmul(left, features), right)
        return features.reshape(len(features), -1)


def _membership(length: int, window: int) -> FloatArray:
    """(windows, length), 1 where a position lies in a window."""
    windows = np.arange(math.ceil(length / window))
    return np.asarray(windows[:, None] == np.arange(length) // window, dtype=np.float32)


class BenignFeatures(nn.Module):
    """Averaging, standardisation and a variational auto-encoder, conditional on the predicted class, for features at one layer.

    All tensors are float32; ``classes``, int64 (N,), are the predicted ones.

    Attributes:
        windows: how the features are averaged.
        mean, deviation: (feature count,), of the averaged features.
        class_count: number of classes.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, windows: Windows, mean: Tensor, deviation: Tensor, class_count: int, latent_size: int) -> None:
        super().__init__()
        self.windows = windows
        self.class_count = class_count
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)
        self.encoder = nn.Linear(len(mean) + class_count, _HIDDEN)
        self.latent_mean = nn.Linear(_HIDDEN, latent_size)
        self.latent_log_variance = nn.Linear(_HIDDEN, latent_size)
        self.decoder = nn.Linear(latent_size + class_count, _HIDDEN)
        self.output = nn.Linear(_HIDDEN, len(mean))

    def standardised(self, features: Tensor) -> Tensor:
        """(N, *shape) -> (N, feature count), averaged and of unit variance."""
        if self.windows.size > 1:
            left, right = (torch.from_numpy(matrix).to(features.device) for matrix in self.windows.averaging())
            features = left @ features @ right
        standardised: Tensor = (features.flatten(1) - self.mean) / self.deviation
        return standardised

    def latent(self, standardised: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latent code, each (N, latent size)."""
        hidden = functional.relu(self.encoder(torch.cat([standardised, self._one_hot(classes)], dim=1)))
        return self.latent_mean(hidden), self.latent_log_variance(hidden).clamp(-8.0, 8.0)

    def decoded(self, code: Tensor, classes: Tensor) -> Tensor:
        """Standardised features (N, feature count) of a latent code."""
        reconstruction: Tensor = self.output(functional.relu(self.decoder(torch.cat([code, self._one_hot(classes)], dim=1))))
        return reconstruction

    def forward(self, standardised: Tensor, classes: Tensor) -> Tensor:
        """The reconstruction from the latent mean, (N, feature count)."""
        return self.decoded(self.latent(standardised, classes)[0], classes)

    def distance(self, features: Tensor, classes: Tensor) -> Tensor:
        """Mean squared difference (N,) of the standardised features (N, *shape) and their reconstruction."""
        standardised = self.standardised(features)
        distance: Tensor = (self(standardised, classes) - standardised).square().mean(dim=1)
        return distance

    def reconstruct(self, features: Tensor, classes: Tensor) -> Tensor:
        """Features (N, *shape) moved to their reconstruction; inside a window the differences from its average stay."""
        standardised = self.standardised(features)
        change = (self(standardised, classes) - standardised) * self.deviation
        change = change.view(-1, *self.windows.averaged_shape)
        if self.windows.size > 1:
            left, right = (torch.from_numpy(matrix).to(features.device) for matrix in self.windows.enlarging())
            change = left @ change @ right
        moved: Tensor = features + change
        return moved

    def _one_hot(self, classes: Tensor) -> Tensor:
        return functional.one_hot(classes, self.class_count).to(self.mean)


@dataclass(frozen=True)
class FittedFeatures:
    """The auto-encoder after ``kept_step`` training steps.

    ``held_out`` are the rows that it did not learn from, ``held_out_error`` their mean distance.
    """

    module: BenignFeatures
    held_out: NDArray[np.int64]
    held_out_error: float
    kept_step: int


def fit_benign_features(
    averaged: FloatArray,
    classes: NDArray[np.int64],
    windows: Windows,
    class_count: int,
    rng: np.random.Generator,
    *,
    latent_size: int,
    steps: int,
) -> FittedFeatures:
    """Learn from benign features.

    A fifth of the rows is held out. Every 25 steps their distance decides whether the state is kept, and after 200 steps without
    a better one training ends.

    Args:
        averaged: (N, feature count), from :meth:`Windows.average`; at least ten rows.
        classes: predicted ones, (N,).
        steps: the most, of Adam, with batches of 64.

    Raises:
        ValueError: there are fewer than ten rows, or they are not as many as the windows leave.
    """
    if len(averaged) < FEWEST_ROWS or averaged.shape[1:] != (windows.feature_count,):
        raise ValueError(f"expected at least {FEWEST_ROWS} rows of {windows.feature_count} features, got shape {averaged.shape}")
    order = rng.permutation(len(averaged))
    held_out, learned = np.split(order, [max(len(order) // 5, 1)])
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    mean, spread = averaged[learned].mean(axis=0), averaged[learned].std(axis=0)
    floor = _SMALLEST_DEVIATION * max(float(np.sqrt(np.square(spread, dtype=np.float64).mean())), 1e-12)
    deviation = np.sqrt(spread**2 + np.float32(floor) ** 2)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(rng.integers(2**62)))
        module = BenignFeatures(windows, torch.from_numpy(mean), torch.from_numpy(deviation), class_count, latent_size)

    values = torch.from_numpy((averaged - mean) / deviation)
    labels = torch.from_numpy(classes)
    rows, checked = torch.from_numpy(learned), torch.from_numpy(held_out)
    optimizer = torch.optim.Adam(module.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    best, kept_step, kept = math.inf, 0, copy.deepcopy(module.state_dict())
    for step in range(1, steps + 1):
        drawn = rows[torch.randint(len(rows), (_BATCH,), generator=generator)]
        loss = _loss(module, values[drawn], labels[drawn], generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % _CHECK_EVERY == 0 or step == steps:
            with torch.no_grad():
                error = float(functional.mse_loss(module(values[checked], labels[checked]), values[checked]))
            if error < best:
                best, kept_step, kept = error, step, copy.deepcopy(module.state_dict())
            elif step - kept_step >= _PATIENCE:
                break
    module.load_state_dict(kept)
    module.requires_grad_(False)
    return FittedFeatures(module, held_out, best, kept_step)


def averaged_features(
    session: Session, images: ImageArray, tap: str, latent_size: int, class_count: int
) -> tuple[Windows, FloatArray]:
    """The windows of a tap and its averaged features (N, feature count), streamed from uint8 images (N, height, width, channels).

    Raises:
        InapplicableError: to learn these features would take more than :data:`BYTES_LIMIT`.
    """
    parts: list[FloatArray] = []
    windows: Windows | None = None
    for _, values in session.stream(images, [tap]):
        if windows is None:
            windows = Windows.of(values[tap].shape[1:], images.shape[1:3])
            needed = training_bytes(len(images), windows.feature_count, class_count, latent_size)
            if needed > BYTES_LIMIT:
                raise InapplicableError(
                    f"An auto-encoder of the {windows.feature_count} features at '{tap}' would need {needed / 1024**3:.1f} GiB, "
                    f"more than the limit of {BYTES_LIMIT / 1024**3:.0f} GiB."
                )
        parts.append(windows.average(values[tap]))
    assert windows is not None  # noqa: S101  (there are images; for the type checker)
    return windows, np.concatenate(parts)


def training_bytes(rows: int, feature_count: int, class_count: int, latent_size: int) -> int:
    """Memory for :func:`fit_benign_features`: the features twice, each weight with its gradient, two moments and a copy."""
    weights = _HIDDEN * (2 * feature_count + 2 * class_count + 3 * latent_size)
    return 4 * (2 * rows * feature_count + 5 * weights)


def _loss(module: BenignFeatures, values: Tensor, classes: Tensor, generator: torch.Generator) -> Tensor:
    """Mean squared error and the divergence of the latent code from a standard normal one, a feature."""
    mean, log_variance = module.latent(values, classes)
    code = mean + torch.randn(mean.shape, generator=generator) * (log_variance / 2).exp()
    divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(dim=1).mean()
    error = functional.mse_loss(module.decoded(code, classes), values)
    return error + _DIVERGENCE_WEIGHT * divergence / values.shape[1]
