"""Manifests from tables: in the forms and encodings that people send, or told apart in one line."""

from __future__ import annotations

import csv
import json
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from jobs import score
from pipeline.audio.load import AudioError, probe
from pipeline.data.labels import RAVDESS_LABELS, LabelError, parse_label_map, parse_label_names
from pipeline.data.manifest import ManifestError, from_dataframe, label_counts, label_set, read_manifest, resolve_path
from pipeline.data.splits import split_table
from pipeline.data.tables import read_cells
from pipeline.models.bundle import Bundle
from pipeline.storage.files import is_address


def read(folder: Path, text: str, **options: Any) -> pd.DataFrame:
    """The manifest of a CSV of this text in the folder."""
    (folder / "m.csv").write_text(text, encoding="utf-8", newline="")
    return read_manifest(folder / "m.csv", **options)


def paths(folder: Path, *names: str) -> list[str]:
    return [str(folder / name) for name in names]


@pytest.mark.parametrize(
    ("text", "speech", "further"),
    [
        (
            "\ufeffFile;Emotion;note\r\na.wav;Fear;é\r\nsub\\b.wav;afraid;x\r\n\r\n",
            ["a.wav", "sub/b.wav"],
            {"label": ["fearful", "fearful"], "note": ["é", "x"]},
        ),
        ('speech,label\n"a,b\nc.wav",sad\n', ["a,b\nc.wav"], {}),
        ("\tspeech\tlabel\n0\ta.wav\tsad\n", ["a.wav"], {"": ["0"]}),  # pandas, with its index
        ("label, speech\nsad, a.wav\nsad, b.wav\n", ["a.wav", " b.wav"], {}),  # the second exists under this name
        (f"label,speech\nsad,{300 * 'x'}\\a.wav\n", [f"{300 * 'x'}/a.wav"], {}),
        (  # Excel, where commas are decimal
            "sep=;\r\nspeech;label;\r\na.wav;sad;\r\nc,d.wav;calm;;\r\n",
            ["a.wav", "c,d.wav"],
            {"label": ["sad", "calm"]},
        ),
        ("speech,label,\na.wav,sad,\nb.wav,sad,hoarse\n", ["a.wav", "b.wav"], {"": ["", "hoarse"]}),  # a remark
        (
            'speech, label, note\n"a,b.wav", "sad", "no, ""no"""\nc.wav, calm, x\n',
            ["a,b.wav", "c.wav"],
            {"label": ["sad", "calm"], "note": ['no, "no"', "x"]},
        ),
    ],
)
def test_tables_as_people_write_them(tmp_path: Path, text: str, speech: list[str], further: dict[str, Any]) -> None:
    (tmp_path / " b.wav").touch()
    found = read(tmp_path, text)
    assert found["speech"].tolist() == paths(tmp_path, *speech)
    assert {name: found[name].tolist() for name in further} == further
    assert ("" in found.columns) == ("" in further)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "empty"),
        ("sep=;\n", "empty"),
        ("speech,label\n", "no rows"),
        ("name,label\na,sad\n", "no path column"),
        ("speech,note\na.wav,x\n", "no label column"),
        ("speech,label\n,sad\n", "path is empty"),
        ("speech,label\na.wav,sad,extra\n", "line 2: 3 cells"),
        ("speech,label\nb.wav,sad\na.wav\n", "line 3: 1 cells, the header has 2; add the missing cells"),
        ("speech,label\nb.wav,sad\na.wav,x,sad\n", "line 3: 3 cells, the header has 2; .*in double quotes"),
        ("speech,speech,label\na,b,sad\n", "twice"),
        ("speech,label\na.wav,-1\n", "line 2: label -1 is below 0"),
        ("\0\1\2", "not a text file"),
        ('speech,label,note\na.wav,sad,"oops\nb.wav,sad,x\nc.wav,sad,x\n', "line 2: .*close every double quote"),
        ('speech,label\na.wav,sad\n"b".wav,sad\n', "line 3: .*close every double quote"),
        ("speech,label\na.wav," + 140_000 * "x" + "\n", "line 2: .*keep cells below 131,072"),
        ("speech,Label,label\na.wav,sad,calm\n", "twice"),
        ("Speech,speech,label\na.wav,b.wav,sad\n", "twice"),
        ("\n\nspeech,label\n\na.wav,sad\n\n,sad\n", "line 7: the path is empty"),
        ('\n\nspeech,label\n\n"a\nb.wav",sad\n\nc.wav,sad,x\n', "line 8: 3 cells"),
        ("speech,label\n\na.wav,sad\nb.wav,9\n", "line 4: the label 9 is an integer, but .*line 3 has 'sad'"),
        ("speech,label\na.wav,NaN\n", "line 2: the label is empty"),
        ("speech,label\na.wav,\n", "line 2: the label is empty"),
        ("speech,label\nfile://../../a.wav,sad\n", "line 2: 'file://../../a.wav' is not absolute"),
    ],
)
def test_bad_csv_is_one_line_that_names_the_trouble(tmp_path: Path, content: str, complaint: str) -> None:
    with pytest.raises((ManifestError, LabelError), match=complaint) as caught:
        read(tmp_path, content)
    assert "\n" not in str(caught.value)


# Encodings and other forms --------------------------------------------------------------------------------

UTF = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32")
NAMES = {encoding: ["快乐", "é", "ж"] for encoding in UTF} | {
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
    assert bool(told) != (encoding in UTF)


def test_what_the_files_say_of_an_encoding_goes_before_what_the_bytes_say(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_bytes("speech,label,note\na.wav,sad,café\n".encode("cp1252"))  # no file tells
    told: list[str] = []
    assert read_manifest(path, tell=told.append)["note"].tolist() == ["café"]
    assert "UTF-8" in told[0]
    raw = "模式".encode("gbk")
    assert len(raw.decode("utf-8")) == 2, "these bytes happen to be two letters of UTF-8"
    (tmp_path / "模式.wav").touch()
    path.write_bytes(b"speech,label\n" + raw + b".wav,sad\n")
    assert read_manifest(path)["speech"].tolist() == [str(tmp_path / "模式.wav")]


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


def test_tables_separated_by_tabs_with_quotes_that_close_nothing_and_that_do(tmp_path: Path) -> None:
    said = ['"Hello, he said', 'She said "no" twice', '"All of it."', 'and "', 'a "b', "", '""']
    lines = ["path\tsentence\temotion", *(f"{i}.wav\t{text}\tsad" for i, text in enumerate(said))]
    path = tmp_path / "m.tsv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert read_manifest(path)["sentence"].tolist() == [*said[:2], "All of it.", *said[3:6], ""]
    table = pd.DataFrame({"speech": ['a"b.wav', "c.wav"], "label": "sad", "note": ["two\nlines\tand a tab", 'x "y" z']})
    table.to_csv(path, sep="\t", index=False)
    found, numbers = read_cells(path)
    pd.testing.assert_frame_equal(found, table)
    assert numbers == [2, 4]
    table.assign(note=["plain", 'x "y" z']).to_csv(path, sep="\t", index=False, quoting=csv.QUOTE_ALL)
    assert read_cells(path)[0]["note"].tolist() == ["plain", 'x "y" z']


def test_json_lines_and_arrays_of_objects(tmp_path: Path) -> None:
    rows = [
        {"file_name": "a.wav", "label": "sad", "start": 1.5, "end": None},
        {"file_name": "sub/b.wav", "label": "calm", "tags": ["x", "é"], "end": 3},
    ]
    path = tmp_path / "m.jsonl"
    for text in ("\n\n".join(map(json.dumps, rows)), json.dumps(rows, indent=1)):
        path.write_text(text + "\n", encoding="utf-8")
        found = read_manifest(path)
        assert found["speech"].tolist() == [str(tmp_path / "a.wav"), str(tmp_path / "sub" / "b.wav")]
        assert found["label"].tolist() == ["sad", "calm"]
        assert found["tags"].tolist() == ["", '["x", "é"]']
        assert found["segment_start_s"].tolist()[0] == 1.5
    path.write_text('{"audio_filepath": "a.wav", "offset": 1, "duration": 2}\n')
    assert read_manifest(path, require_labels=False)["segment_end_s"].tolist() == [3.0]
    for text, complaint in (('{"file": "a"}\n{"fi', "line 2: "), ('{"file": "a"}\n[1]', "line 2: .*not a JSON object")):
        path.write_text(text)
        with pytest.raises(ManifestError, match=complaint):
            read_manifest(path, require_labels=False)


def test_lists_of_paths(tmp_path: Path) -> None:
    (tmp_path / "x, y.wav").touch()
    text = 'x, y.wav\r\n\r\nsub\\b.MP3\r\n"C d.flac"\r\n/abs/é.ogg\r\n'
    expected = [*(str(tmp_path / name) for name in ("x, y.wav", "sub/b.MP3", "C d.flac")), "/abs/é.ogg"]
    for mark in ("", "#EXTM3U\n#EXTINF:3,some title\n"):
        (tmp_path / "list.txt").write_bytes((mark + text).encode())
        assert read_manifest(tmp_path / "list.txt", require_labels=False)["speech"].tolist() == expected
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
        ("https://example.org/m.csv", b"", "is a URL"),
    ],
)
def test_what_is_no_table_is_named(tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    if content:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ManifestError, match=complaint):
        read_cells(tmp_path / name if content else Path(name))


def test_an_address_is_a_row_that_says_so(tmp_path: Path) -> None:
    urls = ["https://example.org/a b.wav", "HTTP://x/y.wav", "ftp://x/y.wav", "hf://datasets/x/y.wav", "az://c/k.wav"]
    (tmp_path / "m.csv").write_text("\n".join(["speech", *urls]))
    found = read_manifest(tmp_path / "m.csv", root=tmp_path, require_labels=False)["speech"].tolist()
    assert found == urls
    for url in found:
        with pytest.raises(AudioError, match="Download it first") as caught:
            probe(url)
        assert caught.value.code == "not_fetched"
        assert url in str(caught.value)
    assert not any(map(is_address, ("C:/a.wav", "C:\\a.wav", "a:b.wav", "x/http://a", "s3://b/k.wav", "file:///a.wav")))


def test_a_recording_a_pattern_and_a_list_as_input_of_score(
    tiny_bundle: Bundle, write_audio: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = [write_audio("in/a.wav"), write_audio("in/b.flac")]
    (tmp_path / "list.txt").write_text("in/a.wav\nin/b.flac\n")
    out = ["--out", str(tmp_path / "o")]
    for given, expected in ((both[0], both[:1]), (tmp_path / "in" / "*.*", both), (tmp_path / "list.txt", both)):
        arguments = score.build_parser().parse_args(["--input", str(given), *out])
        assert score.read_input(arguments, tiny_bundle)[0]["speech"].tolist() == list(map(str, expected))
    for given, complaint in ((tmp_path / "none.wav", "no file"), ("https://example.org/a.wav", "is a URL")):
        assert score.main(["--input", str(given), *out]) == 2
        assert complaint in capsys.readouterr().err


# Labels and paths --------------------------------------------------------------------------------


def test_missing_labels_as_tables_spell_them(tmp_path: Path) -> None:
    text = "speech,label\na.wav,nan\nb.wav,NA\nc.wav,NULL\nd.wav,sad\ne.wav,\n"
    found = read(tmp_path, text, require_labels=False)["label"]
    assert found.isna().tolist() == [True, True, True, False, True]
    found = read(tmp_path, text, labels=["na", "sad"], require_labels=False)["label"]
    assert found.dropna().tolist() == ["na", "sad"]


def test_labels_of_a_models_classes_and_others(tmp_path: Path) -> None:
    text = "speech,label\na.wav,bored\n"
    assert read(tmp_path, text)["label"].tolist() == ["bored"]
    with pytest.raises(LabelError, match="--label_map"):
        read(tmp_path, text, labels=["angry", "sad"])
    assert read(tmp_path, text, labels=["angry", "sad"], label_map={"bored": "sad"})["label"].tolist() == ["sad"]
    numbers = read(tmp_path, "speech,label\na.wav,01\nb.wav,03\n", labels=["01", "02", "03"])
    assert numbers["label"].tolist() == ["01", "03"]


@pytest.mark.parametrize("labels", [None, RAVDESS_LABELS])
def test_a_label_map_works_for_integers_and_aliases(tmp_path: Path, labels: tuple[str, ...] | None) -> None:
    text = "speech,label\na.wav,0\nb.wav,fear\nc.wav,Anger\nd.wav,bored\n"
    mapping = parse_label_map("0=neutral,fearful=happy,anger=Sadness,bored=joy")
    found = read(tmp_path, text, labels=labels, label_map=mapping)["label"].tolist()
    assert found == ["neutral", "happy", "sad", "happy"]
    with pytest.raises(LabelError, match="line 5, 'bored' by --label_map: unknown label 'tired'"):
        read(tmp_path, text, labels=RAVDESS_LABELS, label_map=parse_label_map("bored=tired"))


def test_only_an_explicit_root_fences_relative_paths(tmp_path: Path) -> None:
    root = tmp_path / "in"
    root.mkdir()
    assert resolve_path("../x.wav", root) == str(tmp_path / "x.wav")
    assert resolve_path("/elsewhere/x.wav", root, fenced=True) == "/elsewhere/x.wav"
    (root / "link").symlink_to(tmp_path)
    for path in ("../x.wav", "link/x.wav"):
        with pytest.raises(ManifestError, match="leaves --root"):
            resolve_path(path, root, fenced=True)


def test_a_table_keeps_further_columns_and_is_not_changed() -> None:
    given = pd.DataFrame({"path": ["/a.wav", "/b.wav"], "emotion": ["joy", "sad"], "take": [1, 2]})
    table = from_dataframe(given)
    assert list(given.columns) == ["path", "emotion", "take"]
    assert table["take"].tolist() == [1, 2]
    assert label_set(table).names == ("happy", "sad")
    assert label_counts(table, ("calm", "happy", "sad")) == {"calm": 0, "happy": 1, "sad": 1}


def test_a_split_and_speakers_are_found_whatever_their_capitals() -> None:
    given = {"Path": [f"/{i}.wav" for i in range(40)], "Label": ["sad", "calm"] * 20, "Note": "x"}
    given |= {"Speaker": ["1"] * 30 + ["2"] * 10, " Split": ["train"] * 30 + ["test"] * 10}
    table = from_dataframe(pd.DataFrame(given))
    assert list(table.columns) == ["speech", "label", "Note", "speaker", "split"]
    assert [len(part) for part in split_table(table, inner_val=0).values()] == [30, 0, 10]


RAVDESS_CODES = ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised")


def labels_of(table: pd.DataFrame, **options: Any) -> list[str]:
    return list(from_dataframe(table, **options)["label"])


def integers(numbers: Sequence[object], names: Sequence[str] = (), **columns: Sequence[object]) -> pd.DataFrame:
    """A table of recordings with these labels, by default of names that tell nothing."""
    names = names or [f"{i}.wav" for i in range(len(numbers))]
    return pd.DataFrame({"speech": names, "label": numbers, **columns})


def ravdess_files(codes: Sequence[int]) -> list[str]:
    return [f"03-01-0{code}-01-01-01-01.wav" for code in codes]


@pytest.mark.parametrize("numbers", [["0", "2", "11"], [0, 2, 11], [0.0, 2.0, 11.0], ["00", "02", "11"]])
def test_integers_of_ones_own_are_names_of_their_own(numbers: list[object]) -> None:
    told: list[str] = []
    table = from_dataframe(integers(numbers), tell=told.append)
    assert table["label"].tolist() == ["0", "2", "11"]
    assert len(told) == 1
    assert "0, 2, 11" in told[0]
    again = labels_of(integers(numbers), labels=label_set(table).names)
    assert again == ["0", "2", "11"]  # 11 is the second of the sorted names, and still called 11


def test_integers_index_the_names_that_are_given_in_any_order() -> None:
    names = parse_label_names("sad, Fear,calm")
    assert labels_of(integers([2, 0, 1]), label_names=names) == ["calm", "sad", "fearful"]
    for numbers, complaint in (([0, 3], "row 2: label 3 is outside 0..2"), (["sad", "bored"], "unknown label 'bored'")):
        with pytest.raises(LabelError, match=complaint):
            from_dataframe(integers(numbers), label_names=names)
    for wrong in ("sad,,calm", "sad,1", "fear,fearful"):
        with pytest.raises(LabelError, match="label names"):
            parse_label_names(wrong)


@pytest.mark.parametrize("option", ["label_names", "labels"])
def test_integers_that_file_names_or_words_contradict_are_refused_with_the_map_that_mends_it(option: str) -> None:
    given = {option: RAVDESS_LABELS}
    for table in (
        integers(range(8), ravdess_files(range(1, 9))),
        integers(range(8), emotion=RAVDESS_CODES),
        integers(range(8), Class_Name=["Neutral", "calm", "joy", "sadness", "anger", "fear", "disgust", "ps"]),
    ):
        with pytest.raises(LabelError, match="label 0") as caught:
            from_dataframe(table, **given)
        advice = parse_label_map(str(caught.value).rpartition("--label_map ")[2])
        assert labels_of(table, label_map=advice, **given) == list(RAVDESS_CODES)
    told: list[str] = []
    from_dataframe(integers([0, 1, 1], emotion=["sad", "calm", "calm"]), tell=told.append)
    assert "--label_map 0=sad,1=calm" in told[0]


def test_what_contradicts_no_integer_is_read_without_a_word_of_refusal() -> None:
    in_order = ravdess_files([RAVDESS_CODES.index(name) + 1 for name in RAVDESS_LABELS])
    assert labels_of(integers(range(8), in_order), labels=RAVDESS_LABELS) == list(RAVDESS_LABELS)
    coarse = integers([0, 0, 1], ravdess_files([5, 4, 3]))  # two emotions in one class of ones own
    assert labels_of(coarse, label_names=["bad", "good"]) == ["bad", "bad", "good"]
    assert labels_of(coarse) == ["0", "0", "1"]
    merged = integers([4], ravdess_files([2]))  # calm counts as neutral where there is no calm
    assert labels_of(merged, labels=[name for name in RAVDESS_LABELS if name != "calm"]) == ["neutral"]
    words = pd.DataFrame({"speech": ["a.wav"], "emotion": ["sad"]})
    assert labels_of(words, labels=RAVDESS_LABELS) == ["sad"]
    missing = from_dataframe(integers(["", "nan"]), labels=RAVDESS_LABELS, require_labels=False)
    assert missing["label"].isna().all()
