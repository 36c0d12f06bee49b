"""How much audio a file holds if its header's length is wrong, and whether a container for FFmpeg is cut off.

Uncompressed audio: a killed recorder leaves the length 0, a streaming writer a placeholder (0x7FFFF000, 2e9,
0xFFFFFFFF), and some writers count their own header. Then all audio up to the end of the file is taken. If the length
is none of these and bytes are missing, the recording is cut off.

Containers: FFmpeg reads a file that ends too early as a shorter one, without an error. So the lengths of the outermost
boxes are checked, unless they are left open, as browsers do. Also found: where another recording follows in the file.
Sources: ISO/IEC 14496-12 and Apple's QuickTime File Format (boxes), RFC 8794 (EBML) and RFC 9559 (Matroska),
Microsoft's ASF specification and AVI RIFF file reference.
"""

from __future__ import annotations

from pipeline.audio.source import Opened
from pipeline.storage.errors import Corrupt, Truncated

STREAMED = 0x7F00_0000  # sox, arecord and ffmpeg write such a length or more when they cannot know it
_ROUND_FROM, _ROUND = 10**9, 10**6  # a large round length such as 2e9 is a placeholder
_HEADER_BYTES = 128  # a length too large by up to this much includes the header


def audio_bytes(
    file: Opened,
    start: int,
    declared: int,
    frame_bytes: int = 1,
    *,
    streamed: int = STREAMED,
    outer_end: int | None = None,
) -> int:
    """Bytes of audio from `start`: `declared`, or if that is wrong the whole frames up to the end of the file.

    Args:
        declared: length by the header; 0 is accepted as 0, see `left_open`.
        streamed: lengths of this size or more are placeholders.
        outer_end: offset where the outer chunk ends by its own length.

    Raises:
        Truncated: a frame or more of the `declared` bytes is missing, and the length is neither a placeholder nor
            contradicted by `outer_end`.
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
    """Whether the bytes from `start` are audio although the data chunk states length 0: they are no chunks."""
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
    """The error for a recording that ends within `what`."""
    return Truncated(f"{file.name}: cut off within {what}. Copy or download it again.")


def find(file: Opened, pattern: bytes, start: int, end: int | None = None) -> int:
    """Offset of the first `pattern` that lies in [start, end); -1 if there is none."""
    end = file.size_bytes if end is None else min(end, file.size_bytes)
    step = 2**20
    for position in range(start, end, step):
        at = file.bytes_at(position, min(step + len(pattern) - 1, end - position)).find(pattern)
        if at >= 0:
            return position + at
    return -1


def next_flac(file: Opened, start: int) -> int:
    """Offset of the first FLAC file at or after `start`; 0 if there is none."""
    at = find(file, b"fLaC", start)
    while at >= 0:
        block = file.bytes_at(at + 4, 4)
        if block[1:] == b"\0\0\x22" and not block[0] & 0x7F:  # its STREAMINFO
            return at
        at = find(file, b"fLaC", at + 4)
    return 0


_FIRST_BOXES = frozenset(b"ftyp|moov|mdat|wide|free|skip|pnot|moof|styp|sidx".split(b"|"))
_MAX_BOXES = 100_000
_SEGMENT = bytes.fromhex("18538067")
_EBML = bytes.fromhex("1a45dfa3")
_ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_ASF_HEADER_BYTES = 2**16
_BROADCAST = 1


def mp4_end(file: Opened, head: bytes) -> int | None:
    """Offset of a second MP4 or QuickTime file, 0 if there is none; None if this file is not MP4 at all.

    Raises:
        Truncated: the box with its audio or its index reaches past the end of the file. Corrupt: it has no index.
    """
    if head[4:8] not in _FIRST_BOXES:
        return None
    position, seen, whole = 0, set[bytes](), False
    for _ in range(_MAX_BOXES):
        header = file.bytes_at(position, 16)
        size, name = int.from_bytes(header[:4], "big"), header[4:8]
        if len(header) < 8 or not name.isalnum():
            whole = not header
            break
        if name == b"ftyp" and {b"moov", b"mdat"} <= seen:
            return position
        seen.add(name)
        if size == 1:
            size = int.from_bytes(header[8:16], "big")
        if size == 0:  # up to the end of the file
            break
        if position + size > file.size_bytes and name in (b"mdat", b"moov", b"moof"):
            raise cut_off(file, f"its {name.decode()} box")
        if size < 8:
            break
        position += size
    if not seen & {b"mdat", b"moov", b"moof", b"ftyp"}:
        return None
    if b"moov" not in seen and whole:
        raise Corrupt(f"{file.name}: MP4 without its index (moov): its recorder was stopped early. Record it again.")
    return 0


def webm_end(file: Opened) -> int:
    """Offset of a second WebM or Matroska file, or 0. Raises `Truncated` if the first is cut off."""
    header = _element_bytes(file, len(_EBML))
    position = header[1] if header else 0
    if file.bytes_at(position, 4) == _SEGMENT:
        found = _element_bytes(file, position + 4)
        if found and found[0] is not None and found[1] > file.size_bytes:
            raise cut_off(file, "its Matroska segment")
    at = find(file, _EBML, position + 4)
    while at >= 0:
        if b"\x42\x82" in file.bytes_at(at, 64):  # its document type
            return at
        at = find(file, _EBML, at + 4)
    return 0


def _element_bytes(file: Opened, position: int) -> tuple[int | None, int] | None:
    """(length, end offset) of an EBML element whose length is stored at `position`; length None if left open."""
    data = file.bytes_at(position, 8)
    if not data or not data[0]:
        return None
    count = 9 - data[0].bit_length()
    value = int.from_bytes(data[:count], "big") & ((1 << 7 * count) - 1)
    if value == (1 << 7 * count) - 1:
        return None, position + count
    return value, position + count + value


def asf_end(file: Opened) -> int:
    """Offset of a second ASF file, or 0. Raises `Truncated` if the file is shorter than its header states."""
    head = file.bytes_at(0, _ASF_HEADER_BYTES)
    at = head.find(_ASF_PROPERTIES)
    properties = head[at : at + 92] if at >= 0 else b""
    if len(properties) == 92 and not properties[88] & _BROADCAST:
        size = int.from_bytes(properties[40:48], "little")
        if file.size_bytes < size < 2**48:
            raise cut_off(file, "its ASF packets")
        return size if size and file.bytes_at(size, 16) == head[:16] else 0
    return 0


def avi_end(file: Opened) -> int:
    """Always 0. Raises `Truncated` if the file is shorter than its first chunk states."""
    size = int.from_bytes(file.bytes_at(4, 4), "little")
    if file.size_bytes < size + 8 < STREAMED:
        raise cut_off(file, "its AVI chunks")
    return 0
