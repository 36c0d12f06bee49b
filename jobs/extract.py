"""Recordings -> log-mel Parquet shards, in parallel: on Ray Data, or in processes of this machine."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from jobs._common import (
    EXIT_DONE,
    EXIT_SOME_FAILED,
    LabelMap,
    Parser,
    Progress,
    add_engine,
    add_label_names,
    called,
    run,
    say,
    tell_engine,
)
from pipeline.audio.windows import Window
from pipeline.data.labels import describe
from pipeline.features.features import KINDS, FeatureConfig
from pipeline.storage.errors import SerError

if TYPE_CHECKING:
    import pandas as pd


def build_parser() -> Parser:
    """The options of this job."""
    parser = Parser(
        prog=called("extract"),
        description=__doc__,
        epilog="example: %(prog)s --data_csv metadata.csv --out features",
    )
    add_data_options(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder for part-*.parquet and manifest.json")
    parser.add_argument(
        "--features_kind",
        choices=KINDS,
        default="log_mel",
        help="log_mel (inception) or frame_features (cnn_bilstm)",
    )
    add_contract_options(parser)
    parser.add_argument(
        "--mel_power_s",
        type=float,
        default=6.0,
        help="seconds kept for training-time crops, 120 at most; 0: none (default 6)",
    )
    parser.add_argument(
        "--pitch_semitones",
        type=semitones,
        default=(),
        metavar="N,...",
        help="also extract pitch-shifted copies, for training with --augment pitch: --pitch_semitones=-1,1",
    )
    parser.add_argument("--block_rows", type=int, default=128, help="recordings a part (default 128)")
    add_engine(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace other shards in --out")
    parser.add_argument("--tolerate_failures", action="store_true", help="exit 0 even when some recordings failed")
    return parser


def add_contract_options(parser: Parser) -> None:
    """What a model hears, where it is not the default; it travels in the bundle."""
    default, group = FeatureConfig(), parser.add_argument_group("what is heard (as the shipped weights do, by default)")
    group.add_argument("--window_s", type=float, default=default.window_s, help="seconds of the window (default 2)")
    group.add_argument(
        "--window",
        choices=get_args(Window),
        default=default.window,
        help="which: the middle of a recording (default), or that with most speech, for which all of it is decoded",
    )
    group.add_argument("--n_mels", type=int, default=default.n_mels, help="mel bands (default 64)")
    group.add_argument(
        "--f_max_hz", type=float, help="top of the highest mel band (default: half the sampling rate, 24000)"
    )
    group.add_argument(
        "--hop_length", type=int, default=default.hop_length, help="samples from frame to frame at 48 kHz (default 512)"
    )


def semitones(text: str) -> tuple[float, ...]:
    """``-1,1`` as numbers."""
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers separated by commas, as -1,1, got {text!r}") from None


def add_data_options(parser: Parser) -> None:
    """``--data_dir`` or ``--data_csv`` with ``--root`` and ``--label_map``."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--data_dir",
        type=Path,
        help="folder of labelled recordings (names of a known corpus, or one folder an emotion; see ser manifest)",
    )
    source.add_argument("--data_csv", type=Path, help="CSV with the columns speech,label")
    parser.add_argument(
        "--root",
        type=Path,
        help="folder that relative paths in the CSV start from (default: the CSV's folder)",
    )
    add_label_map(parser)
    add_label_names(parser)


def add_label_map(parser: Parser) -> None:
    """``--label_map``, of a folder or a CSV."""
    parser.add_argument(
        "--label_map",
        action=LabelMap,
        help="other label names: given=wanted,...; also 0=wanted; cough=cough makes a folder's name a class",
    )


def read_data(arguments: argparse.Namespace) -> pd.DataFrame:
    """The manifest that the data options name.

    Raises:
        SerError: ``--root`` beside ``--data_dir``, nothing that can be read there, or corpora that do not go together.
    """
    from pipeline.data.corpora.voices import check_corpora
    from pipeline.data.manifest import scan_folder

    if arguments.data_dir is not None:
        if arguments.root is not None:
            raise SerError(
                f"--root {arguments.root} is for the relative paths of a --data_csv; leave it out beside --data_dir"
            )
        if arguments.label_names is not None:
            raise SerError(
                "--label_names is for the integers of a --data_csv; for a folder say --label_map given=wanted,..."
            )
        return scan_folder(arguments.data_dir, label_map=arguments.label_map, tell=say)
    table = read_csv(arguments)
    check_corpora(table, {*(arguments.label_map or {}).values(), *(arguments.label_names or ())})
    return table


def read_csv(arguments: argparse.Namespace) -> pd.DataFrame:
    """The manifest of ``--data_csv``, as the options of ``add_csv_options`` say."""
    from pipeline.data.manifest import read_manifest

    return read_manifest(
        arguments.data_csv,
        root=arguments.root,
        label_map=arguments.label_map,
        label_names=arguments.label_names,
        tell=say,
    )


def describe_labels(table: pd.DataFrame) -> None:
    """Say the label mapping and how many recordings each class has."""
    from pipeline.data.manifest import label_counts

    names = sorted(set(table["label"]))
    say(f"labels: {describe(names)}")
    say("counts: " + ", ".join(f"{name} {n}" for name, n in label_counts(table, names).items()))


def job(arguments: argparse.Namespace) -> int:
    """Extract, and say what came of it."""
    from pipeline.features.extract import ShardOptions, extract_shards, extraction_engine

    config = FeatureConfig(
        kind=arguments.features_kind,
        window_s=arguments.window_s,
        window=arguments.window,
        n_mels=arguments.n_mels,
        hop_length=arguments.hop_length,
        f_max_hz=arguments.f_max_hz,
    )
    options = ShardOptions(
        mel_power_s=arguments.mel_power_s,
        block_rows=arguments.block_rows,
        pitch_semitones=arguments.pitch_semitones,
    )
    table = read_data(arguments)
    describe_labels(table)
    say(f"extracting {len(table)} recordings -> {arguments.out}")
    tell_engine(
        arguments, extraction_engine(arguments.engine, len(table), arguments.num_cpus), f"{len(table):,} recordings"
    )
    start = time.monotonic()
    summary = extract_shards(
        table,
        arguments.out,
        config,
        options=options,
        overwrite=arguments.overwrite,
        engine=arguments.engine,
        num_cpus=arguments.num_cpus,
        on_progress=Progress("extract"),
    )
    kept = f" ({summary.reused} parts were there already)" if summary.reused else ""
    say(f"{summary.rows} rows, {summary.failed} failed, {time.monotonic() - start:.1f} s -> {summary.folder}{kept}")
    return EXIT_SOME_FAILED if summary.failed and not arguments.tolerate_failures else EXIT_DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job."""
    return run(job, build_parser(), argv)


if __name__ == "__main__":
    raise SystemExit(main())
