"""Signed statements about a model version: an in-toto Statement (v1) in a DSSE envelope, signed with Ed25519.

Whoever audits holds the signing key; the registry and those who deploy need the verifying keys alone. A statement speaks of one
name, one version and one digest, and names every ``audit.*`` tag that may stand on the version, so that a tag which no valid
statement backs is a forgery. Three kinds are made: ``verdict`` by an audit, ``waiver`` by a person in an emergency, ``origin`` by
a repair or a guard for the version that it made.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import CryptoSigner, Key, SSlibKey

from audit_plugin.errors import AttestationError, UsageError

SIGNING_KEY = "BACKDOOR_AUDIT_SIGNING_KEY"
SIGNING_KEY_PASSWORD = "BACKDOOR_AUDIT_SIGNING_KEY_PASSWORD"  # noqa: S105  (the name of a variable)
VERIFYING_KEYS = "BACKDOOR_AUDIT_VERIFYING_KEYS"
WAIVER_KEYS = "BACKDOOR_AUDIT_WAIVER_KEYS"

Kind = Literal["verdict", "waiver", "origin"]
TAG_OF: Mapping[Kind, str] = {"verdict": "audit.attestation", "waiver": "audit.waiver", "origin": "audit.origin"}
"""The tag of a model version that keeps the envelope of each kind."""

_PAYLOAD_TYPE = "application/vnd.in-toto+json"
_STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
_PREDICATE_TYPES: Mapping[Kind, str] = {
    kind: f"https://mlflow-backdoor-audit.github.io/attestation/{kind}/v1" for kind in get_args(Kind)
}
_LONGEST_ENVELOPE = 64 * 1024


@dataclass(frozen=True)
class Statement:
    """What a signature vouches for.

    Attributes:
        digest: ``sha256:<hex>`` over the manifest of the version's files.
        version_created: when the registry made the version, in UTC: another one of the same name and number, after a deletion or
            under a changed name, has another time.
        created: when it was made, in UTC.
        tags: every other ``audit.*`` tag that may stand on the version because of this statement.
        facts: what the kind adds, JSON values only: of a verdict ``verdict``, ``policy_digest``, ``promotion`` and more; of a
            waiver ``by``, ``reason``, ``until``.
    """

    kind: Kind
    name: str
    version: str
    digest: str
    created: datetime.datetime
    tags: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    version_created: datetime.datetime | None = None

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.version}"


@dataclass(frozen=True)
class VerifyingKeys:
    """Public keys, any of which may have signed; several of them let a key be replaced without a gap."""

    keys: tuple[Key, ...]

    @property
    def identifiers(self) -> tuple[str, ...]:
        return tuple(key.keyid for key in self.keys)


def sign(statement: Statement, signer: CryptoSigner) -> str:
    """The statement in a signed DSSE envelope, as JSON text."""
    document = {
        "_type": _STATEMENT_TYPE,
        "subject": [{"name": statement.uri, "digest": {"sha256": statement.digest.removeprefix("sha256:")}}],
        "predicateType": _PREDICATE_TYPES[statement.kind],
        "predicate": {
            "model": {"name": statement.name, "version": statement.version, "created": _text(statement.version_created)},
            "created": _text(statement.created),
            "tags": dict(statement.tags),
            **statement.facts,
        },
    }
    return seal(document, _PAYLOAD_TYPE, signer)


def verify(text: str, keys: VerifyingKeys) -> Statement:
    """The statement in an envelope that one of ``keys`` signed.

    Raises:
        AttestationError: it is none, or no key's signature on it holds.
    """
    if not keys.keys:
        raise AttestationError(f"No verifying keys are known, so no signature can be checked. Set {VERIFYING_KEYS}.")
    if len(text) > _LONGEST_ENVELOPE:
        raise AttestationError(f"The attestation is {len(text)} characters long; at most {_LONGEST_ENVELOPE} are read.")
    payload = unseal(text, _PAYLOAD_TYPE, keys)
    try:
        return _statement(json.loads(payload))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AttestationError(f"The attestation is signed, but no statement of this tool ({type(error).__name__}).") from error


def seal(document: Mapping[str, Any], payload_type: str, signer: CryptoSigner) -> str:
    """A document in a signed DSSE envelope, as JSON text."""
    envelope = Envelope(json.dumps(document, sort_keys=True).encode(), payload_type, {})
    envelope.sign(signer)
    return json.dumps(envelope.to_dict(), sort_keys=True)


def unseal(text: str, payload_type: str, keys: VerifyingKeys) -> bytes:
    """What is in an envelope that one of ``keys`` signed.

    Raises:
        AttestationError: it is none, no key's signature on it holds, or it holds something of another type.
    """
    try:
        envelope = Envelope.from_dict(json.loads(text))
        envelope.verify(list(keys.keys), threshold=1)
    except VerificationError as error:
        raise AttestationError("The attestation's signature is by none of the keys that may sign.") from error
    except Exception as error:  # a library's parser on a stranger's text: whatever it says, this is no attestation
        raise AttestationError(f"The attestation is no DSSE envelope ({type(error).__name__}).") from error
    if envelope.payload_type != payload_type:
        raise AttestationError("The attestation's envelope holds no in-toto statement.")
    payload: bytes = envelope.payload
    return payload


def _statement(document: Mapping[str, Any]) -> Statement:
    if document["_type"] != _STATEMENT_TYPE:
        raise ValueError("another type of statement")
    kinds: dict[str, Kind] = {uri: kind for kind, uri in _PREDICATE_TYPES.items()}
    kind = kinds[document["predicateType"]]
    (subject,) = document["subject"]
    facts = dict(document["predicate"])
    model, tags = facts.pop("model"), facts.pop("tags")
    created, version_created = _time(facts.pop("created")), _time(model["created"])
    if created is None or not all(isinstance(text, str) for pair in tags.items() for text in pair):
        raise ValueError("no time, or a tag that is no text")
    statement = Statement(
        kind, model["name"], model["version"], f"sha256:{subject['digest']['sha256']}", created, tags, facts, version_created
    )
    if subject["name"] != statement.uri:
        raise ValueError("subject and predicate speak of different models")
    return statement


def _text(time: datetime.datetime | None) -> str | None:
    return None if time is None else time.astimezone(datetime.UTC).isoformat()


def _time(text: str | None) -> datetime.datetime | None:
    time = None if text is None else datetime.datetime.fromisoformat(text)
    if time is not None and time.tzinfo is None:
        raise ValueError("a time without zone")
    return time


# ------------------------------------------------------------------------------------------------------- the keys


def generate_keys(folder: Path) -> tuple[Path, Path]:
    """Write a new key pair, ``signing.pem`` (readable by its owner alone) and ``verifying.pem``.

    Raises:
        UsageError: one of the files exists.
    """
    private = Ed25519PrivateKey.generate()
    signing, verifying = folder / "signing.pem", folder / "verifying.pem"
    for path in (signing, verifying):
        if path.exists():
            raise UsageError(f"'{path}' exists, and no key is overwritten. Choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(signing, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(
            private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        )
    verifying.write_bytes(
        private.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return signing, verifying


def signer_from_environment(environment: Mapping[str, str] = os.environ) -> CryptoSigner | None:
    """The signer whose key, as PEM text or as the path of a PEM file, ``BACKDOOR_AUDIT_SIGNING_KEY`` holds; None if it is unset.

    Raises:
        UsageError: there is no such file, or it holds no Ed25519 key, or its password is missing or wrong.
    """
    value = environment.get(SIGNING_KEY, "")
    if not value:
        return None
    password = environment.get(SIGNING_KEY_PASSWORD, "")
    pem = _pem(value, SIGNING_KEY)
    try:
        key = serialization.load_pem_private_key(pem, password.encode() if password else None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise UsageError(
            f"{SIGNING_KEY} holds no readable private key in PEM format; if it is encrypted, set {SIGNING_KEY_PASSWORD}. "
            "'backdoor-audit keygen FOLDER' makes a pair."
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError(f"{SIGNING_KEY} must hold an Ed25519 key, got {type(key).__name__}.")
    return CryptoSigner(key)


def keys_from_environment(variable: str = VERIFYING_KEYS, environment: Mapping[str, str] = os.environ) -> VerifyingKeys:
    """The public keys of a variable: PEM text, or paths of PEM files separated by ':'; each may hold several keys, one by one.

    Raises:
        UsageError: a file is missing, or something in it is no Ed25519 public key.
    """
    value = environment.get(variable, "")
    sources = [value] if "-----BEGIN" in value else [part for part in value.split(os.pathsep) if part]
    return VerifyingKeys(tuple({key.keyid: key for source in sources for key in _public_keys(source, variable)}.values()))


def waiver_keys_from_environment(environment: Mapping[str, str] = os.environ) -> VerifyingKeys:
    """The keys that may sign waivers: those of ``BACKDOOR_AUDIT_WAIVER_KEYS``, or, where it is unset, the verifying keys."""
    return keys_from_environment(WAIVER_KEYS if environment.get(WAIVER_KEYS) else VERIFYING_KEYS, environment)


def _public_keys(source: str, variable: str) -> Iterable[Key]:
    end = b"-----END PUBLIC KEY-----"
    text = _pem(source, variable)
    blocks = [block + end for block in text.split(end)[:-1]]
    if not blocks or text.split(end)[-1].strip():
        raise UsageError(f"{variable} must name public keys in PEM format ('-----BEGIN PUBLIC KEY-----').")
    for block in blocks:
        try:
            key = serialization.load_pem_public_key(block.lstrip())
        except (ValueError, UnsupportedAlgorithm) as error:
            raise UsageError(
                f"{variable} holds a public key that cannot be read. 'backdoor-audit keygen' makes a pair."
            ) from error
        if not isinstance(key, Ed25519PublicKey):
            raise UsageError(f"{variable} must hold Ed25519 keys, got {type(key).__name__}.")
        yield SSlibKey.from_crypto(key)


def _pem(value: str, variable: str) -> bytes:
    if "-----BEGIN" in value:
        return value.encode()
    try:
        return Path(value).expanduser().read_bytes()
    except OSError as error:
        raise UsageError(f"{variable} names '{value}', which cannot be read: {error.strerror or error}.") from error
