"""Writes a CSV (manifest) of a folder of labelled recordings: ``ser manifest DIR --out metadata.csv``."""

from __future__ import annotations

import argparse
from pathlib import Path

from jobs._common import EXIT_DONE, LabelMap, Parser, command, fields_of, parser_of, say
from jobs.extract import LABEL_MAP, describe_labels
from pipeline.data.corpora import CORPORA
from pipeline.data.tables import ManifestError, write_csv


def build_parser() -> Parser:
    """The options of this job."""
    parser = parser_of("manifest", __doc__, "RAVDESS --out metadata.csv")
    parser.add_argument(
        "folder", type=Path, help="folder of recordings: known corpora, or one subfolder for each emotion"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="CSV to write, with the columns speech,label,speaker,..."
    )
    parser.add_argument(
        "--corpus",
        choices=[corpus.name for corpus in CORPORA],
        help="use recordings of this corpus only (default: all known corpora in the folder, recognised by file names)",
    )
    parser.add_argument(
        "--songs",
        action="store_true",
        help="also use the songs of RAVDESS (default: its speech only; a folder with only songs needs no option)",
    )
    parser.add_argument(
        "--keep_classes",
        action="store_true",
        help="keep classes that the models here do not have, such as boredom in EmoDB (default: left out)",
    )
    parser.add_argument("--label_map", action=LabelMap, help=LABEL_MAP)
    return parser


def job(arguments: argparse.Namespace) -> int:
    """Write the manifest and print its classes."""
    from pipeline.data.manifest import scan_folder

    out: Path = arguments.out
    replaced = _is_manifest(out)
    table = scan_folder(
        arguments.folder, tell=say, **fields_of(arguments, "corpus", "songs", "keep_classes", "label_map")
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_csv(table, out)
    except OSError as error:
        raise ManifestError(f"cannot write {out}: {error.strerror}; choose another --out") from error
    say(f"{len(table)} recordings -> {out}{' (replaced)' if replaced else ''}")
    describe_labels(table)
    return EXIT_DONE


def _is_manifest(out: Path) -> bool:
    """Whether ``out`` is an earlier manifest, which may be replaced; any other file or folder is refused."""
    if out.is_dir():
        raise ManifestError(f"--out {out} is a folder; give the name of the CSV file to write")
    if not out.is_file():
        return False
    with out.open("rb") as file:
        header = file.readline(100).replace(b'"', b"")
    if not header or header.startswith(b"speech,label"):
        return True
    raise ManifestError(f"{out} exists already and is no manifest of this command; choose another --out")


main = command(job, build_parser)


if __name__ == "__main__":
    raise SystemExit(main())
