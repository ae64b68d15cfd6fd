"""One digest for all documents."""

from __future__ import annotations

import hashlib
import json


def document_digest(document: object) -> str:
    """``sha256:<hex>`` of JSON values, however their keys are ordered."""
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(canonical.encode()).hexdigest()}"
