"""Tables in other encodings and forms: read as they were meant, or told apart in one line."""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from jobs import score
from pipeline.audio.load import AudioError, probe
from pipeline.data.manifest import ManifestError, read_manifest, resolve_path
from pipeline.data.tables import read_cells
from pipeline.models.bundle import Bundle
from pipeline.storage.files import is_address

NAMES = {
    "utf-8": ["快乐", "é", "ж"],
    "utf-8-sig": ["快乐", "é", "ж"],
    "utf-16": ["快乐", "é", "ж"],
    "utf-16-le": ["快乐", "é", "ж"],
    "utf-16-be": ["快乐", "é", "ж"],
    "utf-32": ["快乐", "é", "ж"],
    "gbk": ["快乐", "愤怒"],
    "gb18030": ["快乐", "𠮷"],
    "cp932": ["怒り", "ソ表"],  # the second bytes of these two are a back-slash
    "big5": ["快樂", "功"],
    "cp949": ["행복"],
    "cp1252": ["café", "Ärger"],
    "cp1251": ["радость"],
    "mac_roman": ["café", "Ärger"],
}


@pytest.mark.parametrize("encoding", NAMES)
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_the_files_that_are_there_tell_the_encoding(tmp_path: Path, encoding: str, separator: str) -> None:
    names = NAMES[encoding]
    for name in names:
        (tmp_path / f"{name}.wav").touch()
    lines = [separator.join(("path", "label", "said")), *(separator.join((f"{n}.wav", "sad", n)) for n in names)]
    (tmp_path / "m.csv").write_bytes("\r\n".join(lines).encode(encoding))
    told: list[str] = []
    found = read_manifest(tmp_path / "m.csv", tell=told.append)
    assert found["speech"].tolist() == [str(tmp_path / f"{name}.wav") for name in names]
    assert found["said"].tolist() == names
    assert bool(told) != encoding.startswith("utf")


def test_an_encoding_that_no_file_confirms_is_told(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_bytes("speech,label,note\na.wav,sad,café\n".encode("cp1252"))
    told: list[str] = []
    assert read_manifest(tmp_path / "m.csv", tell=told.append)["note"].tolist() == ["café"]
    assert "save it as UTF-8" in told[0]


def test_bytes_that_happen_to_be_utf8_are_read_as_what_is_there(tmp_path: Path) -> None:
    raw = "模式".encode("gbk")  # two letters of UTF-8
    assert len(raw.decode("utf-8")) == 2
    (tmp_path / "模式.wav").touch()
    (tmp_path / "m.csv").write_bytes(b"speech,label\n" + raw + b".wav,sad\n")
    assert read_manifest(tmp_path / "m.csv")["speech"].tolist() == [str(tmp_path / "模式.wav")]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_in_the_other_unicode_form_are_found(tmp_path: Path, form: str) -> None:
    other = "NFD" if form == "NFC" else "NFC"
    folder, name = unicodedata.normalize(other, "Grüße"), unicodedata.normalize(form, "café.wav")
    (tmp_path / folder).mkdir()
    (tmp_path / folder / name).touch()
    for given in ("NFC", "NFD"):
        asked = unicodedata.normalize(given, "Grüße/café.wav")
        assert resolve_path(asked, tmp_path) == str(tmp_path / folder / name)
        assert resolve_path(str(tmp_path / asked), tmp_path) == str(tmp_path / folder / name)
    assert resolve_path("Größe.wav", tmp_path) == str(tmp_path / "Größe.wav")


def test_tables_separated_by_tabs_keep_the_quotes_that_close_nothing(tmp_path: Path) -> None:
    said = ['"Hello, he said', 'She said "no" twice', '"All of it."', 'and "', 'a "b', "", '""']
    lines = ["path\tsentence\temotion", *(f"{i}.wav\t{text}\tsad" for i, text in enumerate(said))]
    (tmp_path / "cv.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = read_manifest(tmp_path / "cv.tsv")
    assert len(found) == len(said)
    assert found["sentence"].tolist() == [*said[:2], "All of it.", *said[3:6], ""]


def test_tables_separated_by_tabs_that_are_quoted_are_read_so(tmp_path: Path) -> None:
    table = pd.DataFrame({"speech": ['a"b.wav', "c.wav"], "label": "sad", "note": ["two\nlines\tand a tab", 'x "y" z']})
    table.to_csv(tmp_path / "m.tsv", sep="\t", index=False)
    found, lines = read_cells(tmp_path / "m.tsv")
    pd.testing.assert_frame_equal(found, table)
    assert lines == [2, 4]
    table.assign(note=["plain", 'x "y" z']).to_csv(tmp_path / "m.tsv", sep="\t", index=False, quoting=csv.QUOTE_ALL)
    assert read_cells(tmp_path / "m.tsv")[0]["note"].tolist() == ["plain", 'x "y" z']


def test_json_lines_and_arrays_of_objects(tmp_path: Path) -> None:
    rows = [
        {"file_name": "a.wav", "label": "sad", "start": 1.5, "end": None},
        {"file_name": "sub/b.wav", "label": "calm", "tags": ["x", "é"], "end": 3},
    ]
    forms = {"m.jsonl": "\n\n".join(map(json.dumps, rows)), "m.json": json.dumps(rows, indent=1)}
    for name, text in forms.items():
        (tmp_path / name).write_text(text + "\n", encoding="utf-8")
        found = read_manifest(tmp_path / name)
        assert found["speech"].tolist() == [str(tmp_path / "a.wav"), str(tmp_path / "sub" / "b.wav")]
        assert found["label"].tolist() == ["sad", "calm"]
        assert found["tags"].tolist() == ["", '["x", "é"]']
        assert found["segment_start_s"].tolist()[0] == 1.5
    (tmp_path / "n.jsonl").write_text('{"audio_filepath": "a.wav", "offset": 1, "duration": 2}\n')
    assert read_manifest(tmp_path / "n.jsonl", require_labels=False)["segment_end_s"].tolist() == [3.0]
    for text, complaint in (
        ('{"file": "a.wav"}\n{"fi', "line 2: "),
        ('{"file": "a"}\n[1]', "line 2: .*not a JSON object"),
    ):
        (tmp_path / "n.jsonl").write_text(text)
        with pytest.raises(ManifestError, match=complaint):
            read_manifest(tmp_path / "n.jsonl", require_labels=False)


def test_lists_of_paths(tmp_path: Path) -> None:
    (tmp_path / "x, y.wav").touch()
    text = 'x, y.wav\r\n\r\nsub\\b.MP3\r\n"C d.flac"\r\n/abs/é.ogg\r\n'
    for mark in ("", "#EXTM3U\n#EXTINF:3,some title\n"):
        (tmp_path / "list.txt").write_bytes((mark + text).encode())
        found = read_manifest(tmp_path / "list.txt", require_labels=False)
        expected = [*(str(tmp_path / name) for name in ("x, y.wav", "sub/b.MP3", "C d.flac")), "/abs/é.ogg"]
        assert found["speech"].tolist() == expected
    (tmp_path / "list.txt").write_text("sad,a.wav\ncalm,b.wav\n")  # a table without its header
    with pytest.raises(ManifestError, match="no path column"):
        read_manifest(tmp_path / "list.txt", require_labels=False)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.wav", b"RIFF", "is a recording.*ser score"),
        ("a.parquet", b"PAR1....", "is Parquet"),
        ("a.xlsx", b"PK\3\4....", "save it as CSV"),
        ("a.xls", b"\xd0\xcf\x11\xe0....", "save it as CSV"),
        ("a.csv", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        ("a.csv", bytes(range(256)), "not a text file"),
    ],
)
def test_what_is_no_table_is_named(tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ManifestError, match=complaint):
        read_cells(tmp_path / name)
    with pytest.raises(ManifestError, match="is a URL"):
        read_cells(Path("https://example.org/m.csv"))


@pytest.mark.parametrize(
    "address",
    ["https://example.org/a b.wav", "HTTP://x/y.wav", "ftp://x/y.wav", "hf://datasets/x/y.wav", "az://c/k.wav"],
)
def test_an_address_is_a_row_that_says_so(tmp_path: Path, address: str) -> None:
    (tmp_path / "m.csv").write_text(f"speech\n{address}\n")
    found = read_manifest(tmp_path / "m.csv", root=tmp_path, require_labels=False)["speech"].tolist()
    assert found == [address]
    with pytest.raises(AudioError, match="Download it first") as caught:
        probe(found[0])
    assert caught.value.code == "not_fetched"
    assert address in str(caught.value)


def test_paths_that_look_a_little_like_addresses_are_none() -> None:
    assert not any(map(is_address, ("C:/a.wav", "C:\\a.wav", "a:b.wav", "x/http://a", "s3://b/k.wav", "file:///a.wav")))


def test_a_recording_a_pattern_and_a_list_as_input_of_score(
    tiny_bundle: Bundle, write_audio: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = write_audio("in/a.wav"), write_audio("in/b.flac")
    (tmp_path / "list.txt").write_text("in/a.wav\nin/b.flac\n")
    for given, expected in (
        (first, [first]),
        (tmp_path / "in" / "*.*", [first, second]),
        (tmp_path / "list.txt", [first, second]),
    ):
        arguments = score.build_parser().parse_args(["--input", str(given), "--out", str(tmp_path / "o")])
        table, _ = score.read_input(arguments, tiny_bundle)
        assert table["speech"].tolist() == list(map(str, expected))
    for given, complaint in ((tmp_path / "none.wav", "no file"), ("https://example.org/a.wav", "is a URL")):
        assert score.main(["--input", str(given), "--out", str(tmp_path / "o")]) == 2
        assert complaint in capsys.readouterr().err


def test_a_table_of_many_lines_is_read_once(tmp_path: Path) -> None:
    """What decides nothing must not be read again in a dozen encodings."""
    text = io.StringIO()
    pd.DataFrame({"speech": [f"{i}.wav" for i in range(20_000)], "note": "é"}).to_csv(text, index=False)
    (tmp_path / "m.csv").write_text(text.getvalue(), encoding="utf-8")
    found, lines = read_cells(tmp_path / "m.csv")
    assert (len(found), lines[-1], found["note"].iloc[-1]) == (20_000, 20_001, "é")
