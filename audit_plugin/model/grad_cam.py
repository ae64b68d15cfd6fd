"""Grad-CAM, which shows what a class score rests on: Selvaraju, Cogswell, Das, Vedantam, Parikh and Batra, ICCV 2017."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from audit_plugin.errors import InapplicableError
from audit_plugin.maths.pixels import to_pixels
from audit_plugin.model.export import LOGITS, InBatches
from audit_plugin.model.feature_maps import last_feature_map
from audit_plugin.model.subject import Subject
from audit_plugin.types import FloatArray, ImageArray, LabelArray

_BATCH = 32


def grad_cam(subject: Subject, images: ImageArray, classes: LabelArray) -> FloatArray:
    """Where each image supports a class, in [0, 1].

    With A_k channel k of the last feature map that has height and width, and y_c the logit of class c:

    * alpha_k = mean over positions of d y_c / d A_k (equation 1);
    * the map is ReLU(sum_k alpha_k A_k) (equation 2).

    It is enlarged to the size of the image bilinearly and divided by its maximum, so that images can be compared in where,
    not in how much; it is 0 everywhere if nothing supports the class.

    Args:
        images: uint8 (N, height, width, channels).
        classes: (N,), the class to explain for each image.

    Returns:
        float32 (N, height, width).

    Raises:
        InapplicableError: the model gives no gradients, or has no feature map with height and width.
        ValueError: ``classes`` does not fit the images or the model.
    """
    if classes.shape != (len(images),):
        raise ValueError(f"expected one class for each of {len(images)} images, got classes of shape {classes.shape}")
    if len(images) and not 0 <= classes.min() <= classes.max() < subject.class_count:
        raise ValueError(f"the classes must lie in 0 .. {subject.class_count - 1}, got {classes.min()} .. {classes.max()}")
    module = subject.torch_module()
    inner, size = module, max(min(_BATCH, len(images)), 1)
    if isinstance(module, InBatches):  # its taps are copies, which no logit depends on
        inner, size = module.inner, module.batch_size
    maps = np.zeros(images.shape[:3], dtype=np.float32)
    for start in range(0, len(images), size):
        rows = np.minimum(np.arange(start, start + size), len(images) - 1)
        pixels = torch.from_numpy(to_pixels(images[rows]))
        attention = _attention(inner, subject.summary.taps, pixels, torch.from_numpy(classes[rows]))
        maps[rows] = attention.numpy()
    return maps


def _attention(module: nn.Module, taps: tuple[str, ...], pixels: Tensor, classes: Tensor) -> Tensor:
    """(N, height, width) of one batch."""
    with torch.enable_grad():
        outputs = dict(zip((*taps, LOGITS), module(pixels.requires_grad_()), strict=True))
        score = outputs.pop(LOGITS).gather(1, classes[:, None]).sum()
    shapes = {name: tuple(value.shape[1:]) for name, value in outputs.items() if len(value) == len(pixels)}
    feature_map = last_feature_map(shapes, tuple(pixels.shape[2:]), dimensions=(4,))
    if feature_map is None:
        raise InapplicableError("Grad-CAM needs a layer with channels, height and width; this model has none.")
    value = outputs[feature_map.layer]
    gradient = _gradient(score, value)
    if gradient is None:
        raise InapplicableError(
            f"Grad-CAM needs the gradient of the logits with respect to '{feature_map.layer}', and the model gives none."
        )
    value = value.detach()
    if feature_map.channels_last:
        gradient, value = gradient.permute(0, 3, 1, 2), value.permute(0, 3, 1, 2)
    weights = gradient.mean(dim=(2, 3), keepdim=True)
    attention = functional.relu((weights * value).sum(dim=1, keepdim=True))
    enlarged = functional.interpolate(attention, size=pixels.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    largest = enlarged.amax(dim=(1, 2), keepdim=True)
    return torch.where(largest > 0, enlarged / largest, 0.0)


def _gradient(score: Tensor, value: Tensor) -> Tensor | None:
    """Of a score that is a sum over independent images; None where the graph is cut or cannot be differentiated."""
    if not (score.requires_grad and value.requires_grad):
        return None
    try:
        (gradient,) = torch.autograd.grad(score, value, allow_unused=True)
    except RuntimeError:  # an operator without a derivative
        return None
    return gradient
