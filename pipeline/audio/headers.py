"""Detects the container of a recording and checks its header, before any decoder reads it.

Method: the container is recognised by the first bytes after tags and zeros, never by the file's name. Its chunks are
read, and the codec decides which library decodes it: libsndfile where it can, else FFmpeg (codecs in `source.CODECS`).
Sources: Apple AIFF-C and CAF specifications, Sun AU, NIST SPHERE, RFC 9639 (FLAC), RFC 3533 and 7845 (Ogg, Opus),
ISO/IEC 11172-3 (MPEG audio), ID3v2.4, APEv2. WAV is in `wav`, lengths are in `lengths` and `streams`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.audio.lengths import asf_end, audio_bytes, avi_end, left_open, mp4_end, next_flac, webm_end
from pipeline.audio.source import REMEDY, Opened, Splice, what_else
from pipeline.audio.streams import amr_end, check_adts, id3_bytes, mp3_length, mpeg_start, ogg_link
from pipeline.audio.wav import W64_RIFF, Wav, look_at_w64, look_at_wav, no_audio_data
from pipeline.storage.errors import Corrupt, NotAudio, Truncated, UnsupportedFormat
from pipeline.storage.files import printable

_AIFF_CODECS = set(b"NONE sowt twos fl32 FL32 fl64 FL64 ulaw ULAW alaw ALAW in24 in32".split()) | {b"raw "}
_CAF_CODECS = {b"lpcm", b"ulaw", b"alaw"}
_AU_CODECS = {1: "mu-law", 2: "PCM", 3: "PCM", 4: "PCM", 5: "PCM", 6: "float", 7: "double", 27: "A-law"}
_AU_G726 = {23, 25, 26}
_OGG_CODECS = (b"\x01vorbis", b"OpusHead")
_MAX_CHUNKS = 4096
_ZEROS_BYTES = 2**24  # at most, before an MP3
_MAX_TAGS = 64
_SEARCHED_BYTES = 2**23


@dataclass(frozen=True)
class Container:
    """A recognised recording and how to decode it."""

    name: str
    whole: Opened  # from the start of the recording, after tags
    demuxer: str | None = None  # FFmpeg's name for it; None if libsndfile reads it
    splice: Splice | None = None  # bytes to decode in place of a part of the file, for example a correct header
    last_page_frames: int = 0  # samples per channel on the last Ogg page
    length: int = 0  # bytes of `whole` before another recording begins; 0 if none does
    gain: float = 1.0  # factor to multiply the samples with

    @property
    def file(self) -> Opened:
        """The recording's own bytes."""
        return self.whole.part(0, self.length) if self.length else self.whole


def inspect(file: Opened) -> Container:
    """Detect the container and check its header. Raises `AudioError` for a file that no decoder should get."""
    start = _behind_tags(file)
    if start >= file.size_bytes:
        zeros = file.bytes_at(0, 1) == b"\0"
        kind, what = (NotAudio, "it holds zeros only") if zeros else (Truncated, "nothing follows its tag")
        raise kind(f"{file.name}: {what}. Copy or download it again.")
    rest = file.part(start, file.size_bytes) if start else file
    head = rest.bytes_at(0, 64)
    container = _tell_uncompressed(rest, head) or _tell_compressed(rest, head)
    if container is None:
        raise NotAudio(f"{file.name}: not an audio file: {what_else(head)}")
    return container


def _tell_uncompressed(file: Opened, head: bytes) -> Container | None:
    tag, kind = head[:4], head[8:12]
    if tag in (b"RIFF", b"RIFX", b"RF64", b"BW64") and kind == b"WAVE":
        found = look_at_wav(file, ">" if tag == b"RIFX" else "<")
        return _of_wav("RF64" if tag in (b"RF64", b"BW64") else "WAV", file, found)
    if head[:16] == W64_RIFF:
        return _of_wav("W64", file, look_at_w64(file))
    if tag == b"RIFF" and kind == b"AVI ":
        return Container("AVI", file, "avi", length=avi_end(file))
    if tag == b"FORM" and kind in (b"AIFF", b"AIFC"):
        return _look_at_aiff(file)
    if tag == b"caff":
        return _look_at_caf(file)
    if tag in (b".snd", b"dns."):
        return _look_at_au(file, head, order=">" if tag == b".snd" else "<")
    if head[:8] == b"NIST_1A\n":
        return _look_at_sphere(file)
    if head[:19] == b"Creative Voice File":
        return Container("VOC", file, "voc")
    return None


def _of_wav(name: str, file: Opened, found: Wav) -> Container:
    demuxer = None if found.sndfile else "wav"
    return Container(name, file, demuxer, found.splice, length=_joined_at(file, found.end), gain=found.gain)


def _tell_compressed(file: Opened, head: bytes) -> Container | None:
    if head[:4] == b"OggS":
        return _look_at_ogg(file)
    if head[:4] == b"fLaC":
        unknown = not (head[21:22] or b"\1")[0] & 0x0F and head[22:26] == bytes(4)  # its number of samples
        searched = unknown or file.size_bytes <= _SEARCHED_BYTES  # larger files: searched by `SndfileDecoder`
        return Container("FLAC", file, length=next_flac(file, 4) if searched else 0)
    if head[:5] == b"#!AMR":
        return Container("AMR", file, "amr", length=amr_end(file, head))
    if head[:4] == b"\x1aE\xdf\xa3":
        return Container("WebM", file, "matroska", length=webm_end(file))
    for magic, name, demuxer, end in _BY_MAGIC:
        if head.startswith(magic):
            return Container(name, file, demuxer, length=end(file) if end else 0)
    if (length := mp4_end(file, head)) is not None:
        return Container("MP4", file, "mov", length=length)
    if len(head) >= 2 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0:
        check_adts(file)
        return Container("AAC", file, "aac")
    if len(head) >= 3 and head[0] == 0x56 and head[1] & 0xE0 == 0xE0 and _is_loas(file, head):
        return Container("AAC", file, "loas")
    if len(head) >= 2 and head[0] == 0xFF and head[1] & 0xE6 in (0xE4, 0xE6):
        return Container("MPEG audio", file, "mp3")  # layers I and II
    if head[:1] == file.bytes_at(188, 1) == file.bytes_at(376, 1) == b"\x47":
        return Container("MPEG-TS", file, "mpegts")
    if _is_gsm(file):
        return Container("GSM", file, "gsm")
    if (start := mpeg_start(file)) is not None:
        file = file.part(start, file.size_bytes) if start else file
        xing = mp3_length(file, 0)
        return Container("MP3", file, "mp3") if xing.joined else Container("MP3", file, splice=xing.splice)
    return None


_BY_MAGIC: tuple[tuple[bytes, str, str, Callable[[Opened], int] | None], ...] = (
    (bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c"), "ASF", "asf", asf_end),
    (b"FLV\x01", "FLV", "flv", None),
    (b"wvpk", "WavPack", "wv", None),
    (b"TTA1", "TTA", "tta", None),
    (b"MAC ", "Monkey's Audio", "ape", None),
    (b".RMF", "RealMedia", "rm", None),
    (b".ra\xfd", "RealMedia", "rm", None),
    (b"MPCK", "Musepack", "mpc8", None),
    (b"MP+", "Musepack", "mpc", None),
    (b"\x0b\x77", "AC-3", "ac3", None),
    (b"\0\0\1\xba", "MPEG", "mpeg", None),
)


def _behind_tags(file: Opened) -> int:
    """Offset of the recording: after ID3v2 and APEv2 tags, and zeros before an MP3."""
    start = 0
    for _ in range(_MAX_TAGS):
        head = file.bytes_at(start, 32)
        if head[:3] == b"ID3":
            if len(head) < 10:
                raise Truncated(f"{file.name}: {len(head)} bytes of an ID3 tag. Copy or download it again.")
            start += id3_bytes(head)
        elif head[:8] == b"APETAGEX" and len(head) == 32:
            start += 32 + int.from_bytes(head[12:16], "little")  # its length counts the footer
        elif head[:16] == bytes(16):
            start = _first_not_zero(file, start)
        else:
            return start
    raise Corrupt(f"{file.name}: more than {_MAX_TAGS} tags before its audio. Export it again.")


def _first_not_zero(file: Opened, start: int) -> int:
    end = min(start + _ZEROS_BYTES, file.size_bytes)
    for position in range(start, end, 2**16):
        data = file.bytes_at(position, min(2**16, end - position))
        if rest := data.lstrip(b"\0"):
            return position + len(data) - len(rest)
    return end


def _joined_at(file: Opened, end: int) -> int:
    """Offset of another recording of this kind at `end` or up to 7 pad bytes later; 0 if there is none."""
    magic = file.bytes_at(0, 4)
    return next((place for place in range(end, end + 8) if file.bytes_at(place, 4) == magic), 0)


def _look_at_aiff(file: Opened) -> Container:
    position, frame_bytes, demuxer = 12, 1, None
    outer_end = 8 + int.from_bytes(file.bytes_at(4, 4), "big")
    for _ in range(_MAX_CHUNKS):
        header = file.bytes_at(position, 8)
        if len(header) < 8:
            break
        name, size = header[:4], int.from_bytes(header[4:], "big")
        if name == b"COMM":
            body = file.bytes_at(position + 8, min(size, 22))
            if len(body) < 18:
                raise Truncated(f"{file.name}: its COMM chunk is cut off. Export it again.")
            channels, _, bits = struct.unpack(">HIH", body[:8])
            if file.bytes_at(8, 4) == b"AIFC" and body[18:22] not in _AIFF_CODECS:
                demuxer = "aiff"
            frame_bytes = max(channels * -(-bits // 8), 1)
        elif name == b"SSND":
            start, declared = position + 16, max(size - 8, 0)
            if declared == 0 and left_open(file, start, ">"):
                declared = 2**32 - 1
            real = audio_bytes(file, start, declared, frame_bytes, outer_end=outer_end)
            splice = None if real == size - 8 else Splice(position + 4, 4, (real + 8).to_bytes(4, "big"))
            length = _joined_at(file, start + real) if splice is None else 0
            return Container("AIFF", file, demuxer, splice, length=length)
        position += 8 + size + size % 2
    raise no_audio_data(file)


def _look_at_caf(file: Opened) -> Container:
    """Check a CAF file; repair a length that the recorder did not write (-1, or 0 to 4), which libsndfile refuses."""
    position, demuxer = 8, None
    for _ in range(_MAX_CHUNKS):
        header = file.bytes_at(position, 12)
        if len(header) < 12:
            break
        name, size = header[:4], int.from_bytes(header[4:], "big", signed=True)
        if name == b"desc" and file.bytes_at(position + 20, 4) not in _CAF_CODECS:
            demuxer = "caf"
        elif name == b"data":
            start = position + 12
            open_end = size == -1 or (0 <= size <= 4 and file.size_bytes > start + 4)
            real = file.size_bytes - start if open_end else audio_bytes(file, start, size, streamed=2**62)
            splice = None if real == size else Splice(position + 4, 8, real.to_bytes(8, "big"))
            return Container("CAF", file, demuxer, splice, length=0 if open_end else _joined_at(file, start + real))
        if size < 0:
            break
        position += 12 + size
    raise no_audio_data(file)


def _look_at_au(file: Opened, head: bytes, order: str) -> Container:
    if len(head) < 24:
        raise Truncated(f"{file.name}: {len(head)} bytes of an AU header of 24. Copy or download it again.")
    offset, size, encoding = struct.unpack(order + "III", head[4:16])
    if encoding in _AU_G726:
        return Container("AU", file, "au")
    if encoding not in _AU_CODECS:
        raise UnsupportedFormat(f"{file.name}: AU with encoding {encoding} is not accepted. {REMEDY}")
    real = audio_bytes(file, offset, size or 2**32 - 1)
    splice = None if size else Splice(8, 4, struct.pack(order + "I", min(real, 2**32 - 1)))
    return Container("AU", file, splice=splice, length=_joined_at(file, offset + real) if size else 0)


def _look_at_sphere(file: Opened) -> Container:
    """Check a NIST SPHERE file, whose header is lines of text; the decoder gets an AU header in its place."""
    lines = file.bytes_at(0, 2**16).split(b"\n")
    fields = {words[0]: words[2] for line in lines if len(words := line.decode("latin-1").split(None, 2)) == 3}
    try:
        start, rate_hz = int(lines[1]), round(float(fields["sample_rate"]))
        channels = int(fields.get("channel_count", 1))
        size = int(fields.get("sample_n_bytes", 2))
        coding = fields.get("sample_coding", "pcm").strip()
        big = fields.get("sample_byte_format", "01").strip() != "01"
        declared = int(fields.get("sample_count", 0)) * size * channels
        if not (16 <= start <= 2**16 and 0 < rate_hz < 2**31 and 0 < channels < 2**15 and declared >= 0):
            raise ValueError
    except (KeyError, ValueError, IndexError, OverflowError):
        raise Corrupt(f"{file.name}: its SPHERE header cannot be read. Export it again.") from None
    encoding = {("pcm", size): size + 1, ("ulaw", 1): 1, ("mu-law", 1): 1, ("alaw", 1): 27}.get((coding, size))
    if encoding not in (1, 2, 3, 4, 5, 27):
        remedy = "Convert it, for example: sph2pipe -f wav IN OUT.wav"
        problem = f"SPHERE with {printable(coding[:60])} of {size} bytes is not accepted"
        raise UnsupportedFormat(f"{file.name}: {problem}. {remedy}")
    order = ">" if big or size == 1 else "<"
    real = audio_bytes(file, start, declared or 2**32 - 1, size * channels)
    header = struct.pack(order + "IIIII", 24, min(real, 2**32 - 1), encoding, rate_hz, channels)
    splice = Splice(0, start, (b".snd" if order == ">" else b"dns.") + header)
    return Container("SPHERE", file, splice=splice, length=_joined_at(file, start + real) if declared else 0)


def _look_at_ogg(file: Opened) -> Container:
    link = ogg_link(file)
    length = link.end if link.end < file.size_bytes else 0
    only = len(link.packets) == 1 and link.packets[0].startswith(_OGG_CODECS)
    return Container("OGG", file, None if only else "ogg", None, link.last_page_frames, length)


def _is_loas(file: Opened, head: bytes) -> bool:
    """Whether another frame follows the first, as in the AAC of broadcasts."""
    following = file.bytes_at(3 + ((head[1] & 0x1F) << 8 | head[2]), 2)
    return len(following) == 2 and following[0] == 0x56 and following[1] & 0xE0 == 0xE0


def _is_gsm(file: Opened) -> bool:
    """Whether these are bare GSM 6.10 frames of 33 bytes (telephone systems): each begins with the four bits 0xD."""
    if file.size_bytes < 330:
        return False
    data = file.bytes_at(0, 33 * 512)
    return all(byte >> 4 == 0xD for byte in data[::33])
