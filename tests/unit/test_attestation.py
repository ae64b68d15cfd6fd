"""Signed statements: what a standard reader makes of them, and every way in which one does not hold."""

from __future__ import annotations

import base64
import dataclasses
import datetime
import json
import stat

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from audit_plugin.attestation import (
    SIGNING_KEY,
    SIGNING_KEY_PASSWORD,
    TAG_OF,
    VERIFYING_KEYS,
    WAIVER_KEYS,
    Statement,
    VerifyingKeys,
    generate_keys,
    keys_from_environment,
    sign,
    signer_from_environment,
    verify,
    waiver_keys_from_environment,
)
from audit_plugin.errors import AttestationError, UsageError

NOW = datetime.datetime(2026, 3, 1, 12, 0, tzinfo=datetime.UTC)
STATEMENT = Statement(
    "verdict", "digits", "3", "sha256:" + "ab" * 32, NOW, {"audit.verdict": "pass"}, {"verdict": "pass", "seed": 0}, NOW
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return generate_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def signer(pair):
    return signer_from_environment({SIGNING_KEY: str(pair[0])})


@pytest.fixture(scope="module")
def keys(pair):
    return keys_from_environment(environment={VERIFYING_KEYS: str(pair[1])})


def changed(envelope, change):
    """The envelope with another payload under the old signature."""
    document = json.loads(envelope)
    payload = json.loads(base64.b64decode(document["payload"]))
    change(payload)
    document["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()
    return json.dumps(document)


def test_a_statement_comes_back_as_it_was(signer, keys):
    assert verify(sign(STATEMENT, signer), keys) == STATEMENT


@pytest.mark.parametrize("kind", TAG_OF)
def test_every_kind_is_told_apart(kind, signer, keys):
    assert verify(sign(dataclasses.replace(STATEMENT, kind=kind), signer), keys).kind == kind


def test_it_is_a_dsse_envelope_around_an_in_toto_statement(signer, pair):
    """Read with nothing of ours and nothing of the library that wrote it, by the two specifications."""
    envelope = json.loads(sign(STATEMENT, signer))
    assert set(envelope) == {"payload", "payloadType", "signatures"}
    assert envelope["payloadType"] == "application/vnd.in-toto+json"
    payload, kind = base64.b64decode(envelope["payload"]), envelope["payloadType"].encode()
    encoded = b" ".join([b"DSSEv1", str(len(kind)).encode(), kind, str(len(payload)).encode(), payload])
    public = serialization.load_pem_public_key(pair[1].read_bytes())
    (signature,) = envelope["signatures"]
    public.verify(base64.b64decode(signature["sig"]), encoded)
    with pytest.raises(InvalidSignature):
        public.verify(base64.b64decode(signature["sig"]), encoded + b" ")
    statement = json.loads(payload)
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["subject"] == [{"name": "models:/digits/3", "digest": {"sha256": "ab" * 32}}]
    assert statement["predicate"]["verdict"] == "pass"


@pytest.mark.parametrize(
    "change",
    [
        lambda payload: payload["predicate"].update(verdict="fail"),
        lambda payload: payload["subject"][0]["digest"].update(sha256="cd" * 32),
        lambda payload: payload["predicate"]["model"].update(version="4"),
        lambda payload: payload["predicate"]["tags"].update({"audit.verdict": "fail"}),
        lambda payload: payload["predicate"].update(created="2030-01-01T00:00:00+00:00"),
    ],
)
def test_nothing_of_it_can_be_changed(change, signer, keys):
    with pytest.raises(AttestationError, match="by none of the keys"):
        verify(changed(sign(STATEMENT, signer), change), keys)


def test_a_foreign_key_does_not_count(tmp_path, keys):
    foreign = signer_from_environment({SIGNING_KEY: str(generate_keys(tmp_path)[0])})
    with pytest.raises(AttestationError, match="by none of the keys"):
        verify(sign(STATEMENT, foreign), keys)
    document = json.loads(sign(STATEMENT, foreign))
    document["signatures"][0]["keyid"] = keys.identifiers[0]  # posing as the known one
    with pytest.raises(AttestationError, match="by none of the keys"):
        verify(json.dumps(document), keys)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "pass",
        "{}",
        "[]",
        "null",
        '{"payload": 1, "payloadType": "x", "signatures": []}',
        '{"signatures": {}}',
        "\x00",
        "{" * 5000,
    ],
)
def test_what_is_no_envelope_is_refused_in_one_line(text, keys):
    with pytest.raises(AttestationError) as caught:
        verify(text, keys)
    assert "\n" not in str(caught.value)


def test_an_endless_envelope_is_not_parsed(keys):
    with pytest.raises(AttestationError, match="at most 65536"):
        verify(json.dumps({"payload": "A" * 100_000}), keys)


@pytest.mark.parametrize(
    ("payload", "kind"),
    [
        ({"_type": "https://in-toto.io/Statement/v0.1"}, "application/vnd.in-toto+json"),
        ({}, "application/vnd.in-toto+json"),
        ([], "application/vnd.in-toto+json"),
        (
            {"_type": "https://in-toto.io/Statement/v1", "predicateType": "https://slsa.dev/provenance/v1"},
            "application/vnd.in-toto+json",
        ),
        ({}, "text/plain"),
    ],
)
def test_another_statement_by_our_own_key_is_not_taken_for_an_audit(payload, kind, signer, keys):
    from securesystemslib.dsse import Envelope

    envelope = Envelope(json.dumps(payload).encode(), kind, {})
    envelope.sign(signer)
    with pytest.raises(AttestationError, match=r"no statement of this tool|no in-toto statement"):
        verify(json.dumps(envelope.to_dict()), keys)


def test_subject_and_predicate_must_agree(signer, keys):
    from securesystemslib.dsse import Envelope

    document = json.loads(base64.b64decode(json.loads(sign(STATEMENT, signer))["payload"]))
    document["subject"][0]["name"] = "models:/other/1"
    envelope = Envelope(json.dumps(document).encode(), "application/vnd.in-toto+json", {})
    envelope.sign(signer)
    with pytest.raises(AttestationError, match="no statement of this tool"):
        verify(json.dumps(envelope.to_dict()), keys)


def test_without_keys_nothing_holds(signer):
    with pytest.raises(AttestationError, match=VERIFYING_KEYS):
        verify(sign(STATEMENT, signer), VerifyingKeys(()))


# ------------------------------------------------------------------------------------------------------- the keys


def test_the_signing_key_is_its_owners_alone_and_never_overwritten(tmp_path):
    signing, _ = generate_keys(tmp_path / "new")
    assert stat.S_IMODE(signing.stat().st_mode) == 0o600
    before = signing.read_bytes()
    with pytest.raises(UsageError, match="no key is overwritten"):
        generate_keys(tmp_path / "new")
    assert signing.read_bytes() == before


def test_old_and_new_keys_verify_side_by_side(tmp_path, pair, signer):
    """Rotation: the registry trusts both until nothing signed by the old one counts any more."""
    _, other = generate_keys(tmp_path)
    for value in (f"{other}:{pair[1]}", other.read_text() + "\n" + pair[1].read_text()):
        both = keys_from_environment(environment={VERIFYING_KEYS: value})
        assert len(both.keys) == 2
        assert verify(sign(STATEMENT, signer), both) == STATEMENT
    joined = tmp_path / "both.pem"
    joined.write_bytes(other.read_bytes() + pair[1].read_bytes() + pair[1].read_bytes())
    assert len(keys_from_environment(environment={VERIFYING_KEYS: str(joined)}).keys) == 2


def test_waivers_can_have_keys_of_their_own(tmp_path, pair):
    _, other = generate_keys(tmp_path)
    alone = {VERIFYING_KEYS: str(pair[1])}
    assert waiver_keys_from_environment(alone).identifiers == keys_from_environment(environment=alone).identifiers
    apart = waiver_keys_from_environment(alone | {WAIVER_KEYS: str(other)})
    assert set(apart.identifiers).isdisjoint(keys_from_environment(environment=alone).identifiers)


def test_keys_may_stand_in_the_variable_itself(pair, keys):
    signer = signer_from_environment({SIGNING_KEY: pair[0].read_text()})
    assert verify(sign(STATEMENT, signer), keys) == STATEMENT


def test_a_signing_key_that_is_not_there_is_called_missing_not_unreadable(tmp_path):
    with pytest.raises(UsageError, match=rf"names '{tmp_path}/none.pem', which cannot be read: No such file"):
        signer_from_environment({SIGNING_KEY: str(tmp_path / "none.pem")})


def test_an_encrypted_key_needs_its_password(tmp_path):
    key = Ed25519PrivateKey.generate()
    file = tmp_path / "signing.pem"
    file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"secret")
        )
    )
    assert signer_from_environment({SIGNING_KEY: str(file), SIGNING_KEY_PASSWORD: "secret"}) is not None
    for password in ({}, {SIGNING_KEY_PASSWORD: "wrong"}):
        with pytest.raises(UsageError, match=SIGNING_KEY_PASSWORD):
            signer_from_environment({SIGNING_KEY: str(file)} | password)


def test_unset_means_no_signer_and_no_keys():
    assert signer_from_environment({}) is None
    assert keys_from_environment(environment={}).keys == ()


def test_what_is_no_ed25519_key_is_refused(tmp_path, pair):
    private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    signing, verifying, nonsense = tmp_path / "rsa.pem", tmp_path / "rsa.pub", tmp_path / "nonsense"
    signing.write_bytes(
        private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    verifying.write_bytes(
        private.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    nonsense.write_text("no key")
    with pytest.raises(UsageError, match="must hold an Ed25519 key"):
        signer_from_environment({SIGNING_KEY: str(signing)})
    with pytest.raises(UsageError, match="must hold Ed25519 keys"):
        keys_from_environment(environment={VERIFYING_KEYS: str(verifying)})
    for file in (nonsense, pair[0], tmp_path / "missing.pem"):
        with pytest.raises(UsageError, match=VERIFYING_KEYS):
            keys_from_environment(environment={VERIFYING_KEYS: str(file)})
    with pytest.raises(UsageError, match=SIGNING_KEY):
        signer_from_environment({SIGNING_KEY: str(nonsense)})
