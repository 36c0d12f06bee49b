"""Which recordings are taken: endings for folder scans, the codecs that FFmpeg may decode, and what other files are.

A file's ending only says whether a folder scan takes it; what it is, its content decides (``audio_headers``).
Sources: the endings that FFmpeg's, libsndfile's and SoX's documentation name for their formats; libmagic's "magic"
files for the beginnings of other files; the Git LFS specification (v1) for its pointers.
"""

from __future__ import annotations

SNDFILE = "WAV, RF64, W64, AIFF, CAF, AU, SPHERE, FLAC, OGG (Vorbis, Opus) and MP3"
ACCEPTED = f"{SNDFILE}, and through FFmpeg m4a, mp4, 3gp, mov, webm, mkv, AAC, AMR, WMA, AVI, Speex and more"
REMEDY = "Convert it, for example: ffmpeg -i IN -c:a pcm_s16le OUT.wav"

_ENDINGS = {
    "libsndfile": "wav wave rf64 bwf w64 aif aiff aifc caf au snd sph nist flac ogg oga opus mp3 mpga",
    "mp4": "m4a m4b m4r m4v mp4 mov qt 3gp 3ga 3gpp 3g2",
    "matroska": "webm weba mka mkv",
    "asf": "wma wmv asf",
    "ogg": "spx ogv ogx",
    "more": "aac adts amr awb avi flv mp2 mpa ac3 eac3 gsm wv tta ape mpc ts mts mpg mpeg voc loas ra rm",
}
EXTENSIONS = frozenset(f".{ending}" for endings in _ENDINGS.values() for ending in endings.split())
"""Endings, each with its dot, that a folder scan takes for recordings."""
USUAL_ENDINGS = ".wav, .flac, .mp3, .ogg, .m4a, .webm or the like (docs/formats.md lists all)"

_SPEECH = (
    "amrnb amrwb libopencore_amrnb libopencore_amrwb speex gsm gsm_ms g722 g723_1 g726 g726le g729 ilbc qcelp evrc"
)
_MUSIC = "aac aac_latm mp1float mp2float mp3float mp1 mp2 mp3 opus libopus vorbis flac alac ac3 eac3 wavpack tta ape"
_OLDER = "wmav1 wmav2 wmapro wmalossless wmavoice mpc7 mpc8 truespeech nellymoser qdm2 sipr cook mace3 mace6"
CODECS = frozenset(f"{_SPEECH} {_MUSIC} {_OLDER} real_144 real_288".split())

_OTHERS = (
    (
        b"version https://git-lfs",
        "a Git LFS pointer instead of the recording itself. Run git lfs pull in its repository",
    ),
    (
        b"version https://hawser",
        "a Git LFS pointer instead of the recording itself. Run git lfs pull in its repository",
    ),
    (b"/annex/objects/", "a git-annex pointer instead of the recording itself. Run git annex get in its repository"),
    (b"<!doctype html", "a web page saved in its place. Download it again, perhaps after signing in"),
    (b"<html", "a web page saved in its place. Download it again, perhaps after signing in"),
    (b"<?xml", "an XML document; servers answer so when they refuse. Download it again"),
    (b"{", "a JSON document; servers answer so when they refuse. Download it again"),
    (b"pk\3\4", "a ZIP archive. Unpack it"),
    (b"\x1f\x8b", "compressed with gzip. Unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive. Unpack it"),
    (b"rar!", "a RAR archive. Unpack it"),
    (b"#extm3u", "a playlist. Give the recordings that it names"),
    (b"mthd", "MIDI: notes, not sound. Render it to WAV"),
)


def is_accepted(codec: str) -> bool:
    """Whether FFmpeg may decode this codec (its decoder's name)."""
    return codec in CODECS or codec.startswith(("pcm_", "adpcm_"))


def what_else(head: bytes) -> str:
    """What a file that is no recording is, by its first 64 bytes, and what to do about it: the end of a sentence."""
    beginning = head.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n").lower()
    for magic, told in _OTHERS:
        if beginning.startswith(magic):
            return f"{told}."
    if head and all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head):
        return f"it holds text. Accepted are {ACCEPTED}."
    return f"no kind of recording that is known here. Accepted are {ACCEPTED}."
