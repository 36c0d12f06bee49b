"""How much audio a file holds, where its header says something else.

A header's length is a promise only when nothing speaks against it. Recorders that were killed leave 0, streaming
writers a placeholder (0x7FFFF000, 2e9, 0xFFFFFFFF), some count their own header; then all that is there is taken. Where
the rest of the header agrees with the promise, and less is there, the recording is cut off.
"""

from __future__ import annotations

from pipeline.audio.errors import Truncated
from pipeline.audio.source import Opened

STREAMED = 0x7F00_0000  # sox, arecord and ffmpeg write such a length or more when they cannot know it
_ROUND_FROM, _ROUND = 10**9, 10**6  # 2e9 is nobody's length
_HEADER_BYTES = 128  # a length that is too large by this much or less counts the header


def audio_bytes(
    file: Opened,
    start: int,
    declared: int,
    frame_bytes: int = 1,
    *,
    streamed: int = STREAMED,
    outer_end: int | None = None,
) -> int:
    """How many bytes of audio there are from `start`, whole frames: `declared`, or all up to the end of the file.

    Args:
        declared: what the header says; 0 is taken at its word, see `left_open`.
        streamed: from here on a length is a placeholder.
        outer_end: where the outer chunk ends by its own length.

    Raises:
        Truncated: `declared` bytes are not there, by a frame or more, and nothing says that they never were.
    """
    present = max(file.size_bytes - start, 0)
    missing = declared - present
    if missing < frame_bytes:
        return declared
    counts_header = missing <= _HEADER_BYTES or missing in (start, start - 8)
    is_round = declared % _ROUND == 0 or declared & (declared - 1) == 0
    placeholder = declared >= streamed or (declared >= _ROUND_FROM and is_round)
    agrees = outer_end is not None and abs(file.size_bytes - outer_end) <= 1
    if present and (counts_header or placeholder or agrees):
        return present - present % frame_bytes
    share = f"{present} of {declared} bytes of audio"
    raise Truncated(f"{file.name}: cut off, {share} are there. Copy or download it again.")


def left_open(file: Opened, start: int, order: str) -> bool:
    """Whether the bytes from `start` are audio, though their chunk says that it is empty: they are no chunks."""
    position = start
    while position < file.size_bytes:
        header = file.bytes_at(position, 8)
        if len(header) < 8 or not is_chunk_name(header[:4]):
            return True
        size = int.from_bytes(header[4:], "little" if order == "<" else "big")
        position += 8 + size + size % 2
    return position > file.size_bytes + 1


def is_chunk_name(name: bytes) -> bool:
    """Whether four bytes can name a chunk: printable ASCII."""
    return len(name) == 4 and all(32 <= byte < 127 for byte in name)


def cut_off(file: Opened, what: str) -> Truncated:
    """The error of a recording that ends within `what`."""
    return Truncated(f"{file.name}: cut off within {what}. Copy or download it again.")


def find(file: Opened, pattern: bytes, start: int, end: int | None = None) -> int:
    """Where `pattern` begins first, from `start` on and before `end`; -1 where it does not."""
    end = file.size_bytes if end is None else min(end, file.size_bytes)
    step = 2**20
    for position in range(start, end, step):
        at = file.bytes_at(position, min(step + len(pattern) - 1, end - position)).find(pattern)
        if at >= 0:
            return position + at
    return -1


def next_flac(file: Opened, start: int) -> int:
    """Where a FLAC begins, from `start` on; 0 where none does."""
    at = find(file, b"fLaC", start)
    while at >= 0:
        block = file.bytes_at(at + 4, 4)
        if block[1:] == b"\0\0\x22" and not block[0] & 0x7F:  # its STREAMINFO
            return at
        at = find(file, b"fLaC", at + 4)
    return 0
