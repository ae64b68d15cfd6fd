"""Backdoor attacks, one file and one class each."""

from audit_plugin.zoo.attacks.badnets import BadNets

__all__ = ["BadNets"]
