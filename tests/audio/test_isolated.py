"""A decoder that crashes or hangs costs one recording; silence of any length costs little memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from audio_recordings import ONE_SECOND, code_of, encoded, voice

from pipeline.audio import load as audio
from pipeline.audio.isolated import decode_in_subprocess
from pipeline.audio.load import Limits, load, load_middle, load_once
from tests.support.recordings import encode_av


def test_the_subprocess_gives_the_same_clip(tmp_path: Path) -> None:
    path = tmp_path / "\udcffodd\n.flac"
    path.write_bytes(encoded(voice(3.0, 44_100), 44_100, "FLAC"))
    here = load_middle(path, window_s=1.5, limits=Limits(max_duration_s=5))
    there = decode_in_subprocess(path, window_s=1.5, limits=Limits(max_duration_s=5))
    assert np.array_equal(here.samples, there.samples)
    assert (here.info, here.start_s, here.scored_s) == (there.info, there.start_s, there.scored_s)
    part = decode_in_subprocess(path.read_bytes(), decode=load, start_s=1.0, duration_s=0.5, channel=0)
    assert np.array_equal(part.samples, load(path, start_s=1.0, duration_s=0.5).samples)
    assert code_of(ONE_SECOND[:999], decode_in_subprocess) == "truncated"
    once = decode_in_subprocess(path, decode=load_once, windows_s=[1.5, 6.0, 0.1], limits=Limits(max_duration_s=5))
    assert once.content_hash == audio.content_hash(path)
    assert [len(clip.samples) for clip in once.clips] == [72_000, 288_000, 4_800]
    assert np.array_equal(once.clips[0].samples, here.samples)
    assert np.array_equal(once.clips[1].samples, load_middle(path, window_s=6.0).samples)
    assert (once.clips[0].info, once.clips[0].scored_s, once.clips[1].scored_s) == (here.info, 1.5, 3.0)
    assert code_of(ONE_SECOND[:999], decode_in_subprocess, decode=load_once, windows_s=[1.0]) == "truncated"


@pytest.fixture
def hostile_decoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "hostile_decoders.py").write_text(
        "import os, sys, threading\n"
        "def abort(source, **options):\n    os.abort()\n"
        "def leave(source, **options):\n    os._exit(0)\n"
        "def fail(source, **options):\n    raise MemoryError('no')\n"
        "def hang(source, **options):\n    threading.Event().wait()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import hostile_decoders

    yield hostile_decoders
    del sys.modules["hostile_decoders"]


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
    decoder: str, code: str, message: str, hostile_decoders: Any
) -> None:
    timeout_s = 1.0 if decoder == "hang" else 60.0
    with pytest.raises(audio.AudioError, match=message) as caught:
        decode_in_subprocess(b"anything", decode=getattr(hostile_decoders, decoder), timeout_s=timeout_s)
    assert caught.value.code == code


def test_twenty_minutes_of_silence_take_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "silence.flac"
    with soundfile.SoundFile(path, "w", 48_000, 1, "PCM_16", format="FLAC") as file:
        for _ in range(20):
            file.write(np.zeros(60 * 48_000, np.int16))
    assert path.stat().st_size < 400_000
    script = (
        "import re, sys\n"
        "from pipeline.audio.load import content_hash, load, load_middle, load_once, probe\n"
        "def peak():\n    return int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "long, short = sys.argv[1:]\n"
        "content_hash(short), load_once(short, windows_s=[2.0, 6.0])\n"
        "before = peak()\n"
        "probe(long), load_middle(long), content_hash(long), load(long, start_s=600, duration_s=2)\n"
        "load_once(long, windows_s=[2.0, 6.0])\n"
        "print(peak() - before)"
    )
    short = tmp_path / "short.wav"
    short.write_bytes(ONE_SECOND)
    root = Path(audio.__file__).parents[2]
    output = subprocess.run(
        [sys.executable, "-c", script, path, short], cwd=root, capture_output=True, text=True, check=True
    ).stdout
    assert int(output) / 1024 < 64, "MiB"


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
    script = (
        "import re, sys\n"
        "from pipeline.audio import load as audio\n"
        "for path in sys.argv[1:]:\n"
        "    try:\n        audio.load_middle(path)\n"
        "    except audio.AudioError:\n        pass\n"
        "    print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
    )
    for name, data in forged.items():
        (tmp_path / name).write_bytes(data)
    paths = [tmp_path / name for name in forged]
    root = Path(audio.__file__).parents[2]
    output = subprocess.run(
        [sys.executable, "-c", script, *paths], cwd=root, capture_output=True, text=True, check=True
    ).stdout
    assert [int(line) / 1024 < 300 for line in output.split()] == [True] * len(paths)
