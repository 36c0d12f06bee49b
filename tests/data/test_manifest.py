"""Manifests from CSV files in the forms people send, and from tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest

from pipeline.data.labels import RAVDESS_LABELS, LabelError, parse_label_map, parse_label_names
from pipeline.data.manifest import (
    ManifestError,
    from_dataframe,
    label_counts,
    label_set,
    read_manifest,
    resolve_path,
)
from pipeline.data.splits import split_table
from pipeline.storage.errors import SerError


def test_column_names_and_paths_as_people_write_them(tmp_path: Path) -> None:
    """Encodings and separators are in test_cells."""
    rows = [["File", "Emotion", "note"], ["a.wav", "Fear", "é"], ["sub\\b.wav", "afraid", "x"]]
    path = tmp_path / "judges.csv"
    path.write_bytes(("\r\n".join(";".join(row) for row in rows) + "\r\n\r\n").encode("utf-8-sig"))
    table = read_manifest(path)
    assert table["label"].tolist() == ["fearful", "fearful"]
    assert table["speech"].tolist() == [str(tmp_path / "a.wav"), str(tmp_path / "sub" / "b.wav")]
    assert table["note"].tolist() == ["é", "x"]


def test_a_row_with_too_few_or_too_many_cells_is_told_with_its_own_remedy(tmp_path: Path) -> None:
    path = tmp_path / "short.csv"
    for row, remedy in (("a.wav", "add the missing cells, or a ','"), ("a.wav,x,sad", "in double quotes")):
        path.write_text(f"speech,label\nb.wav,sad\n{row}\n")
        with pytest.raises(SerError, match=rf"line 3: \d cells, the header has 2; .*{remedy}"):
            read_manifest(path)


def test_quoted_cells_keep_separators_and_newlines(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_text('speech,label\n"a,b\nc.wav",sad\n', encoding="utf-8")
    assert read_manifest(path)["speech"].tolist() == [str(tmp_path / "a,b\nc.wav")]


def test_unlabelled_cells_are_allowed_only_when_scoring(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_text("speech,label\na.wav,\n", encoding="utf-8")
    assert read_manifest(path, require_labels=False)["label"].tolist() == [None]
    with pytest.raises(LabelError, match="line 2"):
        read_manifest(path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "empty"),
        ("speech,label\n", "no rows"),
        ("name,label\na,sad\n", "no path column"),
        ("speech,note\na.wav,x\n", "no label column"),
        ("speech,label\n,sad\n", "path is empty"),
        ("speech,label\na.wav,sad,extra\n", "line 2: 3 cells"),
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
        ("speech,label\nfile://../../a.wav,sad\n", "line 2: 'file://../../a.wav' is not absolute"),
    ],
)
def test_bad_csv_is_one_line_that_names_the_trouble(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises((ManifestError, LabelError), match=complaint) as caught:
        read_manifest(path)
    assert "\n" not in str(caught.value)


def test_missing_labels_as_tables_spell_them(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_text("speech,label\na.wav,nan\nb.wav,NA\nc.wav,NULL\nd.wav,sad\n", encoding="utf-8")
    found = read_manifest(path, require_labels=False)["label"]
    assert found.isna().tolist() == [True, True, True, False]
    found = read_manifest(path, labels=["na", "sad"], require_labels=False)["label"]
    assert found.dropna().tolist() == ["na", "sad"]


def test_cells_as_other_programs_write_them(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_text("\tspeech\tlabel\n0\ta.wav\tsad\n", encoding="utf-8")  # pandas, with its index
    assert read_manifest(path)["speech"].tolist() == [str(tmp_path / "a.wav")]
    (tmp_path / " b.wav").touch()
    long = 300 * "x" + "\\a.wav"
    path.write_text(f"label, speech\nsad, a.wav\nsad, b.wav\nsad,{long}\n", encoding="utf-8")
    expected = [tmp_path / "a.wav", tmp_path / " b.wav", tmp_path / (300 * "x") / "a.wav"]
    assert read_manifest(path)["speech"].tolist() == [str(p) for p in expected]
    path.write_bytes(b"sep=;\r\nspeech;label;\r\na.wav;sad;\r\nc,d.wav;calm;;\r\n")  # Excel, where commas are decimal
    found = read_manifest(path)
    assert (found["speech"].tolist(), list(found["label"])) == (
        [str(tmp_path / "a.wav"), str(tmp_path / "c,d.wav")],
        ["sad", "calm"],
    )
    assert "" not in found.columns
    path.write_text("speech,label,\na.wav,sad,\nb.wav,sad,hoarse\n")  # a remark beside the table
    assert read_manifest(path)[""].tolist() == ["", "hoarse"]
    path.write_text('speech, label, note\n"a,b.wav", "sad", "no, ""no"""\nc.wav, calm, x\n')
    found = read_manifest(path)
    assert found["speech"].tolist() == [str(tmp_path / "a,b.wav"), str(tmp_path / "c.wav")]
    assert (found["label"].tolist(), found["note"].tolist()) == (["sad", "calm"], ['no, "no"', "x"])
    path.write_text("sep=;\n")
    with pytest.raises(ManifestError, match="is empty"):
        read_manifest(path)


def test_classes_that_are_numbers_are_found_by_name(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_text("speech,label\na.wav,01\nb.wav,03\n", encoding="utf-8")
    assert read_manifest(path, labels=["01", "02", "03"])["label"].tolist() == ["01", "03"]


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
    with pytest.raises(LabelError, match="line 5, 'bored' by --label_map: unknown label 'tired'"):
        read_manifest(path, labels=RAVDESS_LABELS, label_map=parse_label_map("bored=tired"))


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


def test_a_split_and_speakers_are_found_whatever_their_capitals() -> None:
    given = {"Path": [f"/{i}.wav" for i in range(40)], "Label": ["sad", "calm"] * 20, "Note": "x"}
    given |= {"Speaker": ["1"] * 30 + ["2"] * 10, " Split": ["train"] * 30 + ["test"] * 10}
    table = from_dataframe(pd.DataFrame(given))
    assert list(table.columns) == ["speech", "label", "Note", "speaker", "split"]
    assert {name: len(part) for name, part in split_table(table, inner_val=0).items()} == {
        "train": 30,
        "inner_val": 0,
        "test": 10,
    }


def test_a_table_keeps_further_columns_and_is_not_changed() -> None:
    given = pd.DataFrame({"path": ["/a.wav", "/b.wav"], "emotion": ["joy", "sad"], "take": [1, 2]})
    table = from_dataframe(given)
    assert list(given.columns) == ["path", "emotion", "take"]
    assert table["take"].tolist() == [1, 2]
    assert label_set(table).names == ("happy", "sad")
    assert label_counts(table, ("calm", "happy", "sad")) == {"calm": 0, "happy": 1, "sad": 1}


RAVDESS_CODES = ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised")


def integers(numbers: Sequence[object], names: Sequence[str] = (), **columns: Sequence[object]) -> pd.DataFrame:
    """A table of recordings with these labels, by default of names that tell nothing."""
    names = names or [f"{i}.wav" for i in range(len(numbers))]
    return pd.DataFrame({"speech": names, "label": numbers, **columns})


def ravdess_files(codes: Sequence[int]) -> list[str]:
    return [f"03-01-0{code}-01-01-01-01.wav" for code in codes]


@pytest.mark.parametrize("numbers", [["0", "2", "11"], [0, 2, 11], [0.0, 2.0, 11.0], ["00", "02", "11"]])
def test_integers_of_ones_own_are_names_of_their_own(numbers: list[object]) -> None:
    told: list[str] = []
    found = from_dataframe(integers(numbers), tell=told.append)["label"].tolist()
    assert found == ["0", "2", "11"]
    assert len(told) == 1
    assert "0, 2, 11" in told[0]
    again = from_dataframe(integers(numbers), labels=label_set(from_dataframe(integers(numbers))).names)
    assert again["label"].tolist() == found  # 11 is the second of the sorted names, and still called 11


def test_integers_index_the_names_that_are_given_in_any_order() -> None:
    names = parse_label_names("sad, Fear,calm")
    assert from_dataframe(integers([2, 0, 1]), label_names=names)["label"].tolist() == ["calm", "sad", "fearful"]
    for numbers, complaint in (([0, 3], "row 2: label 3 is outside 0..2"), (["sad", "bored"], "unknown label 'bored'")):
        with pytest.raises(LabelError, match=complaint):
            from_dataframe(integers(numbers), label_names=names)
    for wrong in ("sad,,calm", "sad,1", "fear,fearful"):
        with pytest.raises(LabelError, match="label names"):
            parse_label_names(wrong)


@pytest.mark.parametrize("by_option", [True, False])
def test_integers_that_file_names_or_words_contradict_are_refused_with_the_map_that_mends_it(by_option: bool) -> None:
    given = {"label_names" if by_option else "labels": RAVDESS_LABELS}
    for table in (
        integers(range(8), ravdess_files(range(1, 9))),
        integers(range(8), emotion=RAVDESS_CODES),
        integers(range(8), Class_Name=["Neutral", "calm", "joy", "sadness", "anger", "fear", "disgust", "ps"]),
    ):
        with pytest.raises(LabelError, match="label 0") as caught:
            from_dataframe(table, **given)
        advice = str(caught.value).rpartition("--label_map ")[2]
        mended = from_dataframe(table, label_map=parse_label_map(advice), **given)
        assert mended["label"].tolist() == list(RAVDESS_CODES)


def test_what_contradicts_no_integer_is_read_without_a_word_of_refusal() -> None:
    in_order = [RAVDESS_CODES.index(name) + 1 for name in RAVDESS_LABELS]
    assert from_dataframe(integers(range(8), ravdess_files(in_order)), labels=RAVDESS_LABELS)["label"].tolist() == list(
        RAVDESS_LABELS
    )
    coarse = integers([0, 0, 1], ravdess_files([5, 4, 3]))  # two emotions in one class of ones own
    assert from_dataframe(coarse, label_names=["negative", "positive"])["label"].tolist() == [
        *("negative", "negative", "positive")
    ]
    assert from_dataframe(coarse)["label"].tolist() == ["0", "0", "1"]
    merged = integers([4], ravdess_files([2]))  # calm counts as neutral where there is no calm
    seven = [name for name in RAVDESS_LABELS if name != "calm"]
    assert from_dataframe(merged, labels=seven)["label"].tolist() == ["neutral"]
    words = pd.DataFrame({"speech": ["a.wav"], "emotion": ["sad"]})
    assert from_dataframe(words, labels=RAVDESS_LABELS)["label"].tolist() == ["sad"]
    assert from_dataframe(integers(["", "nan"]), labels=RAVDESS_LABELS, require_labels=False)["label"].isna().all()


def test_a_hint_gives_the_names_that_the_table_itself_has() -> None:
    told: list[str] = []
    from_dataframe(integers([0, 1, 1], emotion=["sad", "calm", "calm"]), tell=told.append)
    assert "--label_map 0=sad,1=calm" in told[0]
