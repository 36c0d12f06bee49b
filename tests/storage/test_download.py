"""Downloads against a local server: cut connections, no ranges, other files, wrong checksums, leftovers."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from web_files import FileServer, serving

from pipeline.storage.download import DownloadError, download, md5_of

CONTENT = np.random.default_rng(0).bytes(300_000)
MD5 = hashlib.md5(CONTENT).hexdigest()


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serving(CONTENT) as running:
        yield running


def fetch(server: FileServer, folder: Path, **options: Any) -> list[tuple[int, int]]:
    """The progress of a download that waits for nothing; its file must be whole and alone at the end."""
    steps: list[tuple[int, int]] = []
    path = download(
        f"{server.url}/a.zip",
        folder / "a.zip",
        **{"md5": MD5, "pause": lambda _: None, **options},
        on_progress=lambda done, total: steps.append((done, total)),
    )
    assert path.read_bytes() == CONTENT
    assert left(folder) == {"a.zip"}
    return steps


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def leave_part(folder: Path, content: bytes, note: str | None) -> None:
    (folder / "a.zip.part").write_bytes(content)
    if note is not None:
        (folder / "a.zip.part.json").write_text(note)


def test_a_file_is_fetched_whole_left_alone_when_right_and_replaced_when_wrong(
    server: FileServer, tmp_path: Path
) -> None:
    steps = fetch(server, tmp_path)
    assert (steps[0], steps[-1]) == ((0, len(CONTENT)), (len(CONTENT), len(CONTENT)))
    assert md5_of(tmp_path / "a.zip") == MD5
    fetch(server, tmp_path)
    assert server.asked == [(None, None)]
    (tmp_path / "a.zip").write_bytes(CONTENT[:-1])
    fetch(server, tmp_path)


def test_cut_connections_are_taken_up_where_they_broke_by_later_calls_too(server: FileServer, tmp_path: Path) -> None:
    server.cuts = [100_000, 0, 50_000, 0, 0]
    told: list[str] = []
    with pytest.raises(DownloadError, match=r"3 times in a row"):
        fetch(server, tmp_path, attempts=3, tell=told.append)
    assert len(told) == 4
    assert "100,000 of 300,000" in told[0]
    assert left(tmp_path) == {"a.zip.part", "a.zip.part.json"}
    assert fetch(server, tmp_path)[0][0] == 150_000
    starts = [None, 100_000, 100_000, *[150_000] * 3]
    assert server.asked == [(start and f"bytes={start}-", start and '"one"') for start in starts]


def test_attempts_that_bring_bytes_do_not_count(server: FileServer, tmp_path: Path) -> None:
    server.cuts = [30_000] * 9
    fetch(server, tmp_path, attempts=2)
    assert len(server.asked) == 10


def test_a_server_without_ranges_and_lengths_sends_all_of_it_again(server: FileServer, tmp_path: Path) -> None:
    server.ranges, server.cuts = False, [250_000]
    fetch(server, tmp_path)
    assert len(server.asked) == 2
    (tmp_path / "a.zip").unlink()
    server.tell_length = False
    assert fetch(server, tmp_path)[-1] == (len(CONTENT), 0)


def test_a_file_that_changed_meanwhile_is_fetched_anew(server: FileServer, tmp_path: Path) -> None:
    server.content, server.etag, server.cuts = b"x" * 200_000, '"old"', [150_000]
    with pytest.raises(DownloadError):
        fetch(server, tmp_path, attempts=1)
    server.content, server.etag = CONTENT, '"new"'
    fetch(server, tmp_path)
    assert server.asked[-1] == ("bytes=150000-", '"old"')


@pytest.mark.parametrize(("etag", "modified"), [(None, "Sat, 01 Jan 2022 00:00:00 GMT"), ('W/"weak"', None)])
def test_without_a_strong_etag(server: FileServer, tmp_path: Path, etag: str | None, modified: str | None) -> None:
    """A date serves as well; a weak ETag must not (RFC 9110, 13.1.5), and then the checksum alone decides."""
    server.etag, server.modified, server.cuts = etag, modified, [100_000]
    fetch(server, tmp_path)
    assert server.asked[-1] == ("bytes=100000-", modified)


@pytest.mark.parametrize(
    ("content", "validator", "asked"),
    [
        pytest.param(b"y" * 1000, "", [("bytes=1000-", None), (None, None)], id="of another file"),
        pytest.param(CONTENT, '"one"', [("bytes=300000-", '"one"')], id="complete"),
    ],
)
def test_leftovers_of_this_address_are_gone_on_with(
    server: FileServer, tmp_path: Path, content: bytes, validator: str, asked: list[tuple[str | None, str | None]]
) -> None:
    leave_part(tmp_path, content, json.dumps({"url": f"{server.url}/a.zip", "validator": validator}))
    fetch(server, tmp_path)
    assert server.asked == asked


@pytest.mark.parametrize("note", [None, "{}", "not json", '{"url": "http://elsewhere/a.zip", "validator": ""}'])
def test_leftovers_of_unknown_origin_are_dropped(server: FileServer, tmp_path: Path, note: str | None) -> None:
    leave_part(tmp_path, CONTENT[:100], note)
    fetch(server, tmp_path)
    assert server.asked == [(None, None)]


def test_a_wrong_checksum_leaves_nothing(server: FileServer, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="MD5"):
        fetch(server, tmp_path, md5="0" * 32)
    assert left(tmp_path) == set()
    assert len(server.asked) == 1
    server.cuts = [1000]
    with pytest.raises(DownloadError, match="MD5"):
        fetch(server, tmp_path, md5="0" * 32)
    assert len(server.asked) == 1 + 3, "put together of two pieces: once more in one piece, then no more"


def test_too_many_bytes_are_refused_told_or_not(server: FileServer, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="300,000 bytes, more than the limit of 1,000"):
        fetch(server, tmp_path, max_bytes=1000)
    server.tell_length = False
    with pytest.raises(DownloadError, match="limit of 100,000"):
        fetch(server, tmp_path, max_bytes=100_000)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 101_000


def test_another_range_than_was_asked_for(server: FileServer, tmp_path: Path) -> None:
    server.cuts, server.shift = [100_000], 7
    with pytest.raises(DownloadError, match="another part"):
        fetch(server, tmp_path)


def test_busy_servers_are_asked_again_refusals_are_not(server: FileServer, tmp_path: Path) -> None:
    server.statuses = [503, 429, 200]
    waits: list[float] = []
    fetch(server, tmp_path, pause=waits.append)
    assert waits == [1.0, 2.0]
    server.statuses = [404]
    with pytest.raises(DownloadError, match="404"):
        fetch(server, tmp_path / "other")


def test_nobody_who_answers(tmp_path: Path) -> None:
    options: dict[str, Any] = {"md5": MD5, "attempts": 2, "timeout_s": 0.2, "pause": lambda _: None}
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/a.zip"
        with pytest.raises(DownloadError, match=r"timed out.*2 times"):
            download(url, tmp_path / "a.zip", **options)
    with pytest.raises(DownloadError, match="no connection"):
        download(url, tmp_path / "a.zip", **options)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1/a.zip", "a.zip", "http:///a.zip"])
def test_other_addresses_are_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="URL"):
        download(url, tmp_path / "a.zip", md5=MD5)


def test_a_folder_that_cannot_be_made(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match="cannot write"):
        fetch(server, tmp_path / "file" / "below")
