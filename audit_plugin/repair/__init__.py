"""Repairs, one file and one class each; a repaired model is a subject of its own."""

from audit_plugin.repair.base import Repair, RepairedModel
from audit_plugin.repair.beniful import BenifulRepair
from audit_plugin.repair.fine_tuning import FineTuning
from audit_plugin.repair.norm_pruning import NormPruning

REPAIRS: dict[str, type[Repair]] = {repair.name: repair for repair in (BenifulRepair, NormPruning, FineTuning)}

__all__ = ["REPAIRS", "BenifulRepair", "FineTuning", "NormPruning", "Repair", "RepairedModel"]
