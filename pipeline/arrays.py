"""Reading a feature folder: Parquet shards -> memory-mapped arrays, checked before use. No Ray, no torch.

The first read copies the tensors into ``.npy`` files below the folder, so that every later run (and every worker on the
machine) maps the same pages instead of decoding Parquet again.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.errors import SerError
from pipeline.features import FeatureConfig, normalise_power

SHARD_VERSION = 1
MANIFEST = "manifest.json"
NO_CROPS = "several crops need log_mel features with mel power; extract again with --mel_power_s 6, or give --crops 1"


class ShardError(SerError):
    """A feature folder that is missing, incomplete, damaged, or of another configuration."""


@dataclass(frozen=True)
class FeatureArrays:
    """Readable recordings of a feature folder, in ``row_id`` order.

    ``features`` is float32 ``(n, *config.input_shape)``; ``mel_power`` is float32 ``(n, n_mels, max_frames)`` power of
    the whole recording, zero beyond ``n_frames[i]`` frames, or None when it was not extracted.
    """

    config: FeatureConfig
    table: pd.DataFrame
    features: NDArray[np.float32]
    mel_power: NDArray[np.float32] | None
    n_frames: NDArray[np.int64]

    def crops(self, row: int, crops: int) -> NDArray[np.float32]:
        """Model input of evenly spaced windows of a recording, ``(crops, *config.input_shape)``; its middle for one.

        As ``windows.crop_starts`` places them, but on the grid of ``mel_power``'s frames and within what it holds (6 s
        around the middle by default). One window only when that is not longer.

        Raises:
            ShardError: several crops of features without mel power.
        """
        frames = self.config.n_frames
        room = int(self.n_frames[row]) - frames
        if crops == 1 or (self.mel_power is not None and room <= 0):
            return np.array(self.features[row : row + 1])
        if self.mel_power is None:
            raise ShardError(NO_CROPS)
        starts = [int((room + 1) * (index + 0.5) / crops) for index in range(crops)]
        power = self.mel_power[row]
        return np.stack([normalise_power(power[:, start : start + frames], self.config) for start in starts])


def read_shard_manifest(folder: Path) -> dict[str, Any]:
    """``manifest.json`` of a complete feature folder.

    Raises:
        ShardError: no folder, an unfinished extraction, an unknown version, or a part that is not there.
    """
    if not folder.is_dir():
        raise ShardError(
            f"no feature folder {folder}; make one with: python -m jobs.extract --data_dir ... --out {folder}"
        )
    if not (folder / MANIFEST).is_file():
        raise ShardError(f"{folder} has no {MANIFEST}: the extraction did not finish; run the same jobs.extract again")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version, parts = manifest["version"], [str(name) for name in manifest["parts"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{folder / MANIFEST} is damaged ({error}); extract again with --overwrite") from error
    if version != SHARD_VERSION:
        raise ShardError(f"{folder} has shard version {version}, this code reads {SHARD_VERSION}; extract again")
    missing = [name for name in parts if not (folder / name).is_file()]
    if missing:
        raise ShardError(f"{folder} lacks {len(missing)} parts, {missing[0]} first; extract again with --overwrite")
    return dict(manifest)


def load_features(folder: str | os.PathLike[str], config: FeatureConfig | None = None) -> FeatureArrays:
    """Open a feature folder.

    Args:
        config: what the features must be; None accepts what the folder holds.

    Raises:
        ShardError: as ``read_shard_manifest``; another FeatureConfig; no readable recording.
    """
    folder = Path(folder)
    manifest = read_shard_manifest(folder)
    found = FeatureConfig.from_dict(manifest["features"])
    if config is not None and config.fingerprint() != found.fingerprint():
        raise ShardError(
            f"{folder} holds {found.kind} features {found.fingerprint()}, "
            f"expected {config.kind} {config.fingerprint()}; extract again into another folder"
        )
    cache = folder / f"arrays-{manifest['plan']}"
    if not (cache / "table.parquet").is_file():
        _build_cache(folder, manifest, found, cache)
    try:
        table = pd.read_parquet(cache / "table.parquet")
        features = np.load(cache / "features.npy", mmap_mode="r")
        power = np.load(cache / "mel_power.npy", mmap_mode="r") if manifest["mel_power_frames"] else None
    except (OSError, ValueError, EOFError) as error:  # ValueError: also Arrow's
        raise ShardError(
            f"{cache} is damaged ({_reason(error)}); remove it: it is made anew from the shards"
        ) from error
    return FeatureArrays(found, table, features, power, table["n_frames"].to_numpy(np.int64))


def _build_cache(folder: Path, manifest: dict[str, Any], config: FeatureConfig, cache: Path) -> None:
    """Write ``features.npy``, ``mel_power.npy`` and ``table.parquet`` beside the shards, whole or not at all."""
    if int(manifest["rows"]) == int(manifest["failed"]):
        raise ShardError(f"{folder} holds no readable recording; see the column error of its parts")
    try:
        temporary = Path(tempfile.mkdtemp(dir=folder, prefix=f".{cache.name}."))
        try:
            temporary.chmod(0o755)
            _write_arrays(folder, manifest, config, temporary)
            try:
                temporary.rename(cache)
            except OSError:
                if not (cache / "table.parquet").is_file():  # else another process was first: its cache is the same
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise ShardError(
            f"cannot write {cache}: {_reason(error)}; free some space, or make the folder writable"
        ) from error


def _write_arrays(folder: Path, manifest: dict[str, Any], config: FeatureConfig, target: Path) -> None:
    """The three files, in ``target``; written, not mapped: where the disk is full a process that maps is killed."""
    total = int(manifest["rows"]) - int(manifest["failed"])
    columns = {config.kind: "features"} | ({"mel_power": "mel_power"} if manifest["mel_power_frames"] else {})
    tables: list[pa.Table] = []
    with ExitStack() as stack:
        files = {column: stack.enter_context((target / f"{name}.npy").open("wb")) for column, name in columns.items()}
        for name in manifest["parts"]:
            part = _readable_rows(folder / name)
            for column, file in files.items() if len(part) else ():
                values = part[column].combine_chunks().to_numpy_ndarray()
                if not file.tell():
                    header = {"descr": "<f4", "fortran_order": False, "shape": (total, *values.shape[1:])}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(np.ascontiguousarray(values, "<f4").data)
            tables.append(part.drop_columns([c for c in part.column_names if c in (config.kind, "mel_power")]))
    pq.write_table(pa.concat_tables(tables, promote_options="permissive"), target / "table.parquet")


def _readable_rows(path: Path) -> pa.Table:
    """The rows of a part whose recordings could be read."""
    try:
        part = pq.read_table(path)
        return part.filter(pa.compute.equal(part["status"], "ok"))
    except (OSError, pa.ArrowException, KeyError) as error:
        raise ShardError(f"{path} is damaged ({_reason(error)}); extract again with --overwrite") from error


def _reason(error: Exception) -> str:
    """What an error says, without its number and file."""
    return str(getattr(error, "strerror", None) or error)
