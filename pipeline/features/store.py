"""The feature folder: reads its Parquet shards as memory-mapped arrays, and guards it while an extraction writes.

Reading: the first read copies the tensors into ``.npy`` files in the folder, which later runs and all workers on the
machine then map.

Writing: one process at a time holds the folder's lock (``flock``), and the folder belongs to one plan (``plan.json``:
recordings and settings). ``stamps.npy`` holds the recordings' stamps (``storage.files.stamps_of``), int64 ``(n, 2)``,
taken before they are read. A recording with another stamp has changed; one that no longer exists has not. Without
``stamps.npy`` changes are not checked. Ray tasks left over from a killed process see that ``.notes/run`` names another
run, and write nothing.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.data.corpora.voices import renewed
from pipeline.data.splits import HASH_COLUMN
from pipeline.features.features import FeatureConfig, normalise_power
from pipeline.storage.errors import SerError
from pipeline.storage.files import stamps_of
from pipeline.storage.journal import PLAN, atomic_path, locked, part_counts, read_plan, write_plan

SHARD_VERSION = 1
MANIFEST = "manifest.json"
NO_CROPS = "several crops need log_mel features with mel power; extract again with --mel_power_s 6, or give --crops 1"


class ShardError(SerError):
    """A feature folder is missing, incomplete, damaged, or has another configuration; or bad extraction options."""


class Stacked:
    """Arrays of several folders with one row numbering; a row is copied only when it is read.

    Raises:
        ShardError: rows of different shapes.
    """

    def __init__(self, arrays: Sequence[NDArray[np.float32]]) -> None:
        shapes = {array.shape[1:] for array in arrays}
        if len(shapes) > 1:
            raise ShardError(
                f"the feature folders hold rows of different shapes ({', '.join(map(str, sorted(shapes)))}); extract "
                "all with the same --mel_power_s"
            )
        self.arrays = tuple(arrays)
        self.starts = np.cumsum([0, *map(len, arrays)])
        self.shape: tuple[int, ...] = (int(self.starts[-1]), *shapes.pop())

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice | NDArray[np.int64]) -> NDArray[np.float32]:
        """A copy of one row, or of the rows of a slice or of an array of row numbers."""
        wanted = np.arange(len(self))[index]
        rows = np.atleast_1d(wanted)
        found = np.empty((len(rows), *self.shape[1:]), np.float32)
        folder = np.searchsorted(self.starts, rows, side="right") - 1
        for number in np.unique(folder):
            here = folder == number
            found[here] = self.arrays[number][rows[here] - self.starts[number]]
        return found if wanted.ndim else found[0]


@dataclass(frozen=True)
class FeatureArrays:
    """The readable recordings (and pitch copies) of a feature folder, in the order of its shards.

    ``features`` is float32 ``(n, *config.input_shape)``. ``mel_power`` is float32 ``(n, n_mels, max_frames)``: the mel
    power around the window, zero beyond ``n_frames[i]`` frames; None if it was not extracted. For several folders both
    are ``Stacked``, which is indexed like an array.
    """

    config: FeatureConfig
    table: pd.DataFrame
    features: NDArray[np.float32] | Stacked
    mel_power: NDArray[np.float32] | Stacked | None
    n_frames: NDArray[np.int64]

    def crops(self, row: int, crops: int) -> NDArray[np.float32]:
        """Model input for evenly spaced windows of a recording, ``(crops, *config.input_shape)``.

        One crop is the stored window. Several are placed like ``windows.crop_starts``, but start on frames of
        ``mel_power`` and stay within it (6 s around the window by default); only one if that is not longer.

        Raises:
            ShardError: several crops, but the features have no mel power.
        """
        frames = self.config.n_frames
        room = int(self.n_frames[row]) - frames
        if crops == 1 or (self.mel_power is not None and room <= 0):
            return np.array(self.features[row : row + 1])
        if self.mel_power is None:
            raise ShardError(NO_CROPS)
        starts = [int((room + 1) * (index + 0.5) / crops) for index in range(crops)]
        power = np.asarray(self.mel_power[row])
        return np.stack([normalise_power(power[:, start : start + frames], self.config) for start in starts])


def read_shard_manifest(folder: Path) -> dict[str, Any]:
    """``manifest.json`` of a complete feature folder.

    Raises:
        ShardError: no folder, an unfinished extraction, an unknown version, or a missing part.
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
        raise ShardError(
            f"{folder}: {len(missing)} parts are missing, first {missing[0]}; extract again with --overwrite"
        )
    return dict(manifest)


def load_features(
    folder: str | os.PathLike[str] | Sequence[Path], config: FeatureConfig | None = None
) -> FeatureArrays:
    """Open a feature folder, or several as one: their rows follow each other, with ids that begin ``NUMBER:``.

    Args:
        config: the configuration that the features must have; None: that of the (first) folder.

    Raises:
        ShardError: as ``read_shard_manifest``; another FeatureConfig; no readable recording; a folder given twice;
            folders whose features or mel power differ in shape.
    """
    if not isinstance(folder, str | os.PathLike):
        return _load_several(folder, config)
    folder = Path(folder)
    manifest = read_shard_manifest(folder)
    found = FeatureConfig.from_dict(manifest["features"])
    if config is not None and config.fingerprint() != found.fingerprint():
        raise ShardError(f"{folder} holds features of {found.unlike(config)}; extract again into another folder")
    cache = folder / f"arrays-{manifest['plan']}"
    if not (cache / "table.parquet").is_file():
        _build_cache(folder, manifest, found, cache)
    try:
        table = renewed(_hashes_ours(pq.read_table(cache / "table.parquet")).to_pandas())
        features = np.load(cache / "features.npy", mmap_mode="r")
        power = np.load(cache / "mel_power.npy", mmap_mode="r") if manifest["mel_power_frames"] else None
    except (OSError, ValueError, EOFError) as error:  # ValueError: also Arrow's
        raise ShardError(
            f"{cache} is damaged ({_reason(error)}); remove it: it is made again from the shards"
        ) from error
    return FeatureArrays(found, table, features, power, table["n_frames"].to_numpy(np.int64))


def _load_several(folders: Sequence[Path], config: FeatureConfig | None) -> FeatureArrays:
    if len(folders) == 1:
        return load_features(folders[0], config)
    if len({os.path.realpath(folder) for folder in folders}) < len(folders):
        raise ShardError(f"a feature folder is given twice: {', '.join(map(str, folders))}")
    found = [load_features(folders[0], config)]
    found += [load_features(folder, found[0].config) for folder in folders[1:]]
    pairs = enumerate(zip(found, folders, strict=True))
    tables = [_numbered(arrays.table, n, folder.name) for n, (arrays, folder) in pairs]
    powers = [arrays.mel_power for arrays in found if arrays.mel_power is not None]
    return FeatureArrays(
        found[0].config,
        pd.concat(tables, ignore_index=True),
        Stacked([np.asarray(arrays.features) for arrays in found]),
        Stacked([np.asarray(power) for power in powers]) if len(powers) == len(found) else None,
        np.concatenate([arrays.n_frames for arrays in found]),
    )


def _numbered(table: pd.DataFrame, number: int, folder: str) -> pd.DataFrame:
    """One of several folders' tables: ids made unique by ``number``; without a corpus column, the folder's name."""
    ids = {name: table[name].map(lambda value: value and f"{number}:{value}") for name in ("row_id", "parent_id")}
    return table.assign(**ids) if "corpus" in table.columns else table.assign(**ids, corpus=folder)


def _build_cache(folder: Path, manifest: dict[str, Any], config: FeatureConfig, cache: Path) -> None:
    """Write ``features.npy``, ``mel_power.npy`` and ``table.parquet`` into ``cache``, completely or not at all."""
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
                if not (cache / "table.parquet").is_file():  # else another process has made the same cache
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise ShardError(
            f"cannot write {cache}: {_reason(error)}; free some space, or make the folder writable"
        ) from error


def _write_arrays(folder: Path, manifest: dict[str, Any], config: FeatureConfig, target: Path) -> None:
    """Write the three files into ``target``; not through a memory map, as a full disk would kill the process."""
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
    """The rows of a part with status "ok"."""
    try:
        part = pq.read_table(path)
        return _hashes_ours(part.filter(pa.compute.equal(part["status"], "ok")))
    except (OSError, pa.ArrowException, KeyError) as error:
        raise ShardError(f"{path} is damaged ({_reason(error)}); extract again with --overwrite") from error


def _hashes_ours(table: pa.Table) -> pa.Table:
    """The table without a content hash taken over from the manifest, as old shards have it.

    The extraction's own hash column comes after the manifest's columns, and so after ``row_id``.
    """
    names = table.column_names
    given = HASH_COLUMN in names and names.index(HASH_COLUMN) < names.index("row_id")
    return table.drop_columns(HASH_COLUMN) if given else table


def _reason(error: Exception) -> str:
    """An error's text without its number and file."""
    return str(getattr(error, "strerror", None) or error)


STAMPS, NOTES, KIND = "stamps.npy", ".notes", "extraction"
_LOCK, _RUN = ".extract.lock", "run"
_EMPTY = (_LOCK, STAMPS, f".{STAMPS}.*tmp")  # files left by a start that failed before writing its plan
_OURS = (PLAN, STAMPS, NOTES, MANIFEST, f".{STAMPS}.*tmp", "part-*.parquet", ".part-*.tmp", "arrays-*", ".arrays-*")


def part_name(block: int) -> str:
    """File name of the part of a block."""
    return f"part-{block:05d}.parquet"


@contextmanager
def lock(out: Path) -> Iterator[None]:
    """Lock the folder until the end of the ``with`` block or of the process; create it if missing.

    Raises:
        ShardError: ``out`` is a file, or a folder with other files than an extraction's.
        SerError: another process extracts into it, or it cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise ShardError(f"{out} is a file; give --out a folder")
    foreign = out.is_dir() and any(not any(path.match(name) for name in _EMPTY) for path in out.iterdir())
    if foreign and read_plan(out, KIND) is None:
        raise ShardError(f"{out} is not empty and holds no feature shards; give --out a new folder")
    with locked(out / _LOCK, f"extracting into {out}"):
        yield


def check_or_init(
    out: Path, plan: Mapping[str, Any], recordings: Sequence[str], block_rows: int, *, overwrite: bool
) -> None:
    """Write ``plan`` and the stamps of ``recordings`` into the folder, or check that it already belongs to ``plan``.

    Raises:
        ShardError: the folder holds other recordings or settings, or features of recordings that have changed since;
            with ``overwrite`` it is emptied instead.
    """
    stamps, known = stamps_of(recordings), read_plan(out, KIND)
    if known == plan:
        before = _stamps_before(out)
        if before is None or len(before) != len(recordings):
            return
        extracted = np.array([(out / part_name(i)).is_file() for i in range(int(plan["blocks"]))], dtype=bool)
        extracted = extracted.repeat(block_rows)[: len(recordings)]
        changed = np.flatnonzero(extracted & (stamps[:, 0] >= 0) & (stamps != before).any(axis=1))
        if not len(changed):
            _write_stamps(out, np.where(extracted[:, np.newaxis], before, stamps))
            return
        others = f" and {len(changed) - 1:,} more" if len(changed) > 1 else ""
        reason = f"{out} holds features of {recordings[changed[0]]}{others}, which changed since"
    else:
        reason = f"{out} holds shards of other recordings or settings"
    if known is not None:
        if not overwrite:
            raise ShardError(f"{reason}; give --overwrite to extract again, or another --out")
        _empty(out)
    _write_stamps(out, stamps)
    write_plan(out, KIND, plan)


def known_hashes(folders: Sequence[Path], table: pd.DataFrame) -> pd.Series:
    """Content hash of each recording, from the shards; "" if they hold none or the recording may have changed.

    ``table`` holds rows of ``load_features(folders)``, without pitch copies. A recording that no longer exists keeps
    its hash. One that exists may have changed if its stamp is another or if its folder has no stamps.
    """
    if HASH_COLUMN not in table.columns:
        return pd.Series("", index=table.index)
    place = table["row_id"].str.rpartition(":")
    before = np.full((len(table), 2), -1, np.int64)
    for number, folder in enumerate(folders):
        stamps = _stamps_before(folder)
        rows = np.flatnonzero(place[0].replace("", "0").astype(int) == number)
        positions = place[2].iloc[rows].astype(int).to_numpy()
        if stamps is not None and len(stamps) > positions.max(initial=-1):
            before[rows] = stamps[positions]
    now = stamps_of(table["speech"].tolist())
    unchanged = (now[:, 0] < 0) | (now == before).all(axis=1)
    return table[HASH_COLUMN].fillna("").where(unchanged, "")


def begin_notes(out: Path, run: str) -> None:
    """Create the notes folder and record ``run`` as the start of the job that writes from now on."""
    (out / NOTES).mkdir(exist_ok=True)
    (out / NOTES / _RUN).write_text(run, encoding="ascii")


def check_run(out: Path, run: str) -> None:
    """Raise ShardError unless ``run`` is the recorded start of the job that writes into ``out``."""
    try:
        current = (out / NOTES / _RUN).read_text(encoding="ascii")
    except OSError:
        current = ""
    if current != run:
        raise ShardError(f"another extraction has taken over {out}; this one stops writing into it")


def whole_parts(out: Path, blocks: int) -> dict[int, tuple[int, int]]:
    """Block -> (all rows, failed rows), for those of the ``blocks`` parts that can be read; others are left out."""
    found = ((block, part_counts(out / part_name(block))) for block in range(blocks))
    return {block: counts for block, counts in found if counts is not None}


def _empty(out: Path) -> None:
    """Remove the files of an extraction: the manifest first, as it means complete, and the plan last."""
    ours = [path for path in out.iterdir() if any(path.match(pattern) for pattern in _OURS)]
    for path in sorted(ours, key=lambda path: (path.name == PLAN, path.name != MANIFEST)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _write_stamps(out: Path, stamps: NDArray[np.int64]) -> None:
    packed = io.BytesIO()  # numpy hides the reason why a file cannot be written
    np.save(packed, stamps)
    with atomic_path(out / STAMPS) as beside:
        beside.write_bytes(packed.getvalue())


def _stamps_before(out: Path) -> NDArray[np.int64] | None:
    """The stamps stored in the folder, ``(n, 2)``; None if there are none."""
    try:
        stamps: NDArray[np.int64] = np.load(out / STAMPS, allow_pickle=False)
    except (OSError, ValueError):
        return None
    return stamps if stamps.ndim == 2 and stamps.shape[1] == 2 else None
