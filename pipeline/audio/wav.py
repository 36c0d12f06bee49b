"""WAV, RF64 and W64: finds the audio data and its length, and makes a correct header where the file's own is wrong.

Method: the chunks are read one after the other. If the pad byte of an odd chunk is missing, the next chunk is expected
one byte earlier; if there is one too many, one byte later. If that finds no ``data`` chunk, the file is searched for
the bytes ``data``. A new header replaces one with wrong layout or length.
Sources: RIFF/WAVE (Microsoft, mmreg.h), EBU Tech 3306 (RF64), Sony Wave64.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

from pipeline.audio.lengths import STREAMED, audio_bytes, find, is_chunk_name, left_open
from pipeline.audio.source import REMEDY, Opened, Splice
from pipeline.storage.errors import Corrupt, Truncated, UnsupportedFormat

_BLOCK_TAGS = (2, 0x11)  # MS and IMA ADPCM; for these, bytes a frame is the size of a block
_SNDFILE_TAGS = (1, 3, 6, 7, *_BLOCK_TAGS)  # PCM, float, A-law, mu-law
_FFMPEG_TAGS = frozenset(
    {0x10, 0x14, 0x17, 0x20, 0x22, 0x31, 0x40, 0x42, 0x45, 0x50, 0x55, 0x64, 0x65, 0x69, 0x83, 0xFF, 0x133, 0x160}
    | {0x161, 0x162, 0x163, 0x200, 0x28F, 0x1501, 0x1600, 0x1602, 0x1610, 0x2000, 0x674F, 0x6750, 0x6751, 0x704F}
    | {0xA100, 0xA109, 0xF1AC}
)
_EXTENSIBLE = 0xFFFE
_KNOWN = frozenset(b"fmt |data|fact|LIST|JUNK|ds64|bext|iXML|PEAK|cue |smpl|inst|id3 |afsp|cart|PAD |FLLR".split(b"|"))
_W64_TAIL = bytes.fromhex("f3acd3118cd100c04f8edb8a")  # ends every chunk's GUID; the 4 bytes before name the chunk
W64_RIFF = b"riff" + bytes.fromhex("2e91cf11a5d628db04c10000")
_MAX_CHUNKS = 4096
_SEARCHED_BYTES = 2**20
_LOOKS, _LOOKED_AT_BYTES = 16, 2**14
_MAX_FORMAT_BYTES = 1024


@dataclass(frozen=True)
class Wav:
    """The audio data of a file and how to read it."""

    splice: Splice | None  # a header for the decoder in place of the file's own, if that is wrong
    sndfile: bool  # whether libsndfile reads the codec; else FFmpeg does
    end: int  # offset where the audio ends
    gain: float = 1.0  # factor to multiply the samples with


@dataclass(frozen=True)
class _Format:
    """A ``fmt`` chunk: codec tag, channels, bits a sample, bytes a frame, its body, whether WAVEFORMATEXTENSIBLE."""

    tag: int
    channels: int
    bits: int
    frame_bytes: int
    body: bytes
    extensible: bool


@dataclass(frozen=True)
class _Layout:
    """Start of the audio, its length by its chunk (from ``streamed`` on a placeholder), if libsndfile can read it."""

    form: _Format
    start: int
    declared: int
    regular: bool = True
    streamed: int = STREAMED


def look_at_wav(file: Opened, order: str) -> Wav:
    """Find the audio of a WAVE file, RIFF (``order`` ``<``) or RIFX (``>``).

    Raises:
        Truncated: no audio data. Corrupt: the format is impossible or missing. UnsupportedFormat: unknown codec.
    """
    head = file.bytes_at(0, 12)
    outer = int.from_bytes(head[4:8], "little" if order == "<" else "big")
    return _settled(file, _walk(file, order), order, outer_end=outer + 8)


def look_at_w64(file: Opened) -> Wav:
    """As `look_at_wav`, for a Wave64 file."""
    form: _Format | None = None
    position = 40
    for _ in range(_MAX_CHUNKS):
        header = file.bytes_at(position, 24)
        if len(header) < 24:
            break
        name, size = header[:4], int.from_bytes(header[16:], "little")
        ours = header[4:16] == _W64_TAIL
        if ours and name == b"fmt ":
            form = _format(file, file.bytes_at(position + 24, min(max(size - 24, 0), _MAX_FORMAT_BYTES)), "<")
        elif ours and name == b"data":
            if form is None:
                raise _no_format(file)
            outer = int.from_bytes(file.bytes_at(16, 8), "little")
            regular = not form.extensible  # libsndfile would read floats as integers
            layout = _Layout(form, position + 24, max(size - 24, 0), regular, streamed=2**62)
            return _settled(file, layout, "<", outer_end=outer)
        position += max(size + -size % 8, 24)
    raise no_audio_data(file)


def _walk(file: Opened, order: str) -> _Layout:
    form: _Format | None = None
    position, data_bytes_64, regular = 12, 0, file.bytes_at(0, 4) != b"BW64"  # libsndfile does not know BW64
    for _ in range(_MAX_CHUNKS):
        shift = _shift(file, position)
        position, regular = position + shift, regular and not shift
        header = file.bytes_at(position, 8)
        if len(header) < 8:
            break
        name, size, body = header[:4], int.from_bytes(header[4:], "little" if order == "<" else "big"), position + 8
        if name == b"fmt ":
            form = _format(file, file.bytes_at(body, min(size, _MAX_FORMAT_BYTES)), order)
        elif name == b"ds64":
            data_bytes_64 = int.from_bytes(file.bytes_at(body + 8, 8), "little")
        elif name == b"data":
            if form is None:
                raise _no_format(file)
            if size == 0xFFFF_FFFF and data_bytes_64:
                return _Layout(form, body, data_bytes_64, regular, streamed=2**62)
            return _Layout(form, body, size, regular)
        position = body + size + size % 2
    data = find(file, b"data", 12, _SEARCHED_BYTES)
    if form is None or data < 0 or data + 8 >= file.size_bytes:
        raise no_audio_data(file)
    (size,) = struct.unpack(order + "I", file.bytes_at(data + 4, 4))
    return _Layout(form, data + 8, size, regular=False)


def _shift(file: Opened, position: int) -> int:
    """Distance from `position` to the next chunk: -1 for a missing pad byte, 1 for one too many, else 0."""
    for known in (_KNOWN.__contains__, is_chunk_name):
        for shift in (0, -1, 1):
            if known(file.bytes_at(position + shift, 4)):
                return shift
    return 0


def _format(file: Opened, body: bytes, order: str) -> _Format:
    if len(body) < 16:
        raise Truncated(f"{file.name}: its format chunk is {len(body)} bytes, expected 16 or more. Export it again.")
    tag, channels, rate_hz, _, frame_bytes, bits = struct.unpack(order + "HHIIHH", body[:16])
    extensible = tag == _EXTENSIBLE and len(body) >= 26
    if extensible:
        (tag,) = struct.unpack(order + "H", body[24:26])  # the sub-format's GUID starts with the codec's tag
    impossible = f"{file.name}: header with {channels} channels, {rate_hz} Hz, {bits} bits. Export it again."
    if not channels or not rate_hz or not frame_bytes:
        raise Corrupt(impossible)
    if tag not in _SNDFILE_TAGS and tag not in _FFMPEG_TAGS:
        raise UnsupportedFormat(f"{file.name}: WAV with codec 0x{tag:04X} is not accepted. {REMEDY}")
    if tag in _SNDFILE_TAGS and tag not in _BLOCK_TAGS:
        if bits not in (8, 12, 16, 20, 24, 32, 64):
            raise Corrupt(impossible)
        wide = tag == 1 and frame_bytes in [channels * size for size in (2, 3, 4) if 8 * size > bits]
        if frame_bytes != channels * -(-bits // 8) and not wide:
            raise Corrupt(f"{file.name}: {frame_bytes} bytes a frame for {channels} x {bits} bits. Export it again.")
    return _Format(tag, channels, bits, frame_bytes, body, extensible)


def _settled(file: Opened, layout: _Layout, order: str, outer_end: int) -> Wav:
    form, start, declared = layout.form, layout.start, layout.declared
    if declared == 0 and left_open(file, start, order):
        declared = layout.streamed
    outer = outer_end if outer_end > 8 else None
    size = audio_bytes(file, start, declared, form.frame_bytes, streamed=layout.streamed, outer_end=outer)
    if form.tag in _FFMPEG_TAGS:  # always a new header: FFmpeg allocates whatever size a format chunk states
        return Wav(Splice(0, start, header_of(form.body, size, order)), sndfile=False, end=start + size)
    gain = 1.0
    wide = form.tag == 1 and form.frame_bytes != form.channels * -(-form.bits // 8)
    if wide:
        form, gain = _widened(file, form, start, order)
    right = layout.regular and size == layout.declared and not wide
    splice = None if right else Splice(0, start, header_of(form.body, size, order))
    return Wav(splice, sndfile=True, end=start + size, gain=gain)


def _widened(file: Opened, form: _Format, start: int, order: str) -> tuple[_Format, float]:
    """The format for samples stored in more bytes than their bits need, read at full width, and the gain they need.

    WAVEFORMATEXTENSIBLE keeps the sample in the upper bits. Some plain files keep it in the lower bits: then every
    upper byte repeats the sign.
    """
    size = form.frame_bytes // form.channels
    low, full = True, False
    step = max((file.size_bytes - start) // _LOOKS // size * size, size)
    for place in range(start, file.size_bytes, step):  # samples of the whole file: the beginning may be silent
        data = file.bytes_at(place, min(step, _LOOKED_AT_BYTES // size * size))
        values = [data[i::size] for i in (range(size) if order == "<" else reversed(range(size)))]  # lowest byte first
        low = low and all(top == (0xFF if below & 0x80 else 0) for top, below in zip(*values[:-3:-1], strict=False))
        full = full or any(values[0])
    low = low and (full or not form.extensible)
    body = bytearray(form.body)
    body[14:16] = struct.pack(order + "H", 8 * size)
    return replace(form, bits=8 * size, body=bytes(body)), float(2 ** (8 * size - form.bits)) if low else 1.0


def header_of(form: bytes, size: int, order: str = "<") -> bytes:
    """The complete header before `size` bytes of audio, `form` is its format chunk; RF64 where RIFF is too small."""
    form = form + bytes(len(form) % 2)
    chunk = b"fmt " + struct.pack(order + "I", len(form)) + form
    if size + len(chunk) + 20 < 2**32:
        outer = struct.pack(order + "I", size + size % 2 + len(chunk) + 12)
        tag = b"RIFF" if order == "<" else b"RIFX"
        return tag + outer + b"WAVE" + chunk + b"data" + struct.pack(order + "I", size)
    lengths = struct.pack("<QQQI", size + len(chunk) + 48, size, 0, 0)
    unknown = b"\xff" * 4
    return b"RF64" + unknown + b"WAVEds64" + struct.pack("<I", 28) + lengths + chunk + b"data" + unknown


def _no_format(file: Opened) -> Corrupt:
    return Corrupt(f"{file.name}: its data chunk comes before its format chunk. Export it again.")


def no_audio_data(file: Opened) -> Truncated:
    """The error for a recording without any audio."""
    return Truncated(f"{file.name}: ends before its audio data starts. Copy or download it again.")
