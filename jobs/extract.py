"""Computes features of recordings in parallel, as Parquet shards: on Ray Data, or in processes on this machine."""

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
        help="log_mel (for the inception network, default) or frame_features (for cnn_bilstm)",
    )
    add_contract_options(parser)
    parser.add_argument(
        "--mel_power_s",
        type=float,
        default=6.0,
        help="seconds of each recording kept for random crops in training, at most 120; 0: none (default 6)",
    )
    parser.add_argument(
        "--pitch_semitones",
        type=semitones,
        default=(),
        metavar="N,...",
        help="also write pitch-shifted copies, for training with --augment pitch; for example --pitch_semitones=-1,1",
    )
    parser.add_argument("--block_rows", type=int, default=128, help="recordings in each part file (default 128)")
    add_engine(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace earlier shards in --out")
    parser.add_argument(
        "--tolerate_failures", action="store_true", help="exit with code 0 even if some recordings failed"
    )
    return parser


def add_contract_options(parser: Parser) -> None:
    """Add the options for the model's input; the features and each bundle trained on them store these settings."""
    default, group = FeatureConfig(), parser.add_argument_group("input of the model (the defaults fit the shipped one)")
    group.add_argument(
        "--window_s", type=float, default=default.window_s, help="seconds of the input window (default 2)"
    )
    group.add_argument(
        "--window",
        choices=get_args(Window),
        default=default.window,
        help="where the input window is: in the middle of the recording (default), or where most speech is, for which "
        "the whole recording is decoded",
    )
    group.add_argument("--n_mels", type=int, default=default.n_mels, help="number of mel bands (default 64)")
    group.add_argument(
        "--f_max_hz",
        type=float,
        help="upper edge of the highest mel band in Hz (default: half the sample rate, 24000)",
    )
    group.add_argument(
        "--hop_length",
        type=int,
        default=default.hop_length,
        help="samples from one frame to the next, at 48 kHz (default 512)",
    )


def semitones(text: str) -> tuple[float, ...]:
    """The numbers in ``-1,1``."""
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers separated by commas, such as -1,1, got {text!r}") from None


def add_data_options(parser: Parser) -> None:
    """Add ``--data_dir``, ``--data_csv``, ``--root``, ``--label_map`` and ``--label_names``."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--data_dir",
        type=Path,
        help="folder of labelled recordings: a known corpus, or one subfolder for each emotion (see ser manifest)",
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
    """Add ``--label_map``, for a folder or a CSV."""
    parser.add_argument(
        "--label_map",
        action=LabelMap,
        help="rename labels: old=new,...; old may be an integer (0=angry); cough=cough makes the folder cough a class",
    )


def read_data(arguments: argparse.Namespace) -> pd.DataFrame:
    """The manifest of ``--data_dir`` or ``--data_csv``.

    Raises:
        SerError: ``--root`` or ``--label_names`` with ``--data_dir``, nothing readable, or corpora that cannot be
            combined.
    """
    from pipeline.data.corpora.voices import check_corpora
    from pipeline.data.manifest import scan_folder

    if arguments.data_dir is not None:
        if arguments.root is not None:
            raise SerError(
                f"--root {arguments.root} is for the relative paths of a --data_csv; leave it out with --data_dir"
            )
        if arguments.label_names is not None:
            raise SerError(
                "--label_names is for the integer labels of a --data_csv; for a folder use --label_map old=new,..."
            )
        return scan_folder(arguments.data_dir, label_map=arguments.label_map, tell=say)
    table = read_csv(arguments)
    check_corpora(table, {*(arguments.label_map or {}).values(), *(arguments.label_names or ())})
    return table


def read_csv(arguments: argparse.Namespace) -> pd.DataFrame:
    """The manifest of ``--data_csv``, read with the options of ``add_csv_options``."""
    from pipeline.data.manifest import read_manifest

    return read_manifest(
        arguments.data_csv,
        root=arguments.root,
        label_map=arguments.label_map,
        label_names=arguments.label_names,
        tell=say,
    )


def describe_labels(table: pd.DataFrame) -> None:
    """Print the index of each class and its number of recordings."""
    from pipeline.data.manifest import label_counts

    names = sorted(set(table["label"]))
    say(f"labels: {describe(names)}")
    say("counts: " + ", ".join(f"{name} {n}" for name, n in label_counts(table, names).items()))


def job(arguments: argparse.Namespace) -> int:
    """Extract the features and print a summary."""
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
    kept = f" ({summary.reused} parts existed already)" if summary.reused else ""
    say(f"{summary.rows} rows, {summary.failed} failed, {time.monotonic() - start:.1f} s -> {summary.folder}{kept}")
    return EXIT_SOME_FAILED if summary.failed and not arguments.tolerate_failures else EXIT_DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job."""
    return run(job, build_parser(), argv)


if __name__ == "__main__":
    raise SystemExit(main())
