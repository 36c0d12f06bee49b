"""Decodes a suspicious recording in a process of its own, so that a decoder crash costs only this recording.

Method: a new Python process gets the recording (its path, or its bytes) on stdin. It answers on stdout with one line
of JSON and the samples of its clips; nothing is pickled. If the process dies, `DecoderCrashed` is raised. If it does
not answer in time, it is killed and `DecodeTimeout` is raised. An `AudioError` in it is raised here unchanged.
Limits: the new process costs about 0.3 s a recording; do not use it for the first try of every recording.
"""

from __future__ import annotations

import base64
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any, overload

import numpy as np

from pipeline.audio.load import AudioInfo, Clip, Reading, load_middle
from pipeline.audio.source import AudioSource, Segment, name_of
from pipeline.storage.errors import ERRORS, AudioError, DecoderCrashed, DecodeTimeout, Limits

_CHILD = "from pipeline.audio.isolated import answer; answer()"
_NO_SAMPLES = np.empty(0, np.float32)


@overload
def decode_in_subprocess(
    source: AudioSource, *, timeout_s: float = ..., decode: Callable[..., Reading], **options: Any
) -> Reading: ...
@overload
def decode_in_subprocess(
    source: AudioSource, *, timeout_s: float = ..., decode: Callable[..., Clip] = ..., **options: Any
) -> Clip: ...
def decode_in_subprocess(
    source: AudioSource, *, timeout_s: float = 30.0, decode: Callable[..., Clip | Reading] = load_middle, **options: Any
) -> Clip | Reading:
    """The result of `decode(source, **options)`, run in a process of its own.

    Args:
        source: path or bytes of a recording, or a segment of one.
        timeout_s: seconds until the process is killed.
        decode: `load_middle`, `load`, `load_once`, or another top-level function of an importable module.
        options: its keyword arguments (numbers, strings, lists of them, `limits`).

    Raises:
        DecoderCrashed: the process died. DecodeTimeout: it was killed. AudioError: what `decode` raised.
    """
    recording = source.recording if isinstance(source, Segment) else source
    data = bytes(recording) if isinstance(recording, (bytes, bytearray, memoryview)) else b""
    path = "" if isinstance(recording, (bytes, bytearray, memoryview)) else os.fspath(recording)
    name = name_of(source)
    question = {
        "decode": [decode.__module__, decode.__qualname__],
        "path": base64.b64encode(os.fsencode(path)).decode(),
        "segment": [source.start_s, source.end_s] if isinstance(source, Segment) else None,
        "options": {key: asdict(value) if isinstance(value, Limits) else value for key, value in options.items()},
    }
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}
    try:
        child = subprocess.run(
            [sys.executable, "-c", _CHILD],
            input=json.dumps(question).encode() + b"\n" + data,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=timeout_s,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise DecodeTimeout(f"{name}: not decoded within {timeout_s:g} s. Leave it out, or export it again.") from error
    if child.returncode != 0 or b"\n" not in child.stdout:
        raise DecoderCrashed(f"{name}: its decoder {_death(child.returncode)}. Leave it out, or export it again.")
    return _read_answer(child.stdout)


def answer() -> None:
    """Run in the child process: read the request on stdin, write the answer on stdout."""
    with suppress(ImportError):  # Windows has no such module
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # no core dump if a decoder crashes
    reply = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # output printed by decoders must not mix with the answer
    question = json.loads(sys.stdin.buffer.readline())
    options = question["options"]
    if "limits" in options:
        options["limits"] = Limits(**options["limits"])
    module, name = question["decode"]
    recording = os.fsdecode(base64.b64decode(question["path"])) or sys.stdin.buffer.read()
    source = recording if question["segment"] is None else Segment(recording, *question["segment"])
    try:
        decoded: Clip | Reading = getattr(importlib.import_module(module), name)(source, **options)
        clips = (decoded,) if isinstance(decoded, Clip) else decoded.clips
        header: dict[str, Any] = {"hash": None if isinstance(decoded, Clip) else decoded.content_hash}
        header["clips"] = [
            asdict(replace(clip, samples=_NO_SAMPLES)) | {"samples": len(clip.samples)} for clip in clips
        ]
    except AudioError as error:
        header, clips = {"code": error.code, "message": str(error)}, ()
    with reply:
        reply.write(json.dumps(header).encode() + b"\n")
        for clip in clips:
            reply.write(clip.samples.tobytes())


def _read_answer(stdout: bytes) -> Clip | Reading:
    line, _, samples = stdout.partition(b"\n")
    header = json.loads(line)
    if "code" in header:
        raise ERRORS[header["code"]](header["message"])
    clips, rest = [], np.frombuffer(bytearray(samples), np.float32)
    for values in header["clips"]:
        part, rest = rest[: values["samples"]], rest[values["samples"] :]
        clips.append(Clip(**values | {"info": AudioInfo(**values["info"]), "samples": part}))
    return clips[0] if header["hash"] is None else Reading(tuple(clips), header["hash"])


def _death(return_code: int) -> str:
    if return_code < 0:
        return f"ended the process with {signal.Signals(-return_code).name}"
    return f"ended the process with status {return_code}"
