"""The two terms of BeniFul in plain NumPy, one image at a time, written from the formulas of the check's page."""

from __future__ import annotations

import math

import numpy as np


def softmax(logits):
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def averaged(features, window):
    """(channels, height, width) -> the same, averaged over windows, those at the border cut off."""
    channels, height, width = features.shape
    rows, columns = math.ceil(height / window), math.ceil(width / window)
    found = np.zeros((channels, rows, columns))
    for row in range(rows):
        for column in range(columns):
            part = features[:, row * window : (row + 1) * window, column * window : (column + 1) * window]
            found[:, row, column] = part.mean(axis=(1, 2))
    return found


class BenifulReference:
    """``weights``: the auto-encoder's arrays by name; ``rest``: features (channels, height, width) -> logits."""

    def __init__(self, weights, window, classes, rest):
        self.weights = {name: value.astype(np.float64) for name, value in weights.items()}
        self.window, self.classes, self.rest = window, classes, rest

    def layer(self, name, value):
        return self.weights[f"{name}.weight"] @ value + self.weights[f"{name}.bias"]

    def reconstruction(self, standardised, predicted):
        told = np.eye(self.classes)[predicted]
        hidden = np.maximum(self.layer("encoder", np.concatenate([standardised, told])), 0.0)
        hidden = np.maximum(self.layer("decoder", np.concatenate([self.layer("latent_mean", hidden), told])), 0.0)
        return self.layer("output", hidden)

    def terms(self, features):
        """(log distance, disagreement) of one image."""
        logits = self.rest(features)
        predicted = int(np.argmax(logits))
        small = averaged(features, self.window)
        mean, deviation = self.weights["mean"], self.weights["deviation"]
        standardised = (small.ravel() - mean) / deviation
        reconstruction = self.reconstruction(standardised, predicted)
        distance = np.mean((reconstruction - standardised) ** 2)

        moved = features.copy()
        target = (reconstruction * deviation + mean).reshape(small.shape)
        for channel, row, column in np.ndindex(*features.shape):
            at = (channel, row // self.window, column // self.window)
            moved[channel, row, column] += target[at] - small[at]
        return math.log(distance), 0.5 * np.abs(softmax(logits) - softmax(self.rest(moved))).sum()


def score(terms, clean):
    """``terms`` (N, 2) of the inputs, ``clean`` (M, 2) of the images that the statistics come from."""
    distance, disagreement = ((terms - clean.mean(axis=0)) / clean.std(axis=0)).T
    return distance + np.minimum(np.maximum(disagreement, 0.0), 1.0)
