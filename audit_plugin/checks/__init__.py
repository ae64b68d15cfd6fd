"""All checks, one line each; the audit runs them in this order and the contract tests enumerate them."""

from audit_plugin.checks.base import FittedScorer, InputScorer, Probe
from audit_plugin.checks.layerwise import LayerwiseScorer
from audit_plugin.checks.source_specific import SourceSpecificInversion
from audit_plugin.checks.trigger_inversion import TriggerInversion

PROBES: tuple[type[Probe], ...] = (TriggerInversion, SourceSpecificInversion)
INPUT_SCORERS: tuple[type[InputScorer], ...] = (LayerwiseScorer,)

__all__ = [
    "INPUT_SCORERS",
    "PROBES",
    "FittedScorer",
    "InputScorer",
    "LayerwiseScorer",
    "Probe",
    "SourceSpecificInversion",
    "TriggerInversion",
]
