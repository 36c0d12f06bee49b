"""Extracts features of recordings into shards, with Ray Data or in processes of this machine (``cluster.engine``).

Each task writes the part of one block of the manifest, ``part-NNNNN.parquet``, and returns only counts, so memory use
does not grow with the number of recordings. A second run of the same extraction makes only the missing parts.
``manifest.json`` is written last: its presence means that the folder is complete. A recording that cannot be read
becomes a row with ``status`` and ``error``. If it crashed the process of its block, the next attempt decodes it in a
process of its own; if it crashes there too, its status is ``decoder_crashed``.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.audio.isolated import decode_in_subprocess
from pipeline.audio.load import AudioError, Reading, load_once
from pipeline.cluster.engine import choose_engine, in_processes
from pipeline.data.segments import HASH_COLUMN, bounds, source_at
from pipeline.features.features import FeatureConfig, extract, mel_power
from pipeline.features.store import (
    MANIFEST,
    NOTES,
    SHARD_VERSION,
    ShardError,
    begin_notes,
    check_or_init,
    check_run,
    lock,
    part_name,
    read_shard_manifest,
    whole_parts,
)
from pipeline.storage.errors import SerError
from pipeline.storage.files import usable_cpus
from pipeline.storage.journal import CrashLog, atomic_path, remove_temporaries, write_json

__all__ = ["BlockWriter", "ShardOptions", "ShardSummary", "extract_shards"]

MAX_MEL_POWER_S = 120  # 3 MB for every recording of a folder
OUR_COLUMNS = {
    "row_id": pa.string(),
    "parent_id": pa.string(),
    "pitch_semitones": pa.float64(),
    "status": pa.string(),
    "error": pa.string(),
    "n_frames": pa.int64(),
    "content_hash": pa.string(),
}
_RECORDING_S = 0.03  # CPU seconds per recording: decoding, hash, features, mel power, writing
_decode_isolated = partial(decode_in_subprocess, decode=load_once, timeout_s=300.0)  # decodes it all, for the hash


@dataclass(frozen=True)
class ShardOptions:
    """Options of an extraction.

    Raises:
        ShardError: a value out of range, or pitch copies without mel power.
    """

    mel_power_s: float = 6.0  # mel power stored for training-time crops, at least the window; 0: none
    block_rows: int = 128  # recordings per part
    pitch_semitones: tuple[float, ...] = ()  # pitch shift of each copy; copies are made from the stored seconds

    def __post_init__(self) -> None:
        if self.block_rows < 1:
            raise ShardError(f"block_rows must be 1 or more, got {self.block_rows}")
        if not 0 <= self.mel_power_s <= MAX_MEL_POWER_S:
            raise ShardError(f"mel_power_s must be 0 to {MAX_MEL_POWER_S} s, got {self.mel_power_s}")
        if not all(map(math.isfinite, self.pitch_semitones)):
            raise ShardError(f"pitch_semitones must be finite numbers, got {self.pitch_semitones}")
        if self.pitch_semitones and not self.mel_power_s:
            raise ShardError("pitch copies need mel power; give --mel_power_s 6, or leave --pitch_semitones out")


@dataclass(frozen=True)
class BlockWriter:
    """Extracts one block of the manifest and writes its part.

    ``run`` is the id of this start of the job. Crashes during an earlier start do not count against a block, and
    nothing is written after a later start took over ``out``. Empty: no such checks.
    """

    out: Path
    schema: pa.Schema  # of the manifest's columns, the same for every part
    config: FeatureConfig
    options: ShardOptions
    run: str = ""

    def __call__(self, batch: pd.DataFrame) -> tuple[int, int]:
        """Write the part of ``batch`` (manifest rows with ``_block`` and ``_row``); returns (all rows, failed rows).

        Raises:
            SerError: a later start took over ``out``; it cannot be written; the block crashed too often.
        """
        block = int(batch["_block"].iloc[0])
        notes = CrashLog(self.out / NOTES, block, self.run)
        notes.check()
        rows: list[dict[str, Any]] = []
        places = zip(batch["_row"], batch["speech"], *bounds(batch), strict=True)
        for position, (number, *place) in enumerate(places):
            notes.begin(position)
            rows.extend(self._rows(int(number), place, _decode_isolated if notes.isolated(position) else load_once))
        notes.close()
        target = self.out / part_name(block)
        try:
            with atomic_path(target) as beside:
                pq.write_table(self._to_arrow(batch, rows), beside, compression="zstd", compression_level=1)
                if self.run:
                    check_run(self.out, self.run)
        except OSError as error:
            raise ShardError(
                f"cannot write {target}: {error.strerror or error}; free some space, then give the same command again: "
                "it continues where it stopped"
            ) from error
        return len(rows), sum(row["status"] != "ok" for row in rows)

    def _rows(self, number: int, place: Sequence[Any], read: Callable[..., Reading]) -> list[dict[str, Any]]:
        """The added columns of one recording's row, and of the rows of its pitch-shifted copies.

        ``place``: path, start and end, see ``segments.source_at``.
        """
        base = {"_row": number, "row_id": str(number), "parent_id": "", "pitch_semitones": 0.0}
        base |= {"status": "ok", "error": "", "n_frames": 0, "content_hash": "", "features": None, "mel_power": None}
        config, frames = self.config, power_frames(self.config, self.options)
        windows_s = [config.window_s] + ([max(self.options.mel_power_s, config.window_s)] if frames else [])
        try:
            found = read(
                source_at(*place), windows_s=windows_s, sample_rate_hz=config.sample_rate_hz, window=config.window
            )
        except AudioError as error:
            return [base | {"status": error.code, "error": str(error)}]
        base |= {"content_hash": found.content_hash, "features": extract(found.clips[0].samples, config)}
        if not frames:
            return [base]
        samples = _excerpt(found, config)
        rows = [base | _power(samples, config, frames)]
        for semitones in self.options.pitch_semitones:
            shifted = _pitch_shift(samples, config, semitones)
            copy = {"row_id": f"{number}{semitones:+g}", "parent_id": str(number), "pitch_semitones": semitones}
            start = (len(shifted) - config.window_samples) // 2
            copy["features"] = extract(shifted[start : start + config.window_samples], config)
            rows.append(base | copy | _power(shifted, config, frames))
        return rows

    def _to_arrow(self, batch: pd.DataFrame, rows: list[dict[str, Any]]) -> pa.Table:
        given = batch.set_index("_row").loc[[row["_row"] for row in rows], self.schema.names]
        table = pa.Table.from_pandas(given, schema=self.schema, preserve_index=False)
        for name, kind in OUR_COLUMNS.items():
            table = table.append_column(name, pa.array([row[name] for row in rows], kind))
        tensor = _tensor([row["features"] for row in rows], self.config.input_shape)
        table = table.append_column(self.config.kind, tensor)
        if frames := power_frames(self.config, self.options):
            tensor = _tensor([row["mel_power"] for row in rows], (self.config.n_mels, frames))
            table = table.append_column("mel_power", tensor)
        return table


def _excerpt(found: Reading, config: FeatureConfig) -> np.ndarray:
    """The audio around the window, without padding beyond the window; the window is in its middle."""
    window, whole = found.clips
    real = min(len(whole.samples), max(config.window_samples, round(whole.scored_s * config.sample_rate_hz)))
    start = (len(whole.samples) - real) // 2
    if config.window != "middle":  # the window may be close to an end of the recording
        before = round((window.start_s - whole.start_s) * config.sample_rate_hz)
        beside = max(min(before, real - config.window_samples - before), 0)
        start, real = start + before - beside, config.window_samples + 2 * beside
    return whole.samples[start : start + real]


def _pitch_shift(samples: np.ndarray, config: FeatureConfig, semitones: float) -> np.ndarray:
    import librosa

    return librosa.effects.pitch_shift(samples, sr=config.sample_rate_hz, n_steps=semitones)


def power_frames(config: FeatureConfig, options: ShardOptions) -> int:
    """Frames of mel power stored per recording; 0 for none."""
    if config.kind != "log_mel" or options.mel_power_s <= 0:
        return 0
    return 1 + round(max(options.mel_power_s, config.window_s) * config.sample_rate_hz) // config.hop_length


def _power(samples: np.ndarray, config: FeatureConfig, frames: int) -> dict[str, Any]:
    power = mel_power(samples, config)
    padded = np.zeros((config.n_mels, frames), np.float32)
    padded[:, : power.shape[1]] = power
    return {"mel_power": padded, "n_frames": power.shape[1]}


def _tensor(values: list[np.ndarray | None], shape: tuple[int, ...]) -> pa.Array:
    """A fixed-shape tensor column; zeros for recordings without features (their ``status`` is not "ok")."""
    stacked = np.stack([np.zeros(shape, np.float32) if v is None else v for v in values])
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(stacked))


ProgressCallback = Callable[[int, int, int], None]


@dataclass(frozen=True)
class ShardSummary:
    """Result of an extraction: rows (including pitch copies), failed rows, parts reused from an earlier run."""

    folder: Path
    rows: int
    failed: int
    reused: int


def extract_shards(
    manifest: pd.DataFrame,
    out: Path,
    config: FeatureConfig,
    *,
    options: ShardOptions | None = None,
    overwrite: bool = False,
    engine: str = "auto",
    num_cpus: int | None = None,
    on_progress: ProgressCallback | None = None,
) -> ShardSummary:
    """Extract the features of every recording of ``manifest`` into ``out``, or the rest of an unfinished extraction.

    Args:
        manifest: its columns are kept.
        overwrite: remove another extraction in ``out`` instead of refusing it.
        engine, num_cpus: where to run, see ``choose_engine``; the shards do not depend on it.
        on_progress: called with (recordings done, recordings in total, rows failed so far).

    Raises:
        ShardError: ``out`` holds another extraction, or recordings have changed since it began (unless ``overwrite``);
            it is a folder with other files; pitch copies of features other than log-mel.
        SerError: another process extracts into ``out``, or it cannot be written.
    """
    options = options or ShardOptions()
    if options.pitch_semitones and config.kind != "log_mel":
        raise ShardError(
            f"pitch copies need log_mel features, got {config.kind}; leave --pitch_semitones (or --augment pitch) out"
        )
    table = _renamed(manifest.reset_index(drop=True), config)
    with lock(out):
        return _extract(table, out, config, options, overwrite, engine, num_cpus, on_progress)


def _extract(
    table: pd.DataFrame,
    out: Path,
    config: FeatureConfig,
    options: ShardOptions,
    overwrite: bool,
    engine: str,
    num_cpus: int | None,
    on_progress: ProgressCallback | None,
) -> ShardSummary:
    """``extract_shards``, while this process holds the folder's lock."""
    blocks = [table.iloc[i : i + options.block_rows] for i in range(0, len(table), options.block_rows)]
    plan = {"plan": _fingerprint(table, config, options), "version": SHARD_VERSION, "blocks": len(blocks)}
    check_or_init(out, plan, table["speech"].tolist(), options.block_rows, overwrite=overwrite)
    names = [part_name(i) for i in range(len(blocks))]
    if (out / MANIFEST).is_file():
        done = read_shard_manifest(out)
        return ShardSummary(out, int(done["rows"]), int(done["failed"]), len(names))
    whole = whole_parts(out, len(blocks))
    todo = [i for i in range(len(blocks)) if i not in whole]
    finished = len(table) - sum(len(blocks[i]) for i in todo)
    rows, failed = (sum(counts[k] for counts in whole.values()) for k in (0, 1))
    if todo:
        for made in out.glob("arrays-*"):  # outdated: made from an earlier version of the parts
            shutil.rmtree(made)
        run = uuid.uuid4().hex
        begin_notes(out, run)
        schema = pa.Schema.from_pandas(table, preserve_index=False)
        block = BlockWriter(out.absolute(), schema, config, options, run)
        chosen = extraction_engine(engine, sum(len(blocks[i]) for i in todo), num_cpus)
        run_blocks = _in_processes if chosen == "local" else _on_ray
        for recordings, written, bad in run_blocks(blocks, todo, block, num_cpus):
            finished, rows, failed = finished + recordings, rows + written, failed + bad
            if on_progress:
                on_progress(finished, len(table), failed)
    shutil.rmtree(out / NOTES, ignore_errors=True)
    remove_temporaries(out, "part-*")  # left by a node that died while writing
    about = {"features": config.to_dict(), "fingerprint": config.fingerprint(), "options": asdict(options)}
    found = {"mel_power_frames": power_frames(config, options), "rows": rows, "failed": failed, "parts": names}
    write_json(out / MANIFEST, plan | about | found)
    return ShardSummary(out, rows, failed, len(names) - len(todo))


def _renamed(manifest: pd.DataFrame, config: FeatureConfig) -> pd.DataFrame:
    """The manifest; a column NAME that collides with an added column is renamed to ``in_NAME``."""
    taken = {*OUR_COLUMNS, config.kind, "mel_power", "_block", "_row"}
    names: list[str] = []
    for name in map(str, manifest.columns):
        while name in taken:
            name = f"in_{name}"
        taken.add(name)
        names.append(name)
    return manifest.set_axis(names, axis=1)


def _fingerprint(table: pd.DataFrame, config: FeatureConfig, options: ShardOptions) -> str:
    digest = hashlib.sha256(config.fingerprint().encode())
    digest.update(json.dumps(asdict(options), sort_keys=True).encode())
    as_before = table.rename(columns={f"in_{HASH_COLUMN}": HASH_COLUMN})  # same fingerprint as in earlier versions
    digest.update(as_before.to_csv(index=False).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def extraction_engine(engine: str, recordings: int, num_cpus: int | None = None) -> str:
    """The engine for extracting this number of recordings, see ``choose_engine``."""
    return choose_engine(engine, recordings * _RECORDING_S, num_cpus)


def _in_processes(
    blocks: list[pd.DataFrame], todo: list[int], write: BlockWriter, num_cpus: int | None
) -> Iterator[tuple[int, int, int]]:
    """The same as ``_on_ray``, in processes of this machine."""
    batches = [blocks[i].assign(_block=i, _row=blocks[i].index) for i in todo]
    yield from in_processes(batches, partial(_counted, write=write), min(len(batches), num_cpus or usable_cpus()))


def _counted(batch: pd.DataFrame, write: BlockWriter) -> tuple[int, int, int]:
    return len(batch), *write(batch)


def _on_ray(
    blocks: list[pd.DataFrame], todo: list[int], write: BlockWriter, num_cpus: int | None
) -> Iterator[tuple[int, int, int]]:
    """Run the blocks ``todo`` on Ray Data; yields (recordings, rows, failed rows) for each finished block.

    Each block is one item. For a list of tables, Ray Data would first run one task per table to get its metadata.
    """
    import ray

    from pipeline.cluster.engine import check_nodes
    from pipeline.cluster.runtime import data_context, start_ray, task_pool

    start_ray(num_cpus or None)
    check_nodes(write.out / NOTES, some_of=[path for i in todo for path in blocks[i]["speech"]])
    data_context()
    items = [{"block": i, "first": int(blocks[i].index[0]), "rows": _packed(blocks[i], write.schema)} for i in todo]

    how: dict[str, Any] = {"batch_format": "pyarrow", "batch_size": None, "zero_copy_batch": True, "num_cpus": 1}
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        partial(_written, write=write), compute=task_pool(len(items)), **how
    )
    for row in dataset.iter_rows():
        if row["refusal"]:
            raise ShardError(row["refusal"])
        yield int(row["recordings"]), int(row["rows"]), int(row["failed"])


def _written(batch: pa.Table, write: BlockWriter) -> pa.Table:
    """Write the part of a block; runs in a Ray task. Returns counts, and a `SerError` as text in ``refusal``.

    A raised error would be hidden in Ray's own error.
    """
    (item,) = batch.to_pylist()
    rows = pa.ipc.open_stream(item["rows"]).read_all().to_pandas()
    numbers = range(item["first"], item["first"] + len(rows))
    written, bad, refusal = 0, 0, ""
    try:
        written, bad = write(rows.assign(_block=item["block"], _row=numbers))
    except SerError as error:
        refusal = str(error)
    return pa.table({"recordings": [len(rows)], "rows": [written], "failed": [bad], "refusal": [refusal]})


def _packed(rows: pd.DataFrame, schema: pa.Schema) -> bytes:
    """Manifest rows as bytes, in Arrow's stream format."""
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, schema) as stream:
        stream.write_table(pa.Table.from_pandas(rows, schema=schema, preserve_index=False))
    return sink.getvalue()
