"""All checks, one line each; the audit runs them in this order and the contract tests enumerate them."""

from audit_plugin.checks.activation_norm import ActivationNormScorer
from audit_plugin.checks.bad_expert import BadExpertScorer
from audit_plugin.checks.base import ClassMeasure, FittedScorer, InputScorer, Probe
from audit_plugin.checks.beniful import BenifulScorer
from audit_plugin.checks.layerwise import LayerwiseScorer
from audit_plugin.checks.maximum_margin import MaximumMargin
from audit_plugin.checks.neuron_noise import NeuronNoise
from audit_plugin.checks.source_specific import SourceSpecificInversion
from audit_plugin.checks.trigger_inversion import TriggerInversion
from audit_plugin.checks.wave_scan import WaveScan

PROBES: tuple[type[Probe], ...] = (WaveScan, TriggerInversion, SourceSpecificInversion)
CLASS_MEASURES: tuple[type[ClassMeasure], ...] = (MaximumMargin, NeuronNoise)
INPUT_SCORERS: tuple[type[InputScorer], ...] = (LayerwiseScorer, BadExpertScorer, BenifulScorer, ActivationNormScorer)

__all__ = [
    "CLASS_MEASURES",
    "INPUT_SCORERS",
    "PROBES",
    "ActivationNormScorer",
    "BadExpertScorer",
    "BenifulScorer",
    "ClassMeasure",
    "FittedScorer",
    "InputScorer",
    "LayerwiseScorer",
    "MaximumMargin",
    "NeuronNoise",
    "Probe",
    "SourceSpecificInversion",
    "TriggerInversion",
    "WaveScan",
]
