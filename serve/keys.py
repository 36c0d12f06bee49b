"""The API key: what may be one, and its hash. Shared by the service and its clients."""

from __future__ import annotations

import hashlib

API_KEY_VARIABLE = "SER_API_KEY"


def checked_key(text: str | None) -> str | None:
    """A key without the white space around it, such as the line's end of a file; None where nothing is left.

    Raises:
        ValueError: characters that a header of HTTP cannot carry the same way everywhere.
    """
    key = (text or "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError(
            f"the API key ({API_KEY_VARIABLE}) holds characters that are no printable ASCII, which an HTTP header "
            "cannot carry; take another one: openssl rand -hex 32"
        )
    return key or None


def key_digest(key: str) -> str:
    """sha256 of an API key, hexadecimal."""
    return hashlib.sha256(key.encode()).hexdigest()
