"""One part of an extraction: a block of the manifest decoded, its features computed, written whole or not at all.

What a worker of ``pipeline.features.extract`` runs. A recording is decoded once, for its features and its content hash.
One that cannot be read is a row with ``status`` and ``error``.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.audio.isolated import decode_in_subprocess
from pipeline.audio.load import AudioError, Clip, Reading, load_once
from pipeline.features.features import FeatureConfig, extract, mel_power
from pipeline.features.shard_folder import NOTES, check_run, part_name
from pipeline.features.store import ShardError
from pipeline.storage.ledger import Notes
from pipeline.storage.remote import source_of

MAX_MEL_POWER_S = 120  # 3 MB a recording, which every one of a folder takes
OUR_COLUMNS = {
    "row_id": pa.string(),
    "parent_id": pa.string(),
    "pitch_semitones": pa.float64(),
    "status": pa.string(),
    "error": pa.string(),
    "n_frames": pa.int64(),
    "content_hash": pa.string(),
}
_decode_apart = partial(decode_in_subprocess, decode=load_once, timeout_s=300.0)  # all of a recording, for its hash


@dataclass(frozen=True)
class ShardOptions:
    """How to extract.

    Attributes:
        mel_power_s: seconds around the middle, the window at least, kept for training-time crops; 0 keeps none.
        block_rows: recordings a part.
        pitch_semitones: of the copies, which are made of what is kept.

    Raises:
        ShardError: a value out of range, or copies of nothing.
    """

    mel_power_s: float = 6.0
    block_rows: int = 128
    pitch_semitones: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.block_rows < 1:
            raise ShardError(f"block_rows must be 1 or more, got {self.block_rows}")
        if not 0 <= self.mel_power_s <= MAX_MEL_POWER_S:
            raise ShardError(f"mel_power_s must be 0 to {MAX_MEL_POWER_S} s, got {self.mel_power_s}")
        if not all(map(math.isfinite, self.pitch_semitones)):
            raise ShardError(f"pitch_semitones must be finite numbers, got {self.pitch_semitones}")
        if self.pitch_semitones and not self.mel_power_s:
            raise ShardError("pitch copies are made of mel power; give --mel_power_s 6, or no --pitch_semitones")


@dataclass(frozen=True)
class BlockWriter:
    """Extracts one block of the manifest and writes its part.

    Attributes:
        schema: the manifest's columns, for every part.
        run: the start of the job. Attempts that died with another are not held against a block, and once ``out`` is
            another's, nothing is written. Empty: not asked.
    """

    out: Path
    schema: pa.Schema
    config: FeatureConfig
    options: ShardOptions
    run: str = ""

    def __call__(self, batch: pd.DataFrame) -> tuple[int, int]:
        """Write the part of ``batch`` (manifest rows with ``_block`` and ``_row``): (rows with copies, failed rows).

        Raises:
            SerError: ``out`` is another start's by now, or cannot be written; the block killed attempt after attempt.
        """
        block = int(batch["_block"].iloc[0])
        notes = Notes(self.out / NOTES, block, self.run)
        notes.check()
        rows: list[dict[str, Any]] = []
        for position, (_, record) in enumerate(batch.iterrows()):
            notes.begin(position)
            rows.extend(self._rows(record, _decode_apart if notes.apart(position) else load_once))
        notes.close()
        target = self.out / part_name(block)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")  # process ids repeat on other nodes
        try:
            pq.write_table(self._to_arrow(batch, rows), temporary, compression="zstd", compression_level=1)
            if self.run:
                check_run(self.out, self.run)
            temporary.replace(target)
        except OSError as error:
            raise ShardError(
                f"cannot write {target}: {error.strerror or error}; free some space, then give the same command again: "
                "it goes on where it stopped"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)
        return len(rows), sum(row["status"] != "ok" for row in rows)

    def _rows(self, record: pd.Series, read: Callable[..., Reading]) -> list[dict[str, Any]]:
        """What we add to the row of one recording, and to those of its pitch-shifted copies."""
        number = int(record["_row"])
        base = {"_row": number, "row_id": str(number), "parent_id": "", "pitch_semitones": 0.0}
        base |= {"status": "ok", "error": "", "n_frames": 0, "content_hash": "", "features": None, "mel_power": None}
        config, frames = self.config, power_frames(self.config, self.options)
        windows_s = [config.window_s] + ([max(self.options.mel_power_s, config.window_s)] if frames else [])
        try:
            found = read(source_of(record["speech"]), windows_s=windows_s, sample_rate_hz=config.sample_rate_hz)
        except AudioError as error:
            return [base | {"status": error.code, "error": str(error)}]
        base |= {"content_hash": found.content_hash, "features": extract(found.clips[0].samples, config)}
        if not frames:
            return [base]
        samples = _excerpt(found.clips[1], config)
        rows = [base | _power(samples, config, frames)]
        for semitones in self.options.pitch_semitones:
            shifted = _pitch_shift(samples, config, semitones)
            copy = {"row_id": f"{number}{semitones:+g}", "parent_id": str(number), "pitch_semitones": semitones}
            copy["features"] = extract(_middle(shifted, config), config)
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


def _excerpt(whole: Clip, config: FeatureConfig) -> np.ndarray:
    """The real audio of a clip, the window at least."""
    real = min(len(whole.samples), max(config.window_samples, round(whole.scored_s * config.sample_rate_hz)))
    start = (len(whole.samples) - real) // 2
    return whole.samples[start : start + real]


def _middle(samples: np.ndarray, config: FeatureConfig) -> np.ndarray:
    start = (len(samples) - config.window_samples) // 2
    return samples[start : start + config.window_samples]


def _pitch_shift(samples: np.ndarray, config: FeatureConfig, semitones: float) -> np.ndarray:
    import librosa

    return librosa.effects.pitch_shift(samples, sr=config.sample_rate_hz, n_steps=semitones)


def power_frames(config: FeatureConfig, options: ShardOptions) -> int:
    """Frames of mel power that are kept of a recording; 0 for none."""
    if config.kind != "log_mel" or options.mel_power_s <= 0:
        return 0
    return 1 + round(max(options.mel_power_s, config.window_s) * config.sample_rate_hz) // config.hop_length


def _power(samples: np.ndarray, config: FeatureConfig, frames: int) -> dict[str, Any]:
    power = mel_power(samples, config)
    padded = np.zeros((config.n_mels, frames), np.float32)
    padded[:, : power.shape[1]] = power
    return {"mel_power": padded, "n_frames": power.shape[1]}


def _tensor(values: list[np.ndarray | None], shape: tuple[int, ...]) -> pa.Array:
    """A fixed-shape tensor column; recordings without features are zeros (their status says so)."""
    stacked = np.stack([np.zeros(shape, np.float32) if v is None else v for v in values])
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(stacked))
