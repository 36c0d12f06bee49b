"""Hooks for schemathesis: it sends real recordings of eight channels, so that every documented option is valid."""

from __future__ import annotations

import base64

import schemathesis
from hypothesis import strategies as st

from tests.support.recordings import encode, synthetic_speech

RECORDINGS = [
    encode(synthetic_speech(duration_s, 8_000, 8), 8_000, container, "PCM_16")
    for container, duration_s in (("WAV", 0.3), ("FLAC", 0.5), ("WAV", 1.0))
]

schemathesis.openapi.format("binary", st.sampled_from(RECORDINGS))
schemathesis.openapi.format("byte", st.sampled_from(RECORDINGS).map(lambda data: base64.b64encode(data).decode()))
for media_type in ("application/octet-stream", "audio/wav"):
    schemathesis.openapi.media_type(media_type, st.sampled_from(RECORDINGS))


@schemathesis.hook
def filter_body(context: schemathesis.HookContext, body: object) -> bool:
    """Skip forms with a one-element list in a field that takes one value: both give the same request."""
    if not isinstance(body, dict):
        return True
    return not any(isinstance(value, list) and len(value) <= 1 for name, value in body.items() if name != "file")
