"""The words of a job, written for the cluster: which paths are uploaded, which lie on the shared storage.

Absolute paths and object-store URIs stay. Of relative ones, a CSV file or a model that is here is uploaded; everything
else, results first of all, lies below the storage path.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from jobs._common import Parser, dated, underscored
from pipeline.storage.errors import SerError
from pipeline.storage.files import is_remote

RESULTS = ("--out",)
TABLES = ("--data_csv", "--input")
INPUTS = (
    *TABLES,
    "--data_dir",
    "--features",
    "--root",
    "--split_csv",
    "--folds_csv",
    "--model_weights",
    "--recipe",
    "--compare",
)


@dataclass
class Placed:
    """The job's words on the cluster, and what is uploaded: path in the upload -> file or folder here."""

    words: list[str]
    shipped: dict[str, Path] = field(default_factory=dict)


def read_words(parser: Parser, words: Sequence[str]) -> argparse.Namespace:
    """Check the words as the job itself would, but for shortened options.

    Raises:
        SystemExit: words that the job does not understand (said).
    """
    parser.allow_abbrev = False
    return parser.parse_args(list(words))


def place(job: str, words: Sequence[str], arguments: argparse.Namespace, storage: Path | None) -> Placed:
    """Place every path in the words of a job.

    Args:
        arguments: what ``read_words`` made of the words.
        storage: absolute folder that all nodes share.

    Raises:
        SerError: a relative path that has no place on the cluster.
    """
    from pipeline.models.backends import ensure_onnx
    from pipeline.models.bundle import DEFAULT_BUNDLE, load_bundle

    placed = Placed([])
    option = ""
    for word in words:
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            option = underscored(name)
            value = _placed(option, value, storage, placed) if equals else ""
            placed.words.append(f"{option}{equals}{value}")
        else:
            placed.words.append(_placed(option, word, storage, placed))
    _add_root(arguments, storage, placed)
    if getattr(arguments, "out_below", None) and arguments.out is None:  # else made where nobody finds it again
        placed.words += ["--out", _placed("--out", dated(arguments.out_below), storage, placed)]
    if job in ("score", "evaluate") and arguments.model_weights is None and not getattr(arguments, "compare", None):
        _ship(placed, DEFAULT_BUNDLE, "models/" + DEFAULT_BUNDLE.name)
    for model in filter(Path.is_dir, placed.shipped.values() if job in ("score", "evaluate") else ()):
        ensure_onnx(load_bundle(model))  # once here, not once on every node
    return placed


def _placed(option: str, value: str, storage: Path | None, placed: Placed) -> str:
    """Where a value of ``option`` is on the cluster."""
    if option not in RESULTS and option not in INPUTS:
        return value
    if is_remote(value) or value.startswith("file://") or PurePosixPath(value).is_absolute():
        return value
    here = Path(value)
    if option in INPUTS and (here.is_file() or (here / "config.json").is_file()):
        return _ship(placed, here, _upload_name(here))
    if storage is None:
        raise SerError(
            f"{option} {value} is relative; give --storage_path, a folder that all nodes share, or an absolute path"
        )
    return str(storage / value)


def _upload_name(path: Path) -> str:
    """Path in the upload: as it is written, but never above the upload."""
    return str(PurePosixPath("inputs", path.name) if ".." in path.parts else PurePosixPath(path))


def _ship(placed: Placed, source: Path, name: str) -> str:
    """Have a file or a model uploaded; returns its path on the cluster."""
    if source.suffix == ".pt":
        return f"{_ship(placed, source.parent, str(PurePosixPath(name).parent))}/{source.name}"
    placed.shipped[name] = source
    return name


def _add_root(arguments: argparse.Namespace, storage: Path | None, placed: Placed) -> None:
    """Relative recordings of an uploaded CSV start from the storage, as they started from the CSV's folder here."""
    for option in TABLES:
        value = getattr(arguments, option[2:], None)
        name = None if value is None else _upload_name(Path(value))
        if name is None or name not in placed.shipped or getattr(arguments, "root", None) is not None:
            continue
        if storage is None:
            raise SerError(
                f"{option} {value} is uploaded, its recordings are not; give --root, the folder on the nodes that "
                "relative paths in it start from (--root / when all are absolute)"
            )
        placed.words += ["--root", str(storage / PurePosixPath(name).parent)]
