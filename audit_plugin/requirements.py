"""What promotion asks for, read from a policy file and the environment."""

from __future__ import annotations

import re
from pathlib import Path

from audit_plugin.attestation import keys_from_environment, waiver_keys_from_environment
from audit_plugin.gate import Requirements
from audit_plugin.policy import GatePolicy, load_policy
from audit_plugin.promotion import load_suite


def load_requirements(policy_file: Path | None) -> Requirements:
    """The requirements of a policy file (the defaults without one), with the keys that the environment names.

    Raises:
        UsageError: the policy, its promotion suite, or a key cannot be read.
    """
    policy = load_policy(policy_file)
    return Requirements(
        gate=policy.gate,
        policy_digest=policy.verdict_digest,
        suite_digest=load_suite(suite_path(policy.gate, policy_file)).digest,
        verdict_keys=keys_from_environment(),
        waiver_keys=waiver_keys_from_environment(),
    )


def clean_images_of(name: str, policy_file: Path | None) -> str | None:
    """The path or artifact URI of the clean images that a policy file names for a registered model, None if it names none.

    Raises:
        UsageError: the policy cannot be read.
    """
    source = load_policy(policy_file).clean_images_for(name)
    return None if source is None else resolved_source(source, policy_file)


def resolved_source(source: str, policy_file: Path | None) -> str:
    """A value of [clean_images] as a path that does not start at the policy file's folder, or as the artifact URI that it is."""
    if policy_file is None or re.match(r"[a-z][a-z0-9+.-]+:/", source):
        return source
    return str(policy_file.parent / source)


def suite_path(gate: GatePolicy, policy_file: Path | None) -> Path | None:
    """Where the promotion suite is, None for the one that is shipped; a relative path starts at the policy's folder."""
    if gate.suite is None:
        return None
    return (policy_file.parent if policy_file else Path()) / gate.suite
