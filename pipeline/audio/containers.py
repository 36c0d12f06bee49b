"""Containers that FFmpeg reads: whether they break off, and where another recording follows in the same file.

FFmpeg takes a file that ends too early for a shorter one. The outermost boxes say how long they are: one that reaches
past the end of the file was cut. Lengths that recorders leave open, as browsers do, say nothing.
Sources: ISO/IEC 14496-12 and Apple's QuickTime File Format (boxes), RFC 8794 (EBML) and RFC 9559 (Matroska),
Microsoft's ASF specification and AVI RIFF file reference.
"""

from __future__ import annotations

from pipeline.audio.errors import Corrupt
from pipeline.audio.lengths import STREAMED, cut_off, find
from pipeline.audio.source import Opened

_FIRST_BOXES = frozenset(b"ftyp|moov|mdat|wide|free|skip|pnot|moof|styp|sidx".split(b"|"))
_MAX_BOXES = 100_000
_SEGMENT = bytes.fromhex("18538067")
_EBML = bytes.fromhex("1a45dfa3")
_ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_ASF_HEADER_BYTES = 2**16
_BROADCAST = 1


def mp4_end(file: Opened, head: bytes) -> int | None:
    """Where a second MP4 or QuickTime file begins, 0 where none does; None where this is none.

    Raises:
        Truncated: its sound or its index reaches past the end. Corrupt: there is no index.
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
    """Where a second WebM or Matroska file begins, 0 where none does. Raises `Truncated`."""
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
    """Length of an EBML element, None where it is left open, and where it ends, by the number at `position`."""
    data = file.bytes_at(position, 8)
    if not data or not data[0]:
        return None
    count = 9 - data[0].bit_length()
    value = int.from_bytes(data[:count], "big") & ((1 << 7 * count) - 1)
    if value == (1 << 7 * count) - 1:
        return None, position + count
    return value, position + count + value


def asf_end(file: Opened) -> int:
    """Where a second ASF file begins, 0 where none does. Raises `Truncated` where its header says that it is longer."""
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
    """Always 0. Raises `Truncated` where the file is shorter than its first chunk says."""
    size = int.from_bytes(file.bytes_at(4, 4), "little")
    if file.size_bytes < size + 8 < STREAMED:
        raise cut_off(file, "its AVI chunks")
    return 0
