"""A decoder that crashes or hangs costs one recording; silence of any length costs little memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from audio_recordings import ONE_SECOND, code_of, encoded, same_clip, voice

from pipeline.audio import load as audio
from pipeline.audio.isolated import decode_in_subprocess
from pipeline.audio.load import Limits, content_hash, load, load_middle, load_once
from tests.support.recordings import encode_av


def test_the_subprocess_gives_the_same_clip(tmp_path: Path) -> None:
    path, limits = tmp_path / "\udcffodd\n.flac", Limits(max_duration_s=5)
    path.write_bytes(encoded(voice(3.0, 44_100), 44_100, "FLAC"))
    here = load_middle(path, window_s=1.5, limits=limits)
    assert same_clip(decode_in_subprocess(path, window_s=1.5, limits=limits), here)
    part = decode_in_subprocess(path.read_bytes(), decode=load, start_s=1.0, duration_s=0.5, channel=0)
    assert same_clip(part, load(path, start_s=1.0, duration_s=0.5))
    once = decode_in_subprocess(path, decode=load_once, windows_s=[1.5, 6.0, 0.1], limits=limits)
    assert once.content_hash == content_hash(path)
    for clip, window_s in zip(once.clips, (1.5, 6.0, 0.1), strict=True):
        assert same_clip(clip, load_middle(path, window_s=window_s))
    speech = decode_in_subprocess(path, decode=load_once, windows_s=[1.5], window="speech")
    assert same_clip(speech.clips[0], load_middle(path, window_s=1.5, window="speech"))
    assert code_of(ONE_SECOND[:999], decode_in_subprocess) == "truncated"
    assert code_of(ONE_SECOND[:999], decode_in_subprocess, decode=load_once, windows_s=[1.0]) == "truncated"
    assert code_of(path, decode_in_subprocess, limits=Limits(max_duration_s=2)) == "too_long"


HOSTILE = """
import os, threading
def abort(source, **options):
    os.abort()
def leave(source, **options):
    os._exit(0)
def fail(source, **options):
    raise MemoryError('no')
def hang(source, **options):
    threading.Event().wait()
"""


@pytest.mark.parametrize(
    ("decoder", "code", "message"),
    [
        ("abort", "decoder_crashed", "SIGABRT"),
        ("leave", "decoder_crashed", "status 0"),
        ("fail", "decoder_crashed", "status 1"),
        ("hang", "decode_timeout", "within 1 s"),
    ],
)
def test_a_decoder_that_ends_its_process_costs_one_recording(
    decoder: str, code: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hostile_decoders.py").write_text(HOSTILE)
    monkeypatch.syspath_prepend(tmp_path)
    decode = SimpleNamespace(__module__="hostile_decoders", __qualname__=decoder)
    timeout_s = 1.0 if decoder == "hang" else 60.0
    with pytest.raises(audio.AudioError, match=message) as caught:
        decode_in_subprocess(b"anything", decode=decode, timeout_s=timeout_s)  # type: ignore[arg-type]
    assert caught.value.code == code


PEAK = r"""
import re, sys
from pipeline.audio.load import *
def peak_mib():
    return int(re.search(r'VmHWM:\s+(\d+)', open('/proc/self/status').read())[1]) / 1024
"""
LONG = """
long, short = sys.argv[1:]
content_hash(short), load_once(short, windows_s=[2.0, 6.0])
before = peak_mib()
probe(long), load_middle(long), content_hash(long), load(long, start_s=600, duration_s=2)
load_once(long, windows_s=[2.0, 6.0])
print(peak_mib() - before)
"""
EACH = """
for path in sys.argv[1:]:
    try:
        load_middle(path)
    except AudioError:
        pass
    print(peak_mib())
"""


def printed(script: str, *paths: Path) -> list[float]:
    """The numbers that a process of its own prints."""
    root = Path(audio.__file__).parents[2]
    command = [sys.executable, "-c", PEAK + script, *map(str, paths)]
    output = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    return [float(line) for line in output.split()]


def test_twenty_minutes_of_silence_take_little_memory(tmp_path: Path) -> None:
    short, path = tmp_path / "short.wav", tmp_path / "silence.flac"
    short.write_bytes(ONE_SECOND)
    with soundfile.SoundFile(path, "w", 48_000, 1, "PCM_16", format="FLAC") as file:
        for _ in range(20):
            file.write(np.zeros(60 * 48_000, np.int16))
    assert path.stat().st_size < 400_000
    assert printed(LONG, path, short)[0] < 64


def test_forged_sizes_in_headers_take_little_memory(tmp_path: Path) -> None:
    """FFmpeg allocates, and clears, what a codec's own header says that it needs, before it reads it."""
    huge = (0x7000_0000).to_bytes(4, "big")
    wav = encoded(voice(0.5, 8_000), 8_000, "WAV", "GSM610")
    caf = encoded(voice(0.5, 44_100), 44_100, "CAF", "ALAC_16")
    tta = encode_av(voice(0.5, 44_100), 44_100, "tta", "tta")
    asf = encode_av(voice(0.5, 44_100), 44_100, "asf", "wmav2")
    at = asf.index(bytes.fromhex("9107dcb7b7a9cf118ee600c00c205365")) + 16 + 8 + 16 + 16 + 8  # its stream properties
    forged = {
        "fmt.wav": wav[:16] + huge[::-1] + wav[20:],
        "kuki.caf": caf[: caf.index(b"kuki") + 8] + huge + caf[caf.index(b"kuki") + 12 :],
        "length.tta": tta[:14] + b"\xff\xff\xff\x7f" + tta[18:],
        "type.asf": asf[:at] + huge[::-1] + asf[at + 4 :],
    }
    for name, data in forged.items():
        (tmp_path / name).write_bytes(data)
    peaks = printed(EACH, *(tmp_path / name for name in forged))
    assert [peak < 300 for peak in peaks] == [True] * len(forged)
