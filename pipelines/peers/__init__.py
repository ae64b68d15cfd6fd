"""Published detectors that the audit is measured beside. The product never imports them.

:class:`ModelPeer` judges a model from clean images; :class:`InputPeer` judges inputs, and says nothing of a model alone.
"""

from __future__ import annotations

from collections.abc import Mapping

from pipelines.peers.activation_defence import ActivationDefence
from pipelines.peers.art_strip import ArtStrip
from pipelines.peers.base import InputPeer, InputResult, ModelPeer, PeerResult
from pipelines.peers.mm_bd import MaximumMarginDetection
from pipelines.peers.neural_cleanse import NeuralCleanse
from pipelines.peers.strip import Strip

__all__ = [
    "INPUT_PEERS",
    "MODEL_PEERS",
    "ActivationDefence",
    "ArtStrip",
    "InputPeer",
    "InputResult",
    "MaximumMarginDetection",
    "ModelPeer",
    "NeuralCleanse",
    "PeerResult",
    "Strip",
]

MODEL_PEERS: Mapping[str, ModelPeer] = {peer.name: peer for peer in (NeuralCleanse(), MaximumMarginDetection())}
INPUT_PEERS: Mapping[str, InputPeer] = {peer.name: peer for peer in (Strip(), ArtStrip(), ActivationDefence())}
