"""Downloads, checks and unpacks the speech part of RAVDESS (1,440 recordings of 24 actors).

To continue an interrupted download, run the same command again. The licence of RAVDESS is CC BY-NC-SA 4.0, not that of
this project.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path

from jobs._common import EXIT_DONE, Parser, Progress, command, parser_of, say
from pipeline.storage.download import download, md5_of, unpack
from pipeline.storage.errors import SerError
from pipeline.storage.journal import locked

BASE_URL = "https://zenodo.org/records/1188976/files"
ARCHIVE = "Audio_Speech_Actors_01-24.zip"
MD5 = "bc696df654c87fed845eb13823edef8a"
NOTICE_FILE = "LICENSE_RAVDESS.txt"  # written last: if it exists, the folder is complete
NOTICE = """\
The Ryerson Audio-Visual Database of Emotional Speech and Song (RAVDESS), speech, audio only.
Livingstone SR, Russo FA (2018). PLoS ONE 13(5): e0196391. https://doi.org/10.1371/journal.pone.0196391
Record: https://doi.org/10.5281/zenodo.1188976
Licence: CC BY-NC-SA 4.0, https://creativecommons.org/licenses/by-nc-sa/4.0/
Name the source; no commercial use; if you distribute something built on it, use the same licence.
"""


def build_parser() -> Parser:
    """The options of this job."""
    parser = parser_of("ravdess", __doc__, "--out RAVDESS")
    parser.add_argument("--out", type=Path, default=Path("RAVDESS"), help="folder to make (default RAVDESS)")
    parser.add_argument(
        "--base_url",
        default=BASE_URL,
        help=f"address of the folder with {ARCHIVE}, for example of a mirror (default: RAVDESS's record on Zenodo)",
    )
    parser.add_argument(
        "--md5", type=str.lower, default=MD5, help="MD5 checksum of the archive (default: that of the Zenodo record)"
    )
    parser.add_argument("--archive", type=Path, help="use this archive, which you downloaded before; download nothing")
    parser.add_argument("--keep_archive", action="store_true", help="keep the archive in OUT.download")
    return parser


def job(arguments: argparse.Namespace) -> int:
    """Download the archive if needed, unpack it, print what it holds."""
    from pipeline.data.manifest import scan_folder

    out: Path = arguments.out
    say(NOTICE)
    if (out / NOTICE_FILE).is_file():
        say(f"{out} is complete; nothing to do")
        return EXIT_DONE
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SerError(f"{out} holds other files; choose another --out")
    place = out.resolve()  # the target of a link, as the unpacked folder is renamed to it
    if place == Path.cwd():
        raise SerError(f"--out {out} is the current folder; give a new folder, such as --out RAVDESS")
    partial = place.with_name(f"{place.name}.download")
    with locked(partial / ".lock", f"fetching {out}"):
        archive = _archive(arguments, partial)
        say(f"the checksum is right; unpacking {archive}")
        tree = partial / "tree"
        shutil.rmtree(tree, ignore_errors=True)  # of a run that was killed
        unpack(archive, tree, on_progress=_megabytes("unpack"))
        found = scan_folder(tree)
        (tree / NOTICE_FILE).write_text(NOTICE, encoding="utf-8")
        if place.is_dir():
            place.rmdir()
        tree.rename(place)
        if not arguments.keep_archive:
            shutil.rmtree(partial, ignore_errors=True)
    speakers = found["speaker"].nunique() if "speaker" in found else 0
    print(f"{len(found):,} recordings of {speakers} actors -> {out}")
    say(f"next: ser manifest {out} --out metadata.csv")
    return EXIT_DONE


def _archive(arguments: argparse.Namespace, folder: Path) -> Path:
    """The archive, its checksum verified: that of ``--archive``, or the downloaded one."""
    given: Path | None = arguments.archive
    if given is None:
        return download(
            f"{arguments.base_url.rstrip('/')}/{ARCHIVE}",
            folder / ARCHIVE,
            md5=arguments.md5,
            on_progress=_megabytes("download"),
            tell=say,
        )
    if not given.is_file():
        raise SerError(f"no file {given}; leave --archive out to download it")
    if md5_of(given) != arguments.md5:
        raise SerError(
            f"the MD5 checksum of {given} is not {arguments.md5}: it is damaged or another file; download it again"
        )
    return given


def _megabytes(what: str) -> Callable[[int, int], None]:
    """A function that shows progress in whole megabytes, called with bytes done and bytes in total."""
    progress = Progress(what, unit="MB")
    return lambda done, total: progress(done // 1_000_000, total // 1_000_000)


main = command(job, build_parser)


if __name__ == "__main__":
    raise SystemExit(main())
