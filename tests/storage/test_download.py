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


def fetch(server: FileServer, folder: Path, **options: Any) -> tuple[bytes, list[str], list[tuple[int, int]]]:
    """What was fetched, what was told, and the progress; waits for nothing."""
    told: list[str] = []
    steps: list[tuple[int, int]] = []
    path = download(
        f"{server.url}/a.zip",
        folder / "a.zip",
        **{"md5": MD5, "pause": lambda _: None, "tell": told.append, **options},
        on_progress=lambda done, total: steps.append((done, total)),
    )
    return path.read_bytes(), told, steps


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_whole_at_once(server: FileServer, tmp_path: Path) -> None:
    found, told, steps = fetch(server, tmp_path)
    assert found == CONTENT
    assert told == []
    assert server.asked == [(None, None)]
    assert left(tmp_path) == {"a.zip"}
    assert steps[0] == (0, len(CONTENT))
    assert steps[-1] == (len(CONTENT), len(CONTENT))
    assert md5_of(tmp_path / "a.zip") == MD5


def test_cut_connections_are_taken_up_where_they_broke(server: FileServer, tmp_path: Path) -> None:
    server.cuts = [100_000, 0, 50_000, None]
    found, told, _ = fetch(server, tmp_path)
    assert found == CONTENT
    assert [asked for asked, _ in server.asked] == [None, "bytes=100000-", "bytes=100000-", "bytes=150000-"]
    assert {condition for _, condition in server.asked[1:]} == {'"one"'}
    assert len(told) == 3
    assert "100,000 of 300,000" in told[0]


def test_a_later_call_goes_on(server: FileServer, tmp_path: Path) -> None:
    server.cuts = [200_000, 0, 0]
    with pytest.raises(DownloadError, match=r"3 times in a row"):
        fetch(server, tmp_path, attempts=3)
    assert left(tmp_path) == {"a.zip.part", "a.zip.part.json"}
    found, _, steps = fetch(server, tmp_path)
    assert found == CONTENT
    assert server.asked[-1] == ("bytes=200000-", '"one"')
    assert steps[0][0] == 200_000


def test_attempts_that_bring_bytes_do_not_count(server: FileServer, tmp_path: Path) -> None:
    server.cuts = [30_000] * 9
    found, told, _ = fetch(server, tmp_path, attempts=2)
    assert found == CONTENT
    assert len(told) == 9


def test_a_server_without_ranges_sends_all_of_it_again(server: FileServer, tmp_path: Path) -> None:
    server.ranges = False
    server.cuts = [250_000]
    assert fetch(server, tmp_path)[0] == CONTENT
    assert len(server.asked) == 2


def test_a_file_that_changed_meanwhile_is_fetched_anew(server: FileServer, tmp_path: Path) -> None:
    server.content, server.etag, server.cuts = b"x" * 200_000, '"old"', [150_000]
    with pytest.raises(DownloadError):
        fetch(server, tmp_path, attempts=1)
    server.content, server.etag = CONTENT, '"new"'
    assert fetch(server, tmp_path)[0] == CONTENT
    assert server.asked[-1] == ("bytes=150000-", '"old"')


@pytest.mark.parametrize(("etag", "modified"), [(None, "Sat, 01 Jan 2022 00:00:00 GMT"), ('W/"weak"', None)])
def test_without_a_strong_etag(server: FileServer, tmp_path: Path, etag: str | None, modified: str | None) -> None:
    """A date serves as well; a weak ETag must not (RFC 9110, 13.1.5), and then the checksum alone decides."""
    server.etag, server.modified, server.cuts = etag, modified, [100_000]
    assert fetch(server, tmp_path)[0] == CONTENT
    assert server.asked[-1] == ("bytes=100000-", modified)


def test_pieces_of_two_files_are_noticed_and_fetched_once_more(server: FileServer, tmp_path: Path) -> None:
    server.etag = None
    (tmp_path / "a.zip.part").write_bytes(b"y" * 1000)
    (tmp_path / "a.zip.part.json").write_text(json.dumps({"url": f"{server.url}/a.zip", "validator": ""}))
    assert fetch(server, tmp_path)[0] == CONTENT
    assert [asked for asked, _ in server.asked] == ["bytes=1000-", None]


@pytest.mark.parametrize("note", [None, "{}", "not json", '{"url": "http://elsewhere/a.zip", "validator": ""}'])
def test_leftovers_of_unknown_origin_are_dropped(server: FileServer, tmp_path: Path, note: str | None) -> None:
    (tmp_path / "a.zip.part").write_bytes(CONTENT[:100])
    if note is not None:
        (tmp_path / "a.zip.part.json").write_text(note)
    assert fetch(server, tmp_path)[0] == CONTENT
    assert server.asked == [(None, None)]


def test_a_part_that_is_complete_already(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "a.zip.part").write_bytes(CONTENT)
    (tmp_path / "a.zip.part.json").write_text(json.dumps({"url": f"{server.url}/a.zip", "validator": '"one"'}))
    assert fetch(server, tmp_path)[0] == CONTENT
    assert server.asked == [(f"bytes={len(CONTENT)}-", '"one"')]


def test_a_finished_file_is_left_alone_and_a_wrong_one_replaced(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(CONTENT)
    assert fetch(server, tmp_path)[0] == CONTENT
    assert server.asked == []
    (tmp_path / "a.zip").write_bytes(CONTENT[:-1])
    assert fetch(server, tmp_path)[0] == CONTENT


def test_a_wrong_checksum_leaves_nothing(server: FileServer, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="another MD5 checksum"):
        fetch(server, tmp_path, md5="0" * 32)
    assert left(tmp_path) == set()
    assert len(server.asked) == 1
    server.cuts = [1000]
    with pytest.raises(DownloadError, match="another MD5 checksum"):
        fetch(server, tmp_path, md5="0" * 32)
    assert len(server.asked) == 1 + 3, "put together of two pieces: once more in one piece, then no more"


def test_too_many_bytes_are_refused_told_or_not(server: FileServer, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="300,000 bytes, more than the limit of 1,000"):
        fetch(server, tmp_path, max_bytes=1000)
    server.tell_length = False
    with pytest.raises(DownloadError, match="larger than the limit of 100,000"):
        fetch(server, tmp_path, max_bytes=100_000)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 101_000


def test_no_length_told(server: FileServer, tmp_path: Path) -> None:
    server.tell_length = False
    found, _, steps = fetch(server, tmp_path)
    assert found == CONTENT
    assert steps[-1] == (len(CONTENT), 0)


def test_another_range_than_was_asked_for(server: FileServer, tmp_path: Path) -> None:
    server.cuts, server.shift = [100_000], 7
    with pytest.raises(DownloadError, match="another part of the file"):
        fetch(server, tmp_path)


def test_busy_servers_are_asked_again_refusals_are_not(server: FileServer, tmp_path: Path) -> None:
    server.statuses = [503, 429, 200]
    waits: list[float] = []
    assert fetch(server, tmp_path, pause=waits.append)[0] == CONTENT
    assert waits == [1.0, 2.0]
    server.statuses = [404]
    with pytest.raises(DownloadError, match="404"):
        fetch(server, tmp_path / "other")


def test_a_silent_server_is_left_after_the_timeout(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/a.zip"
        with pytest.raises(DownloadError, match=r"timed out.*2 times in a row"):
            download(url, tmp_path / "a.zip", md5=MD5, attempts=2, timeout_s=0.2, pause=lambda _: None)


def test_nobody_listens(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/a.zip"
    with pytest.raises(DownloadError, match="no connection"):
        download(url, tmp_path / "a.zip", md5=MD5, attempts=1)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1/a.zip", "a.zip", "http:///a.zip"])
def test_other_addresses_are_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="not an http or https URL"):
        download(url, tmp_path / "a.zip", md5=MD5)


def test_a_folder_that_cannot_be_made(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match="cannot write"):
        fetch(server, tmp_path / "file" / "below")
