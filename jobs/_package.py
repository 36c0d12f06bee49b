"""The upload of a job: the project's code, and only those files that the job's arguments name."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
CODE = ("pipeline", "jobs", "serve")
_KINDS = (".py", ".yaml", ".typed", ".html", ".css", ".js", ".j2", ".jinja", ".md")
_MIB = 2**20


def pack(folder: Path, shipped: Mapping[str, Path]) -> int:
    """Copy the code and ``shipped`` (path in the upload -> local file or folder) into ``folder``; returns its bytes.

    From a folder only the model's files are copied: a run's folder also holds features and checkpoints.
    """
    for package in CODE:
        for path in sorted((PROJECT / package).rglob("*")):
            if path.is_file() and path.suffix in _KINDS and "__pycache__" not in path.parts:
                _copy(path, folder / path.relative_to(PROJECT))
    for name, source in shipped.items():
        for path in _model_files(source) if source.is_dir() else [source]:
            _copy(path, folder / name / path.name if source.is_dir() else folder / name)
    return sum(_sizes(folder).values())


def _model_files(bundle: Path) -> Iterable[Path]:
    """The files of a model bundle, without the training checkpoint."""
    kept = (".json", ".md", ".csv", ".onnx", ".pt")
    return [path for path in sorted(bundle.iterdir()) if path.suffix in kept and path.name != "checkpoint.pt"]


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of all code files together, and of each other file, largest first."""
    sizes: dict[str, int] = {}
    for path in filter(Path.is_file, folder.rglob("*")):
        relative = path.relative_to(folder)
        name = "code" if relative.parts[0] in CODE else str(relative)
        sizes[name] = sizes.get(name, 0) + path.stat().st_size
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def largest(folder: Path) -> str:
    """The three largest parts of the upload, as ``name size MiB, ...``."""
    return ", ".join(f"{name} {size / _MIB:.1f} MiB" for name, size in list(_sizes(folder).items())[:3])


def describe(folder: Path) -> str:
    """One line about the upload: its size and its largest parts."""
    sizes = _sizes(folder)
    more = f" and {len(sizes) - 3} smaller files" if len(sizes) > 3 else ""
    return f"{sum(sizes.values()) / _MIB:.1f} MiB ({largest(folder)}{more})"
