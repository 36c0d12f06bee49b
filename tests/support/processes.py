"""What tests and benchmarks share: free ports, folders of hard links, process trees and their memory, the machine."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from pipeline.audio.load import EXTENSIONS
from pipeline.storage.files import local_path, scan

ROOT = Path(__file__).resolve().parents[2]
HOST = "127.0.0.1"


def free_port() -> int:
    """A port of ``HOST`` that nobody listens on now."""
    with socket.socket() as free:
        free.bind((HOST, 0))
        return int(free.getsockname()[1])


def linked_folder(source: Path, folder: Path, n: int) -> Path:
    """``folder`` with ``n`` recordings: links to those in ``source``, over and over, 1,000 a sub-folder."""
    recordings = [Path(local_path(text)) for text in scan(source, EXTENSIONS).files]
    if not recordings:
        raise SystemExit(f"no recordings in {source}; give --data_dir a folder of recordings")
    for i in range(n):
        original = recordings[i % len(recordings)]
        path = folder / f"{i // 1000:03d}" / f"{i:06d}{original.suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(original, path)
        except OSError:
            shutil.copyfile(original, path)
    return folder


def machine() -> str:
    """Processor, CPUs, memory and versions."""
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory_kib = next(int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal"))
    versions = ", ".join(f"{name} {version(name)}" for name in ("ray", "torch", "onnxruntime", "librosa"))
    processor = names[0] if names else platform.machine()
    python = f"Python {platform.python_version()}"
    return f"{processor}, {os.cpu_count()} CPUs, {memory_kib / 2**20:.0f} GiB; {python}, {versions}"


def descendants(pid: int) -> list[int]:
    """Processes that ``pid`` started, and those that they started."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and (stat := _text(entry / "stat")):
            parents.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry.name))
    found = list(parents.get(pid, []))
    for child in found:
        found += parents.get(child, [])
    return found


LOOPBACK = {
    "0100007F",  # 127.0.0.1
    "0000000000000000FFFF00000100007F",  # ::ffff:127.0.0.1
    "00000000000000000000000001000000",  # ::1
}


def listeners(pid: int) -> set[tuple[str, int]]:
    """(address, port) of each TCP socket on which a process or what it started listens; addresses as in /proc."""
    inodes = set()
    for member in (pid, *descendants(pid)):
        try:
            inodes |= {os.readlink(link) for link in Path(f"/proc/{member}/fd").iterdir()}
        except OSError:
            continue
    found = set()
    for table in ("tcp", "tcp6"):
        for line in _lines(f"/proc/net/{table}")[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                address, port = fields[1].split(":")
                found.add((address, int(port, 16)))
    return found


def command_of(pid: int) -> str:
    """Its command line, spaces between the words; empty when it has ended."""
    return _text(Path(f"/proc/{pid}/cmdline")).replace("\0", " ").strip()


def finish(process: subprocess.Popen[str], deadline_s: float) -> None:
    """Wait for a command; end this one when it failed, or took too long and was killed."""
    try:
        _, error = process.communicate(timeout=deadline_s)
    except subprocess.TimeoutExpired as late:
        process.kill()
        raise SystemExit(
            f"a run was not done within {deadline_s:.0f} s; is the machine busy? See --deadline_s"
        ) from late
    if process.returncode:
        raise SystemExit(f"the command ended with {process.returncode}:\n{error}")


def resident_bytes(pid: int) -> int:
    """Memory of one process that is in RAM and not backed by a shared file or shared memory."""
    for line in _lines(f"/proc/{pid}/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and of all that it started and that still run."""
    ticks = 0
    for member in (pid, *descendants(pid)):
        fields = _text(Path(f"/proc/{member}/stat")).rpartition(")")[2].split()
        ticks += sum(map(int, fields[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


@contextmanager
def sampled(measure: Callable[[], float], every_s: float = 0.25) -> Iterator[list[float]]:
    """A list whose only item becomes the largest value that ``measure`` had inside the block."""
    peak = [measure()]

    def look() -> None:
        peak[0] = max(peak[0], measure())

    with watched(look, every_s):
        yield peak


@contextmanager
def watched(look: Callable[[], None], every_s: float) -> Iterator[None]:
    """Call ``look`` again and again inside the block, in a thread."""
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(every_s):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _lines(path: str) -> list[str]:
    return _text(Path(path)).splitlines()
