"""Recordings -> feature shards with Ray Data: one Parquet part a block of rows, written whole or not at all.

Each task reads its block of the manifest, computes the features, and writes ``part-NNNNN.parquet`` under a temporary
name that it renames at the end; only counts travel back. So memory does not grow with the number of recordings, order
is the manifest's, and a second run of the same extraction does only the parts that are missing. ``manifest.json`` is
written last: its presence means complete. A recording that cannot be read is a row with ``status`` and ``error``; one
that takes its decoder's process down is decoded apart at the next attempt, and becomes ``decoder_crashed``.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import pyarrow as pa

from pipeline.data.splits import HASH_COLUMN
from pipeline.features.features import FeatureConfig
from pipeline.features.shard_folder import NOTES, begin_notes, claim, hold, part_name, whole_parts
from pipeline.features.shard_parts import OUR_COLUMNS, BlockWriter, ShardOptions, power_frames
from pipeline.features.store import MANIFEST, SHARD_VERSION, ShardError, read_shard_manifest
from pipeline.models.bundle import write_json
from pipeline.storage.errors import SerError

__all__ = ["BlockWriter", "ShardOptions", "ShardSummary", "extract_shards"]

ProgressCallback = Callable[[int, int, int], None]


@dataclass(frozen=True)
class ShardSummary:
    """What an extraction left: rows (pitch-shifted copies counted), how many failed, parts reused from before."""

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
    on_progress: ProgressCallback | None = None,
) -> ShardSummary:
    """Extract the features of every recording of ``manifest`` into ``out``; a finished or begun run is continued.

    Args:
        manifest: as ``pipeline.data.manifest`` makes it; its columns are kept.
        on_progress: called with (rows done, rows in all, failed so far).

    Raises:
        ShardError: ``out`` holds another extraction, or recordings have changed since (and not ``overwrite``); it is
            a folder that is none of ours; pitch copies of other features than log-mel.
        SerError: another process extracts into ``out``, or it cannot be written.
    """
    options = options or ShardOptions()
    if options.pitch_semitones and config.kind != "log_mel":
        raise ShardError(
            f"pitch copies are made of log_mel features, not of {config.kind}; leave --pitch_semitones "
            "(or --augment pitch) out"
        )
    table = _renamed(manifest.reset_index(drop=True), config)
    with hold(out):
        return _extract(table, out, config, options, overwrite, on_progress)


def _extract(
    table: pd.DataFrame,
    out: Path,
    config: FeatureConfig,
    options: ShardOptions,
    overwrite: bool,
    on_progress: ProgressCallback | None,
) -> ShardSummary:
    """``extract_shards``, in a folder that is held."""
    blocks = [table.iloc[i : i + options.block_rows] for i in range(0, len(table), options.block_rows)]
    plan = {"plan": _fingerprint(table, config, options), "version": SHARD_VERSION, "blocks": len(blocks)}
    claim(out, plan, table["speech"].tolist(), options.block_rows, overwrite=overwrite)
    names = [part_name(i) for i in range(len(blocks))]
    if (out / MANIFEST).is_file():
        done = read_shard_manifest(out)
        return ShardSummary(out, int(done["rows"]), int(done["failed"]), len(names))
    whole = whole_parts(out, len(blocks))
    todo = [i for i in range(len(blocks)) if i not in whole]
    finished = len(table) - sum(len(blocks[i]) for i in todo)
    rows, failed = (sum(counts[k] for counts in whole.values()) for k in (0, 1))
    if todo:
        for made in out.glob("arrays-*"):  # of parts that are done again
            shutil.rmtree(made)
        run = uuid.uuid4().hex
        begin_notes(out, run)
        schema = pa.Schema.from_pandas(table, preserve_index=False)
        block = BlockWriter(out.absolute(), schema, config, options, run)
        for recordings, written, bad in _run_blocks(blocks, todo, block):
            finished, rows, failed = finished + recordings, rows + written, failed + bad
            if on_progress:
                on_progress(finished, len(table), failed)
    shutil.rmtree(out / NOTES, ignore_errors=True)
    for abandoned in out.glob(".part-*.tmp"):  # of a node that died while it wrote
        abandoned.unlink(missing_ok=True)
    values = {
        **plan,
        "features": config.to_dict(),
        "fingerprint": config.fingerprint(),
        "options": asdict(options),
        "mel_power_frames": power_frames(config, options),
        "rows": rows,
        "failed": failed,
        "parts": names,
    }
    write_json(out / MANIFEST, values)
    return ShardSummary(out, rows, failed, len(names) - len(todo))


def _renamed(manifest: pd.DataFrame, config: FeatureConfig) -> pd.DataFrame:
    """The manifest, a column NAME that collides with ours as ``in_NAME``."""
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
    as_before = table.rename(columns={f"in_{HASH_COLUMN}": HASH_COLUMN})  # hashes were kept: what was begun goes on
    digest.update(as_before.to_csv(index=False).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def _run_blocks(blocks: list[pd.DataFrame], todo: list[int], write: BlockWriter) -> Iterator[tuple[int, int, int]]:
    """Run the blocks ``todo`` on Ray Data; yields (recordings, rows, failed rows) for each as it is done.

    A block travels as one item: for a list of tables Ray Data would first run a task for each, to describe it.
    """
    import ray

    from pipeline.cluster.nodes import check_nodes
    from pipeline.cluster.runtime import data_context, start_ray, task_pool

    start_ray()
    check_nodes(write.out / NOTES, some_of=[path for i in todo for path in blocks[i]["speech"]])
    data_context()
    items = [{"block": i, "first": int(blocks[i].index[0]), "rows": _packed(blocks[i], write.schema)} for i in todo]

    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        partial(_written, write=write),
        batch_format="pyarrow",
        batch_size=None,
        zero_copy_batch=True,
        num_cpus=1,
        compute=task_pool(len(items)),
    )
    for row in dataset.iter_rows():
        if row["refusal"]:
            raise ShardError(row["refusal"])
        yield int(row["recordings"]), int(row["rows"]), int(row["failed"])


def _written(batch: pa.Table, write: BlockWriter) -> pa.Table:
    """Write the part of a block, in its task; returns what came of it. A refusal is data: Ray buries what is raised."""
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
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as stream:
        stream.write_table(pa.Table.from_pandas(rows, schema=schema, preserve_index=False))
    return bytes(sink.getvalue().to_pybytes())
