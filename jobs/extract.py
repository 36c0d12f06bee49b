"""Computes features of recordings in parallel, as Parquet shards: on Ray Data, or in processes on this machine."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from jobs._common import (
    ENGINE_OPTIONS,
    LabelMap,
    Parser,
    Progress,
    add_shared,
    command,
    exit_code,
    fields_of,
    parser_of,
    read_csv,
    say,
    tell_engine,
)
from pipeline.audio.windows import Window
from pipeline.data.labels import describe
from pipeline.features.features import KINDS, FeatureConfig
from pipeline.storage.errors import SerError

if TYPE_CHECKING:
    import pandas as pd

LABEL_MAP = "rename labels: old=new,...; old may be an integer (0=angry); cough=cough makes the folder cough a class"


def build_parser() -> Parser:
    """The options of this job."""
    parser = parser_of("extract", __doc__, "--data_csv metadata.csv --out features")
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
    add_shared(parser, *ENGINE_OPTIONS)
    parser.add_argument("--overwrite", action="store_true", help="replace earlier shards in --out")
    add_shared(parser, "tolerate_failures")
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
    add_shared(parser, "root", "label_names")
    parser.add_argument("--label_map", action=LabelMap, help=LABEL_MAP)


def read_data(arguments: argparse.Namespace) -> pd.DataFrame:
    """The manifest of ``--data_dir``, or of one or more ``--data_csv``; refuses corpora that cannot be combined.

    Of several CSVs, one without a column corpus gets its file name as corpus.
    """
    from pipeline.data.corpora.voices import check_corpora
    from pipeline.data.manifest import scan_folder

    if getattr(arguments, "data_dir", None) is not None:
        if arguments.root is not None:
            raise SerError(
                f"--root {arguments.root} is for the relative paths of a --data_csv; leave it out with --data_dir"
            )
        if arguments.label_names is not None:
            raise SerError(
                "--label_names is for the integer labels of a --data_csv; for a folder use --label_map old=new,..."
            )
        return scan_folder(arguments.data_dir, label_map=arguments.label_map, tell=say)
    csvs = arguments.data_csv if isinstance(arguments.data_csv, list) else [arguments.data_csv]
    tables = [read_csv(arguments, csv, label_names=arguments.label_names) for csv in csvs]
    table: pd.DataFrame = tables[0]
    if len(csvs) > 1:
        import pandas as pd

        named = [t if "corpus" in t.columns else t.assign(corpus=csv.stem) for t, csv in zip(tables, csvs, strict=True)]
        table = pd.concat(named, ignore_index=True).fillna("")
    check_corpora(table, {*(arguments.label_map or {}).values(), *(arguments.label_names or ())})
    return table


def labelled(features: Sequence[Path]) -> pd.DataFrame:
    """Rows of feature folders that have labels, without pitch-shifted copies."""
    from pipeline.features.store import load_features

    table = load_features(features).table
    if "label" not in table.columns:
        raise SerError(f"{features[0]} has no labels; extract it from a CSV with a label column")
    return table[table["parent_id"] == ""]


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
        kind=arguments.features_kind, **fields_of(arguments, "window_s", "window", "n_mels", "hop_length", "f_max_hz")
    )
    options = ShardOptions(**fields_of(arguments, "mel_power_s", "block_rows", "pitch_semitones"))
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
        on_progress=Progress("extract"),
        **fields_of(arguments, "overwrite", "engine", "num_cpus"),
    )
    kept = f" ({summary.reused} parts existed already)" if summary.reused else ""
    say(f"{summary.rows} rows, {summary.failed} failed, {time.monotonic() - start:.1f} s -> {summary.folder}{kept}")
    return exit_code(arguments, summary.failed)


main = command(job, build_parser)


if __name__ == "__main__":
    raise SystemExit(main())
