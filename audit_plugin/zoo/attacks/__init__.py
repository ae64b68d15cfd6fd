"""Backdoor attacks, one file and one class each."""

from audit_plugin.zoo.attacks.badnets import BadNets
from audit_plugin.zoo.attacks.base import Attack
from audit_plugin.zoo.attacks.blended import Blended
from audit_plugin.zoo.attacks.wanet import WaNet

__all__ = ["Attack", "BadNets", "Blended", "WaNet"]
