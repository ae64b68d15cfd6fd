"""The layer-wise method of Jebreel et al. 2023 in plain NumPy, one image at a time, written from the paper's text alone,
but for one departure: the logits are no layer of interest where there is another candidate."""

from __future__ import annotations

import numpy as np


def cosine(first, second):
    scale = np.linalg.norm(first) * np.linalg.norm(second)
    return float(first @ second / scale) if scale > 0 else 0.0


class LayerwiseReference:
    """``features``: one list of flattened float64 vectors a layer (all L layers, the last the logits); ``labels`` (N,)."""

    def __init__(self, features, labels, classes):
        total = len(features)  # L
        half = total // 2  # floor(L / 2)
        self.first = max(half - 1, 1)
        self.layers = list(range(self.first, total + 1))  # numbers, from 1
        self.centroid, self.interest, self.mu, self.sigma = {}, {}, {}, {}
        for label in range(classes):
            members = np.flatnonzero(labels == label)
            self.centroid[label] = {layer: np.mean([features[layer - 1][i] for i in members], axis=0) for layer in self.layers}
            similarity = {
                layer: [
                    cosine(features[layer - 1][i], np.mean([features[layer - 1][j] for j in members if j != i], axis=0))
                    for i in members
                ]
                for layer in self.layers
            }
            candidates = [layer for layer in range(half + 1, total) if layer - 1 in similarity] or [total]  # logits at need alone
            gain = {layer: np.mean(similarity[layer]) - np.mean(similarity[layer - 1]) for layer in candidates}
            self.interest[label] = max(gain, key=gain.get)
            sums = [sum(similarity[layer][k] for layer in self.summed(label) if layer in similarity) for k in range(len(members))]
            self.mu[label], self.sigma[label] = np.mean(sums), np.std(sums)

    def summed(self, label):
        interest = self.interest[label]
        return [layer for layer in (interest - 2, interest - 1, interest) if layer >= self.first]

    def score(self, features, predicted):
        """(mu - s) / sigma for one image given its features of all layers."""
        s = sum(cosine(features[layer - 1], self.centroid[predicted][layer]) for layer in self.summed(predicted))
        return (self.mu[predicted] - s) / self.sigma[predicted]
