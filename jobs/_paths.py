"""Rewrites the arguments of a job for the cluster: which paths are uploaded, which are on the shared storage.

Absolute paths and object-store URIs stay unchanged. A relative path of a file or model that exists here is uploaded.
Every other relative path, such as that of the results, is placed below the storage path.
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
MODELS = ("--model_weights", "--recipe", "--compare")
INPUTS = (*TABLES, *MODELS, "--data_dir", "--features", "--root", "--split_csv", "--folds_csv")


@dataclass
class Placed:
    """The job's arguments on the cluster, and the uploads: path in the upload -> local file or folder."""

    words: list[str]
    shipped: dict[str, Path] = field(default_factory=dict)


def read_words(parser: Parser, words: Sequence[str]) -> argparse.Namespace:
    """Parse a job's arguments as the job itself would, but accept no shortened options."""
    parser.allow_abbrev = False
    return parser.parse_args(list(words))


def place(job: str, words: Sequence[str], arguments: argparse.Namespace, storage: Path | None) -> Placed:
    """Rewrite every path in the arguments of a job: ``words``, which ``read_words`` parsed into ``arguments``.

    ``storage`` is the absolute folder that all nodes share; a relative path that needs it, if it is None, is refused.
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
    if getattr(arguments, "out_below", None) and arguments.out is None:  # else it would be in a node's temporary folder
        placed.words += ["--out", _placed("--out", dated(arguments.out_below), storage, placed)]
    if job in ("score", "evaluate") and arguments.model_weights is None and not getattr(arguments, "compare", None):
        _ship(placed, DEFAULT_BUNDLE, "models/" + DEFAULT_BUNDLE.name)
    for model in filter(Path.is_dir, placed.shipped.values() if job in ("score", "evaluate") else ()):
        ensure_onnx(load_bundle(model))  # export once here instead of on every node
    return placed


def _placed(option: str, value: str, storage: Path | None, placed: Placed) -> str:
    """The value of ``option`` for the cluster."""
    if option not in RESULTS and option not in INPUTS:
        return value
    if is_remote(value) or value.startswith("file://") or PurePosixPath(value).is_absolute():
        return value
    here = Path(value)
    if option in INPUTS and (here.is_file() or (here / "config.json").is_file()):
        return _ship(placed, here, _upload_name(here))
    if storage is None:
        raise SerError(
            f"{option} {value} is a relative path; give --storage_path, a folder that all nodes share, or an absolute "
            "path"
        )
    return str(storage / value)


def _upload_name(path: Path) -> str:
    """Path in the upload: the path as given, or its name in ``inputs`` if it contains ``..``."""
    return str(PurePosixPath("inputs", path.name) if ".." in path.parts else PurePosixPath(path))


def _ship(placed: Placed, source: Path, name: str) -> str:
    """Add a file or model to the uploads; returns its path on the cluster."""
    if source.suffix == ".pt":
        return f"{_ship(placed, source.parent, str(PurePosixPath(name).parent))}/{source.name}"
    placed.shipped[name] = source
    return name


def _add_root(arguments: argparse.Namespace, storage: Path | None, placed: Placed) -> None:
    """Add ``--root`` for the relative paths in an uploaded CSV: the CSV's folder, below the storage path."""
    for option in TABLES:
        value = getattr(arguments, option[2:], None)
        name = None if value is None else _upload_name(Path(value))
        if name is None or name not in placed.shipped or getattr(arguments, "root", None) is not None:
            continue
        if storage is None:
            raise SerError(
                f"{option} {value} is uploaded, but its recordings are not; give --root, the folder on the nodes that "
                "relative paths in it start from (--root / if all paths are absolute)"
            )
        placed.words += ["--root", str(storage / PurePosixPath(name).parent)]
