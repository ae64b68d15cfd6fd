"""How MLflow signs the deliveries of its webhooks."""

from __future__ import annotations

import base64
import hashlib
import hmac


def signature_of(secret: str, identifier: str, timestamp: str, body: bytes) -> str:
    """The header ``X-MLflow-Signature`` of a delivery."""
    signed = b".".join((identifier.encode(), timestamp.encode(), body))
    return f"v1,{base64.b64encode(hmac.new(secret.encode(), signed, hashlib.sha256).digest()).decode()}"
