"""Folders as manifests: what names of known corpora tell, what folders and metadata tell, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pandas as pd
import pytest

from pipeline.data.corpora.voices import check_corpora, renewed
from pipeline.data.labels import parse_label_map
from pipeline.data.manifest import ManifestError, scan_folder
from pipeline.data.splits import assignment


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def labels_by_stem(table: pd.DataFrame) -> dict[str, str]:
    return {Path(path).stem: label for path, label in zip(table["speech"], table["label"], strict=True)}


# As the corpora's own descriptions have it: file, label, speaker, sex, intensity, statement, corpus.
DESCRIBED = [
    ("03-01-06-02-02-01-12.wav", "fearful", "RAVDESS_12", "female", "strong", "dogs", "ravdess_speech"),
    ("03-02-02-01-01-02-07.wav", "calm", "RAVDESS_07", "male", "normal", "kids", "ravdess_song"),
    ("AudioWAV/1001_DFA_ANG_XX.wav", "angry", "CREMA-D_1001", "", "", "DFA", "crema_d"),
    ("AudioWAV/1091_WSI_FEA_MD.wav", "fearful", "CREMA-D_1091", "", "medium", "WSI", "crema_d"),
    ("1040_ITH_SAD_X.wav", "sad", "CREMA-D_1040", "", "", "ITH", "crema_d"),
    ("wav/03a01Wa.wav", "angry", "EmoDB_03", "male", "", "a01", "emodb"),
    ("wav/16b10Tb.wav", "sad", "EmoDB_16", "female", "", "b10", "emodb"),
    ("OAF_Pleasant_surprise/OAF_back_ps.wav", "surprised", "TESS_OAF", "female", "", "back", "tess"),
    ("OAF_neutral/OA_bite_neutral.wav", "neutral", "TESS_OAF", "female", "", "bite", "tess"),
    ("YAF_fear/YAF_youth_fear.wav", "fearful", "TESS_YAF", "female", "", "youth", "tess"),
    ("DC_su14.wav", "surprised", "SAVEE_DC", "male", "", "su14", "savee"),
    ("AudioData/KL/sa01.wav", "sad", "SAVEE_KL", "male", "", "sa01", "savee"),
]


def test_names_of_several_corpora_tell_what_these_say_they_do(tmp_path: Path) -> None:
    touch(tmp_path, *(row[0] for row in DESCRIBED), "extra/03a02Lb.wav")
    told: list[str] = []
    table = scan_folder(tmp_path, songs=True, tell=told.append)
    columns = ["label", "speaker", "sex", "intensity", "statement", "corpus"]
    assert [name for name in table.columns if name != "repetition"] == ["speech", *columns]
    paths = [Path(path).relative_to(tmp_path).as_posix() for path in table["speech"]]
    assert sorted(zip(paths, *(table[name] for name in columns), strict=True)) == sorted(DESCRIBED)
    for name, count in table["corpus"].value_counts().items():
        assert any(line.startswith(f"{name}: {count} recording") for line in told)
    assert [line.startswith(("tess", "savee")) for line in told] == ["untested" in line for line in told]
    assert "03a02Lb.wav (of boredom" in told[-1]
    assert set(scan_folder(tmp_path, corpus="savee")["corpus"]) == {"savee"}


def test_songs_stay_out_only_beside_speech(tmp_path: Path) -> None:
    touch(tmp_path, "song/03-02-04-01-01-01-01.wav", "speech/03-01-04-01-01-01-01.wav")
    assert scan_folder(tmp_path)["corpus"].tolist() == ["ravdess_speech"]
    assert scan_folder(tmp_path / "song")["corpus"].tolist() == ["ravdess_song"]
    assert scan_folder(tmp_path, corpus="ravdess_song")["corpus"].tolist() == ["ravdess_song"]
    both = scan_folder(tmp_path, songs=True)
    assert (sorted(both["corpus"]), set(both["speaker"])) == (["ravdess_song", "ravdess_speech"], {"RAVDESS_01"})


def test_copies_under_changed_names_are_one_recording(tmp_path: Path) -> None:
    names = ["{}_angry.wav", "{} (1).wav", "{}_16k.wav", "{}-copy.flac", "Copy of {}.wav", "x/{}.mp3"]
    for code in ("03-01-05-01-02-01-07", "1001_DFA_ANG_XX", "03a01Wa", "OAF_back_angry", "DC_a01"):
        touch(tmp_path / code, *(name.format(code) for name in names))
        told: list[str] = []
        table = scan_folder(tmp_path / code, tell=told.append)
        assert [Path(path).name for path in table["speech"]] == [f"{code}.mp3"]
        assert table["label"].tolist() == ["angry"]
        assert "left out: 5 found twice" in told[-1]


def test_sexes_of_crema_d_are_those_of_its_own_table_and_its_silent_recording_is_left_out(tmp_path: Path) -> None:
    touch(tmp_path / "AudioWAV", *(f"100{i}_DFA_ANG_XX.wav" for i in (1, 2, 3)), "1076_MTI_SAD_XX.wav")
    csv = tmp_path / "VideoDemographics.csv"
    csv.write_text('"ActorID","Age","Sex","Race","Ethnicity"\n1001,51,"Male","x","y"\n1002,21,"Female","x","y"\n')
    assert scan_folder(tmp_path)["sex"].tolist() == ["male", "female", ""]
    assert scan_folder(tmp_path / "AudioWAV")["sex"].tolist() == ["", "", ""]
    csv.write_text("actor,sex\n1001,Male\n")
    with pytest.raises(ManifestError, match=r"VideoDemographics.csv .*expected ActorID and Sex"):
        scan_folder(tmp_path)


def test_one_folder_an_emotion_above_or_below_others(tmp_path: Path) -> None:
    touch(tmp_path, "Fear/a.wav", "happiness/b.mp3", "angry/train/spk1/c.wav", "test/HI/Sad/d.wav", "ps/e.wav", "f.wav")
    told: list[str] = []
    table = scan_folder(tmp_path, tell=told.append)
    assert labels_by_stem(table) == {"a": "fearful", "b": "happy", "c": "angry", "d": "sad", "e": "surprised"}
    assert list(table.columns) == ["speech", "label"]
    assert told[0].startswith("5 recordings of no known corpus")
    assert told[1].startswith("left out: f.wav")


LOOK_ALIKES = """
2024-03-01-05-01-02-01-07 03-01-05-01-02-01-07-08 03-01-09-01-02-01-12 03-01-05-01-02-01-25 02-01-05-01-02-01-07
11001_DFA_ANG_XX 1001_DFA_ANG_XXL 03a01fa 03a01Fab 04a01Fa a01 DC_a99 xDC_a01 LOAF_back_angry hello
"""
NO_EMOTIONS = [
    *([name] for name in LOOK_ALIKES.split()),
    *(["OAF_angry/1", "OAF_sad/1"], ["DC/x1", "JE/x1"], ["train/1", "test/2"], ["HI/1", "XX/1"], ["AudioWAV/1"]),
    *(["Actor_01/1", "Actor_02/1"], ["Actor_01/03-01-05-01-01-01-01", "calls/1", "calls/2"], ["angry/1", "spk1/2"]),
    *(["angry/1", "whistling/2"], ["01/x", "sad/y"], ["NA/x", "sad/y"], ["-/x", "sad/y"], ["1e1/x"], ["a"]),
]


@pytest.mark.parametrize("names", NO_EMOTIONS, ids=" ".join)
def test_no_other_file_or_folder_is_taken_for_an_emotion(tmp_path: Path, names: list[str]) -> None:
    touch(tmp_path / "sad", *(f"{name}.wav" for name in names))  # the root itself names nothing
    with pytest.raises(ManifestError, match=r"^cannot tell the emotion of .*--label_map") as told:
        scan_folder(tmp_path / "sad")
    unknown = [part for name in names for part in Path(name).parts[:-1] if part not in ("angry", "sad", "Actor_01")]
    assert all(part in str(told.value) for part in unknown)


def test_a_label_map_names_classes_of_ones_own_and_works_for_folders_and_file_names(tmp_path: Path) -> None:
    touch(tmp_path / "own", "angry/a.wav", "train/whistling/b.wav", "01/c.wav")
    table = scan_folder(tmp_path / "own", label_map=parse_label_map("whistling=whistling,1=sad"))
    assert labels_by_stem(table) == {"a": "angry", "b": "whistling", "c": "sad"}
    for target in ("NA", "7"):
        with pytest.raises(ManifestError, match="cannot be a class name"):
            scan_folder(tmp_path / "own", label_map=parse_label_map(f"whistling={target},1=sad"))
    touch(tmp_path / "known", "excited/a.wav", "fear/b.wav", "scared/c.wav", "03-01-05-01-01-01-01.wav")
    found = scan_folder(tmp_path / "known", label_map=parse_label_map("excited=happy,fear=sad,angry=disgust"))
    assert labels_by_stem(found) == {"a": "happy", "b": "sad", "c": "fearful", "03-01-05-01-01-01-01": "disgust"}


@pytest.mark.parametrize(
    "name",
    ["angry/sad/a.wav", "sad/03-01-05-01-01-01-01.wav", "03-01-05-01-01-01-01_happy.wav", "happy/x/OAF_back_sad.wav"],
)
def test_two_emotions_in_one_path_are_refused(tmp_path: Path, name: str) -> None:
    touch(tmp_path, name, "angry/b.wav")
    with pytest.raises(ManifestError, match=r" says \w+ and .* says \w+; rename one of them"):
        scan_folder(tmp_path)
    same = parse_label_map("sad=angry,happy=angry")
    assert set(scan_folder(tmp_path, label_map=same)["label"]) == {"angry"}


def test_classes_that_are_nobodys_are_left_out_by_name(tmp_path: Path) -> None:
    touch(tmp_path, "Bored/a.wav", "sad/b.wav", "boredom/03a02Lb.wav")
    assert labels_by_stem(scan_folder(tmp_path)) == {"b": "sad"}
    assert set(scan_folder(tmp_path, keep_classes=True)["label"]) == {"bored", "sad", "boredom"}
    assert set(scan_folder(tmp_path, label_map=parse_label_map("bored=sad"))["label"]) == {"sad"}
    assert set(scan_folder(tmp_path, label_map=parse_label_map("boredom=boredom"))["label"]) == {"sad", "boredom"}
    with pytest.raises(ManifestError, match=r"no recording in .* has a known class: all are of boredom"):
        scan_folder(tmp_path / "boredom")


def test_metadata_of_an_audiofolder(tmp_path: Path) -> None:
    hf = tmp_path / "calls"
    touch(hf, "train/1.wav", "train/2.wav", "test/deep/1.wav", "test/03-01-05-01-01-01-01.wav", "test/unlisted.wav")
    lines = ["file_name,label,speaker_id,room", "1.wav,Fear,7,a", "2.wav,yodel,8,b", "0.wav,sad,7,c", ""]
    (hf / "train/metadata.csv").write_text("\n".join(lines))
    rows = [{"file_name": "deep/1.wav", "emotion": "joy"}, {"file_name": "03-01-05-01-01-01-01.wav", "emotion": "sad"}]
    (hf / "test/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    told: list[str] = []
    table = scan_folder(hf, tell=told.append)
    by = table.set_index(table["speech"].map(lambda path: Path(path).relative_to(hf).as_posix()))
    known = "test/03-01-05-01-01-01-01.wav"
    labels = {"train/1.wav": "fearful", "train/2.wav": "yodel", "test/deep/1.wav": "happy", known: "sad"}
    assert by["label"].to_dict() == labels
    assert by.loc["train/1.wav", ["speaker", "corpus", "room"]].tolist() == ["calls_7", "calls", "a"]
    assert by.loc[known, "speaker"] == "RAVDESS_01"
    assert told[-1].startswith("left out: unlisted.wav")
    assert "1 listed in metadata that do not exist" in told[-1]


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("metadata.csv", "file_name,label\n1.wav,0\n2.wav,1\n", "the label '0' .* cannot be a class name; .*0=angry"),
        ("metadata.csv", "file_name,label\n1.wav,\n", "the label '' .* cannot be a class name"),
        ("metadata.csv", "file_name,label\n1.wav,sad\n1.wav,calm\n", "labels 1.wav 'calm', another line .* 'sad'"),
        ("metadata.csv", "speech,label\n1.wav,sad\n", "cannot tell the emotion"),
        ("metadata.csv", "file_name,text\n1.wav,hello\n", "cannot tell the emotion"),
        ("metadata.csv", "file_name,label\n../../etc/1.wav,sad\n", "cannot tell the emotion"),
        ("metadata.jsonl", "[1]\n", "line 1: '.1.' is not a JSON object"),
        ("metadata.jsonl", '{"file_name": "1.wav", "label": "sad"}\n{"label": "sad"}\n', "give every row both"),
    ],
)
def test_bad_metadata_is_one_line(tmp_path: Path, name: str, text: str, complaint: str) -> None:
    touch(tmp_path, "train/1.wav", "train/2.wav")
    (tmp_path / "train" / name).write_text(text)
    with pytest.raises(ManifestError, match=complaint) as told:
        scan_folder(tmp_path)
    assert "\n" not in str(told.value)


def test_what_a_scan_leaves_out_is_told(tmp_path: Path) -> None:
    touch(tmp_path, "03-01-05-01-01-01-02.wav", "a/03-01-05-01-01-01-02.wav", "foo.wav", "goo.wav", "notes.txt")
    touch(tmp_path, "03-02-05-01-01-01-02.wav", "sad/" + "d/" * 130 + "x.wav", "a/.hidden.wav", ".git/03a01Wa.wav")
    told: list[str] = []
    assert len(scan_folder(tmp_path, tell=told.append)) == 1
    assert told[-1].startswith("left out: 2 whose emotion cannot be told (first: foo.wav), ")
    for part in ("03-01-05-01-01-01-02.wav (found twice)", "03-02-05-01-01-01-02.wav (songs", "1 .txt", "2 hidden"):
        assert part in told[-1]
    assert f"1 folders too deep (first: {tmp_path}/sad/d/" in told[-1]


def test_folders_that_have_none_of_what_is_wanted_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "empty/notes.txt", "some/03a01Wa.wav", "some/sad/x.wav", "some/calls/y.wav")
    (tmp_path / "bare").mkdir()
    for name, complaint in (("empty", "no recordings in"), ("bare", "no recordings in"), ("missing", "no folder")):
        with pytest.raises(ManifestError, match=complaint):
            scan_folder(tmp_path / name)
    with pytest.raises(ManifestError, match=r"nothing in .* is of crema_d \(as 1001_DFA_ANG_XX.wav\)"):
        scan_folder(tmp_path / "some", corpus="crema_d")
    told: list[str] = []
    assert scan_folder(tmp_path / "some", corpus="emodb", tell=told.append)["label"].tolist() == ["angry"]
    assert told[-1].startswith("left out: 2 not of emodb")


def test_neither_a_name_that_is_no_text_nor_a_detour_gives_labels(tmp_path: Path) -> None:
    cafe = Path(os.fsdecode(os.fsencode(tmp_path) + b"/odd/caf\xe9"))
    touch(cafe, "sad/x.wav", "y.wav")
    with pytest.raises(ManifestError, match=r"the folders caf\\xe9 are no known emotions"):
        scan_folder(tmp_path / "odd")
    assert scan_folder(cafe)["label"].tolist() == ["sad"]
    touch(tmp_path, "flat/a.wav", "mix/b.wav")
    for folder in (tmp_path / "flat", tmp_path / "mix" / ".." / "flat"):
        with pytest.raises(ManifestError, match=r"cannot tell the emotion of a\.wav in"):
            scan_folder(folder)


def manifest(*rows: tuple[str, str, str]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["corpus", "speaker", "label"])


def test_corpora_that_do_not_go_together_are_refused() -> None:
    ravdess = (("RAVDESS", "Actor_07", "sad"), ("ravdess_song", "RAVDESS_07", "calm"), ("", "7", "sad"))
    check_corpora(manifest(*ravdess, ("mine", "7", "happy")))
    check_corpora(manifest(("mine", "7", "bark"), ("mine", "8", "meow")))
    check_corpora(manifest(("mine", "7", "bark"), ("yours", "8", "bark")))
    check_corpora(manifest(*ravdess, ("mine", "7", "bark")), classes=["bark"])
    for rows, complaint in (
        ((("mine", "7", "sad"), ("yours", "7", "sad")), "speaker 7 is in mine and in yours"),
        ((*ravdess, ("mine", "Actor_07", "sad")), "speaker RAVDESS_07 is in RAVDESS and in mine"),
        ((*ravdess, ("mine", "7", "bark")), "corpus mine has no known class: its labels are bark"),
    ):
        with pytest.raises(ManifestError, match=complaint):
            check_corpora(manifest(*rows))


def test_actors_are_known_by_their_earlier_names(tmp_path: Path) -> None:
    old = manifest(("RAVDESS", "Actor_07", "sad"), ("RAVDESS song", "Actor_08", "sad"), ("mine", "Actor_07", "sad"))
    new = renewed(old)
    assert new["speaker"].tolist() == ["RAVDESS_07", "RAVDESS_08", "Actor_07"]
    assert new["corpus"].tolist() == ["ravdess_speech", "ravdess_song", "mine"]
    csv = tmp_path / "folds.csv"
    csv.write_text("speaker,fold\nActor_07,3\nRAVDESS_08,4\n")
    for table in (old[:2], new[:2]):
        assert assignment(table.assign(speech=["/a.wav", "/b.wav"]), csv, "fold").tolist() == ["3", "4"]
