"""Backdoor attacks, one file and one class each."""

from audit_plugin.zoo.attacks.adap_blend import AdapBlend
from audit_plugin.zoo.attacks.all_to_all import AllToAll
from audit_plugin.zoo.attacks.badnets import BadNets
from audit_plugin.zoo.attacks.base import AllToOne, Attack, CleanLabel
from audit_plugin.zoo.attacks.blended import Blended
from audit_plugin.zoo.attacks.input_aware import InputAware
from audit_plugin.zoo.attacks.label_consistent import LabelConsistent
from audit_plugin.zoo.attacks.sample_specific import SampleSpecific
from audit_plugin.zoo.attacks.sig import SIG
from audit_plugin.zoo.attacks.tact import TaCT
from audit_plugin.zoo.attacks.trojan_square import TrojanSquare
from audit_plugin.zoo.attacks.trojan_watermark import TrojanWatermark
from audit_plugin.zoo.attacks.wanet import WaNet

ATTACKS: tuple[type[Attack], ...] = (
    BadNets,
    Blended,
    LabelConsistent,
    WaNet,
    SampleSpecific,
    InputAware,
    SIG,
    TaCT,
    AllToAll,
    AdapBlend,
    TrojanSquare,
    TrojanWatermark,
)
"""Every attack of the zoo."""

__all__ = [
    "ATTACKS",
    "SIG",
    "AdapBlend",
    "AllToAll",
    "AllToOne",
    "Attack",
    "BadNets",
    "Blended",
    "CleanLabel",
    "InputAware",
    "LabelConsistent",
    "SampleSpecific",
    "TaCT",
    "TrojanSquare",
    "TrojanWatermark",
    "WaNet",
]
