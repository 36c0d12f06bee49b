"""Manifests from folders, CSV files in the forms people send, and tables."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from pipeline.corpora import (
    ManifestError,
    from_dataframe,
    label_counts,
    label_set,
    parse_ravdess,
    read_manifest,
    resolve_path,
    scan_folder,
)
from pipeline.labels import RAVDESS_LABELS, LabelError, parse_label_map


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def test_ravdess_name() -> None:
    name = parse_ravdess("03-01-06-01-02-01-12")
    assert name is not None
    assert (name.emotion, name.speaker, name.sex, name.statement) == ("fearful", "Actor_12", "female", "dogs")
    assert parse_ravdess("03-01-09-01-02-01-12") is None
    assert parse_ravdess("hello") is None


def test_nested_doubled_folders_and_songs(tmp_path: Path) -> None:
    touch(tmp_path, "Actor_02/03-01-05-01-01-01-02.wav", "Actor_01/03-01-08-02-02-01-01.flac")
    touch(tmp_path, "audio_speech/Actor_02/03-01-05-01-01-01-02.wav", "Actor_01/03-02-04-01-01-01-01.wav")
    touch(tmp_path, "Actor_01/.hidden.wav", "Actor_01/notes.txt", ".git/03-01-05-01-01-01-03.wav")
    table = scan_folder(tmp_path)
    assert [Path(p).name for p in table["speech"]] == [
        "03-01-05-01-01-01-02.wav",
        "03-01-08-02-02-01-01.flac",
    ]
    assert table["label"].tolist() == ["angry", "surprised"]
    assert all(Path(p).is_absolute() for p in table["speech"])
    with_songs = scan_folder(tmp_path, songs=True)
    assert sorted(with_songs["corpus"]) == ["RAVDESS", "RAVDESS", "RAVDESS song"]


def test_one_folder_an_emotion(tmp_path: Path) -> None:
    touch(tmp_path, "Fear/a.wav", "happiness/b.mp3")
    table = scan_folder(tmp_path)
    assert dict(zip(table["label"], table["speech"].map(lambda p: Path(p).name), strict=True)) == {
        "fearful": "a.wav",
        "happy": "b.mp3",
    }


@pytest.mark.parametrize("names", [(), ("notes.txt",), ("a.wav",)])
def test_folders_without_labelled_recordings_are_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    touch(tmp_path, *names)
    with pytest.raises(ManifestError):
        scan_folder(tmp_path)
    with pytest.raises(ManifestError, match="no folder"):
        scan_folder(tmp_path / "missing")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_encodings_separators_and_column_names(tmp_path: Path, encoding: str, separator: str) -> None:
    rows = [["File", "Emotion", "note"], ["a.wav", "Fear", "é"], ["sub\\b.wav", "3", "x"]]
    text = "\r\n".join(separator.join(row) for row in rows) + "\r\n\r\n"
    path = tmp_path / "judges.csv"
    path.write_bytes(text.encode(encoding))
    table = read_manifest(path)
    assert table["label"].tolist() == ["fearful", "fearful"]
    assert table["speech"].tolist() == [str(tmp_path / "a.wav"), str(tmp_path / "sub" / "b.wav")]
    assert table["note"].tolist() == ["é", "x"]


def test_quoted_cells_keep_separators_and_newlines(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_text('speech,label\n"a,b\nc.wav",sad\n', encoding="utf-8")
    assert read_manifest(path)["speech"].tolist() == [str(tmp_path / "a,b\nc.wav")]


def test_unlabelled_cells_are_allowed_only_when_scoring(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_text("speech,label\na.wav,\n", encoding="utf-8")
    assert read_manifest(path, require_labels=False)["label"].tolist() == [None]
    with pytest.raises(LabelError, match="row 1"):
        read_manifest(path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "empty"),
        ("speech,label\n", "no rows"),
        ("name,label\na,sad\n", "no path column"),
        ("speech,note\na.wav,x\n", "no label column"),
        ("speech,label\n,sad\n", "path is empty"),
        ("speech,label\na.wav,sad,extra\n", "row 2: 3 cells"),
        ("speech,speech,label\na,b,sad\n", "twice"),
        ("speech,label\na.wav,9\n", "outside 0..7"),
        ("\0\1\2", "not a text file"),
    ],
)
def test_bad_csv_is_one_line_that_names_the_trouble(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises((ManifestError, LabelError), match=complaint) as caught:
        read_manifest(path)
    assert "\n" not in str(caught.value)


def test_labels_outside_the_models_classes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_text("speech,label\na.wav,bored\n", encoding="utf-8")
    assert read_manifest(path)["label"].tolist() == ["bored"]
    with pytest.raises(LabelError, match="--label_map"):
        read_manifest(path, labels=["angry", "sad"])
    assert read_manifest(path, labels=["angry", "sad"], label_map={"bored": "sad"})["label"].tolist() == ["sad"]


@pytest.mark.parametrize("labels", [None, RAVDESS_LABELS])
def test_a_label_map_works_for_integers_and_aliases(tmp_path: Path, labels: tuple[str, ...] | None) -> None:
    path = tmp_path / "m.csv"
    path.write_text("speech,label\na.wav,0\nb.wav,fear\nc.wav,Anger\nd.wav,bored\n", encoding="utf-8")
    mapping = parse_label_map("0=neutral,fearful=happy,anger=Sadness,bored=joy")
    assert read_manifest(path, labels=labels, label_map=mapping)["label"].tolist() == [
        "neutral",
        "happy",
        "sad",
        "happy",
    ]
    with pytest.raises(LabelError, match="row 4, 'bored' by --label_map: unknown label 'tired'"):
        read_manifest(path, labels=RAVDESS_LABELS, label_map=parse_label_map("bored=tired"))


def test_a_label_map_works_for_folders_and_file_names(tmp_path: Path) -> None:
    touch(tmp_path, "excited/a.wav", "fear/b.wav", "scared/c.wav", "03-01-05-01-01-01-01.wav")
    table = scan_folder(tmp_path, label_map=parse_label_map("excited=happy,fear=sad,angry=disgust"))
    found = {Path(path).stem: label for path, label in zip(table["speech"], table["label"], strict=True)}
    assert found == {"a": "happy", "b": "sad", "c": "fearful", "03-01-05-01-01-01-01": "disgust"}


def test_only_an_explicit_root_fences_relative_paths(tmp_path: Path) -> None:
    root = tmp_path / "in"
    root.mkdir()
    assert resolve_path("../x.wav", root) == str(tmp_path / "x.wav")
    assert resolve_path("/elsewhere/x.wav", root, fenced=True) == "/elsewhere/x.wav"
    with pytest.raises(ManifestError, match="leaves --root"):
        resolve_path("../x.wav", root, fenced=True)
    (root / "link").symlink_to(tmp_path)
    with pytest.raises(ManifestError, match="leaves --root"):
        resolve_path("link/x.wav", root, fenced=True)


def test_a_table_keeps_further_columns_and_is_not_changed() -> None:
    given = pd.DataFrame({"path": ["/a.wav", "/b.wav"], "emotion": ["joy", "sad"], "take": [1, 2]})
    table = from_dataframe(given)
    assert list(given.columns) == ["path", "emotion", "take"]
    assert table["take"].tolist() == [1, 2]
    assert label_set(table).names == ("happy", "sad")
    assert label_counts(table, ("calm", "happy", "sad")) == {"calm": 0, "happy": 1, "sad": 1}
