"""What the promotion gate costs: calls on MLflow's own store and on the gate, in turn, without a server in between."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlflow.entities.model_registry import ModelVersionTag
from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore

from audit_plugin.attestation import SIGNING_KEY, TAG_OF, VERIFYING_KEYS, generate_keys, sign, signer_from_environment
from audit_plugin.gate import VersionFacts
from audit_plugin.registry import facts_of, statement_on
from audit_plugin.requirements import load_requirements
from mlflow_plugins.registry_store import PromotionGate, artifact_digest

_NAME = "digits"


@dataclass(frozen=True)
class Timing:
    """Median seconds of one call without and with the gate, and of hashing the files where the gate must do that."""

    call: str
    plain: float
    gated: float
    hashing: float = 0.0

    @property
    def ratio(self) -> float:
        """Time with the gate over the time of the call and, where it is needed, the hash."""
        return self.gated / (self.plain + self.hashing)


def time_gate(folder: Path, *, rounds: int, megabytes: int) -> tuple[Timing, ...]:
    """Time unprotected calls and a promotion, on two SQLite databases in ``folder``; the version's files have ``megabytes``."""
    files = folder / "files"
    files.mkdir()
    (files / "model.bin").write_bytes(os.urandom(1024 * 1024) * megabytes)
    signing, verifying = generate_keys(folder / "keys")
    os.environ[VERIFYING_KEYS] = str(verifying)
    plain, gated = SqlAlchemyStore(f"sqlite:///{folder}/plain.db"), PromotionGate(f"sqlite:///{folder}/gated.db")
    digest = artifact_digest(files.as_uri())
    for store in (plain, gated):
        store.create_registered_model(_NAME)
        version = facts_of(store.create_model_version(_NAME, files.as_uri()))
        store.set_model_version_tag(_NAME, "1", ModelVersionTag(TAG_OF["verdict"], _attestation(version, digest, signing)))
    tag = ModelVersionTag("owner", "vision team")
    unprotected: dict[str, Callable[[SqlAlchemyStore], object]] = {
        "set another alias": lambda store: store.set_registered_model_alias(_NAME, "challenger", "1"),
        "set a tag": lambda store: store.set_model_version_tag(_NAME, "1", tag),
        "read a version": lambda store: store.get_model_version(_NAME, "1"),
        "move to Staging": lambda store: store.transition_model_version_stage(_NAME, "1", "Staging", False),
    }
    timings = [Timing(name, *_medians(call, plain, gated, rounds)) for name, call in unprotected.items()]
    hashing = statistics.median(_seconds(lambda: artifact_digest(files.as_uri())) for _ in range(5))
    promotion = _medians(lambda store: store.set_registered_model_alias(_NAME, "champion", "1"), plain, gated, 5)
    return (*timings, Timing("set a protected alias", *promotion, hashing))


def _attestation(version: VersionFacts, digest: str, signing: Path) -> str:
    signer = signer_from_environment({SIGNING_KEY: str(signing)})
    if signer is None:
        raise RuntimeError("a key that was just made is gone")
    required = load_requirements(None)
    facts = {
        "verdict": "pass",
        "policy_digest": required.policy_digest,
        "promotion": {"allowed": True, "suite_digest": required.suite_digest},
    }
    return sign(statement_on(version, "verdict", digest, {}, facts), signer)


def _medians(
    call: Callable[[SqlAlchemyStore], object], plain: SqlAlchemyStore, gated: SqlAlchemyStore, rounds: int
) -> tuple[float, float]:
    """Seconds on each store, called in turn."""
    for store in (plain, gated):
        call(store)  # what is compiled or opened once
    pairs = [(_seconds(lambda: call(plain)), _seconds(lambda: call(gated))) for _ in range(rounds)]
    return statistics.median(first for first, _ in pairs), statistics.median(second for _, second in pairs)


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
