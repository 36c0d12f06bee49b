"""Decode mutated recordings of all formats, and count the outcomes.

    python -m benchmarks.fuzz_audio --count 10000

Case i depends on (seed, i) alone: a recording of a random format with one to three mutations. These are bit flips,
overwritten, removed, repeated or inserted ranges, cut heads and tails, header fields with extreme values, and the head
of another file. Every fourth case has a wrong file extension. A child process decodes the cases one after the other;
each must give finite samples or an `AudioError`. The parent starts a new child where one dies or does not answer.
Exit status 0: no crash, no hang, no exception without a code, constant memory. Otherwise 1; --keep saves the files.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import multiprocessing
import platform
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

from pipeline.audio.load import AudioError, Clip, Reading, content_hash, load, load_middle, load_once, probe
from tests.support.recordings import every_format

HANG_CPU_S = 5.0
ANSWER_WITHIN_S = 60.0  # wall time, for a machine with other work
START_WITHIN_S = 600.0
GROWTH_MIB = 16.0
_EXTREMES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFE, 0xFFFF_FFFF)
_FAILURES = ("crash", "hang", "uncoded")
_KINDS = (
    *("flip bits", "flip bits", "overwrite", "overwrite", "forge header", "forge header", "forge header"),
    *("cut tail", "cut head", "remove", "repeat", "insert"),
)

Random = np.random.Generator


class Outcome(NamedTuple):
    """The result of one case."""

    index: int
    name: str
    result: str  # "ok", an error code, or one of `_FAILURES`
    detail: str
    cpu_s: float  # seconds of CPU
    held_mib: float  # memory held after it
    peak_mib: float


def mutated(index: int, seed: int, files: dict[str, bytes]) -> tuple[str, bytes]:
    """Name of the recording that case `index` starts from, and its mutated bytes."""
    rng = np.random.default_rng((seed, index))
    name = sorted(files)[index % len(files)]
    data = bytearray(files[name])
    for _ in range(rng.integers(1, 4)):
        if len(data):
            data = _mutated(data, rng)
    if rng.random() < 0.05:  # the head of this recording, the rest of another
        other = files[sorted(files)[rng.integers(len(files))]]
        cut = int(rng.integers(1, 200))
        data = data[:cut] + other[cut:]
    return name, bytes(data)


def _somewhere(data: bytearray, rng: Random) -> int:
    """A random position, half of the time in the header."""
    end = min(len(data), 200) if rng.random() < 0.5 else len(data)
    return int(rng.integers(end))


def _mutated(data: bytearray, rng: Random) -> bytearray:
    """One mutation of a kind drawn from `_KINDS`."""
    kind = _KINDS[rng.integers(len(_KINDS))]
    if kind == "flip bits":
        for _ in range(rng.integers(1, 33)):
            data[_somewhere(data, rng)] ^= 1 << int(rng.integers(8))
        return data
    if kind == "forge header":  # a field within the first 128 bytes gets an extreme value, in either byte order
        size = int(rng.choice((1, 2, 4, 8)))
        at = int(rng.integers(0, min(len(data), 128)))
        value = int(rng.choice(_EXTREMES)) & (256**size - 1)
        data[at : at + size] = value.to_bytes(size, "little" if rng.random() < 0.5 else "big")
        return data
    at = _somewhere(data, rng)
    match kind:
        case "overwrite":
            end = min(at + int(rng.integers(1, 64)), len(data))
            return data[:at] + rng.bytes(end - at) + data[end:]
        case "cut tail":
            return data[:at]
        case "cut head":
            return data[at:]
        case "remove":
            return data[:at] + data[at + int(rng.integers(1, 2000)) :]
        case "repeat":
            return data[: at + int(rng.integers(1, 2000))] + data[at:]
    return data[:at] + rng.bytes(int(rng.integers(1, 500))) + data[at:]


def decode(index: int, data: bytes, folder: Path) -> str:
    """Decode a recording -> "ok" or the error's code. Other errors are raised; a wrong result is a ValueError."""
    source: bytes | Path = data
    if index % 4 == 3:
        source = folder / f"case{index}.{('wav', 'mp3', 'flac', 'ogg', 'txt', 'm4a')[index // 4 % 6]}"
        source.write_bytes(data)
    once = partial(load_once, windows_s=(2.0, 6.0))
    calls: tuple[Callable[..., object], ...] = (load_middle, load_middle, load_middle, load, content_hash, probe, once)
    call = calls[index // 4 % len(calls)]
    try:
        answer = call(source)
    except AudioError as error:
        return error.code if str(error).isprintable() else _not_as_promised(f"message {str(error)!r}")
    finally:
        if isinstance(source, Path):
            source.unlink()
    clips = answer.clips if isinstance(answer, Reading) else [answer] if isinstance(answer, Clip) else []
    for clip, promised in zip(clips, [(96_000,), (288_000,)], strict=False):
        shape = clip.samples.shape
        if clip.samples.dtype != np.float32 or (call is not load and shape != promised):
            _not_as_promised(f"{clip.samples.dtype} {shape}")
        if not np.isfinite(clip.samples).all():
            _not_as_promised("samples that are not finite")
    return "ok"


def _not_as_promised(got: str) -> NoReturn:
    raise ValueError(f"not as promised: {got}")


def child(answers: Connection, indices: range, seed: int) -> None:
    """Decode the cases of `indices`: None once ready, then one `Outcome` each."""
    warnings.simplefilter("error")
    files = every_format()
    answers.send(None)
    with tempfile.TemporaryDirectory() as folder:
        for index in indices:
            name, data = mutated(index, seed, files)
            started_s, detail = time.process_time(), ""
            try:
                result = decode(index, data, Path(folder))
            except Exception as error:
                result, detail = "uncoded", f"{type(error).__name__}: {error}"
            cpu_s = time.process_time() - started_s
            if cpu_s > HANG_CPU_S:
                result, detail = "hang", f"{cpu_s:.1f} s"
            answers.send(Outcome(index, name, result, detail, cpu_s, _held_mib(), _memory_mib("VmHWM")))


def _held_mib() -> float:
    """Memory in use, after glibc has returned the freed blocks that it keeps; they would look like a leak."""
    c_library = ctypes.CDLL(None)
    if hasattr(c_library, "malloc_trim"):
        c_library.malloc_trim(0)
    return _memory_mib("VmRSS")


def _memory_mib(field: str) -> float:
    """Memory of this process on Linux: VmRSS is the current value, VmHWM the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def run(count: int, seed: int, report: Callable[[Outcome], None]) -> int:
    """Decode all cases and call `report` for each; returns the number of child processes."""
    context = multiprocessing.get_context("spawn")
    children, index = 0, 0
    while index < count:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=child, args=(theirs, range(index, count), seed), daemon=True)
        process.start()
        theirs.close()
        children, ready = children + 1, False
        try:
            while index < count:
                if not ours.poll(ANSWER_WITHIN_S if ready else START_WITHIN_S):
                    report(Outcome(index, "", "hang", f"no answer in {ANSWER_WITHIN_S:g} s", 0.0, 0.0, 0.0))
                    index += 1
                    break
                answer: Outcome | None = ours.recv()
                ready = True
                if answer:
                    report(answer)
                    index = answer.index + 1
        except EOFError:
            process.join()
            report(Outcome(index, "", "crash", f"exit status {process.exitcode}", 0.0, 0.0, 0.0))
            index += 1
        process.kill()
        process.join()
    return children


def print_summary(outcomes: list[Outcome], children: int, seconds: float) -> bool:
    """Print the counts; True where nothing failed."""
    counts = collections.Counter(outcome.result for outcome in outcomes)
    formats = collections.Counter(outcome.name for outcome in outcomes)
    print(f"{len(outcomes)} mutated recordings of {len(formats)} formats in {seconds:.0f} s, {platform.platform()}")
    for result, number in counts.most_common():
        print(f"  {result:20s} {number:6d}")
    for outcome in outcomes:
        if outcome.result in _FAILURES:
            print(f"  case {outcome.index} ({outcome.name}): {outcome.result}, {outcome.detail}")
    measured = [outcome for outcome in outcomes if outcome.held_mib]
    tenth = max(len(measured) // 10, 1)
    before = float(np.median([outcome.held_mib for outcome in measured[tenth : 2 * tenth] or measured]))
    after = float(np.median([outcome.held_mib for outcome in measured[-tenth:]]))
    peak = max(outcome.peak_mib for outcome in measured)
    highest = next(outcome for outcome in measured if outcome.peak_mib == peak)
    slowest = max(measured, key=lambda outcome: outcome.cpu_s)
    print(f"memory held: {before:.0f} MiB after a tenth, {after:.0f} MiB at the end")
    print(f"peak {peak:.0f} MiB, case {highest.index} ({highest.name})")
    print(f"slowest: {slowest.cpu_s:.2f} s of CPU, case {slowest.index} ({slowest.name}); child processes: {children}")
    failures = sum(counts[failure] for failure in _FAILURES)
    print(f"crashes {counts['crash']}, hangs {counts['hang']}, exceptions without a code {counts['uncoded']}")
    return failures == 0 and after - before <= GROWTH_MIB


def main() -> int:
    """Parse the command line, run, print; 0 where nothing failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="number of recordings (default 10000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the recordings that crash, hang or raise without a code")
    args = parser.parse_args()
    outcomes: list[Outcome] = []

    def report(outcome: Outcome) -> None:
        outcomes.append(outcome)
        if len(outcomes) % 500 == 0:
            print(f"{len(outcomes)} of {args.count}", flush=True)
        if outcome.result in _FAILURES and args.keep:
            args.keep.mkdir(parents=True, exist_ok=True)
            name, data = mutated(outcome.index, args.seed, every_format())
            (args.keep / f"case{outcome.index}_{name}").write_bytes(data)

    started_s = time.monotonic()
    children = run(args.count, args.seed, report)
    return 0 if print_summary(outcomes, children, time.monotonic() - started_s) else 1


if __name__ == "__main__":
    raise SystemExit(main())
