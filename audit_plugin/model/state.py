"""Whether a loaded program changes its own state, for all the ways that its file does not show."""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from audit_plugin.intake.pt2 import CHANGES_STATE, state_finding
from audit_plugin.model.load import Network
from audit_plugin.types import Intake


def with_changed_state(intake: Intake, network: Network) -> Intake:
    """What was found of the file, and that the network changes its own state when it does and intake did not see it."""
    if any(finding.code == CHANGES_STATE for finding in intake.findings) or not isinstance(network.program, fx.GraphModule):
        return intake
    changed = _changed_state(network.program)
    if not changed:
        return intake
    return dataclasses.replace(intake, findings=(*intake.findings, state_finding(intake.data_path, changed)))


def _changed_state(graph: fx.GraphModule) -> list[str]:
    """In a functional graph whatever changes is copied back to where it is stored at the end, and nothing else is."""
    copies = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
    changed = (copy.args[0] for copy in copies)
    return [str(place.target) for place in changed if isinstance(place, fx.Node) and place.op == "get_attr"]
