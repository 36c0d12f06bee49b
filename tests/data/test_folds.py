"""Folds: every recording tested once, nothing heard twice, speakers apart; against counting by hand."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.manifest import ManifestError
from pipeline.data.splits import PROTOCOLS, Fold, assignment, folds_of, sharing

LABELS = ("calm", "happy", "sad")


def manifest(n: int = 60, speakers: int = 6, copies: int = 0) -> pd.DataFrame:
    """Recording i: class i % 3, speaker (i // 3) % speakers; the first ``copies`` come twice under another name."""
    rows = [
        {
            "speech": f"/a/{i:03d}.wav",
            "label": LABELS[i % 3],
            "speaker": f"s{(i // 3) % speakers}",
            "content_hash": f"h{i}",
        }
        for i in range(n)
    ]
    again = [row | {"speech": row["speech"].replace("/a/", "/a/again-")} for row in rows[:copies]]
    return pd.DataFrame([*rows, *again])


def hashes(part: pd.DataFrame) -> set[str]:
    return set(part["content_hash"])


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("inner_val", [0.0, 0.2])
def test_no_recording_is_in_two_parts_of_a_fold(protocol: str, inner_val: float) -> None:
    table = manifest(copies=5)
    if protocol == "loco":
        table["corpus"] = table["speaker"].map(lambda name: "odd" if int(name[1:]) % 2 else "even")
    for fold in folds_of(table, protocol, folds=3, inner_val=inner_val):
        train, inner, test = (hashes(fold.splits[name]) for name in ("train", "inner_val", "test"))
        assert not train & inner
        assert not train & test
        assert not inner & test
        assert bool(inner) == (inner_val > 0)
        assert sum(map(len, fold.splits.values())) == 65


@pytest.mark.parametrize("protocol", ["kfold", "speaker_kfold", "loso"])
def test_every_recording_is_tested_once(protocol: str) -> None:
    tested = pd.concat([fold.splits["test"] for fold in folds_of(manifest(copies=5), protocol, folds=3)])
    assert sorted(tested["speech"]) == sorted(manifest(copies=5)["speech"])


@pytest.mark.parametrize("protocol", ["speaker_kfold", "loso"])
def test_no_voice_is_in_two_parts(protocol: str) -> None:
    found = folds_of(manifest(), protocol, folds=3)
    assert len(found) == {"speaker_kfold": 3, "loso": 6}[protocol]
    for fold in found:
        voices = [set(part["speaker"]) for part in fold.splits.values()]
        assert sum(map(len, voices)) == len(set.union(*voices)) == 6
        assert sharing(fold)["speakers"] == 0


@settings(max_examples=30, deadline=None)
@given(n=st.integers(30, 80), folds=st.integers(2, 5), seed=st.integers(0, 5))
def test_stratified_folds_hold_each_class_evenly(n: int, folds: int, seed: int) -> None:
    counts = [
        fold.splits["test"]["label"].value_counts() for fold in folds_of(manifest(n), "kfold", folds=folds, seed=seed)
    ]
    for label in LABELS:
        assert max(c[label] for c in counts) - min(c[label] for c in counts) <= 1


def test_folds_depend_on_names_and_seed_alone() -> None:
    shuffled = manifest().sample(frac=1, random_state=3)
    shuffled["speech"] = shuffled["speech"].str.replace("/a/", "/elsewhere/")
    ours, theirs = (folds_of(t, "kfold", folds=3) for t in (manifest(), shuffled))
    assert [hashes(f.splits["test"]) for f in ours] == [hashes(f.splits["test"]) for f in theirs]
    other = folds_of(manifest(), "kfold", folds=3, seed=1)
    assert [hashes(f.splits["test"]) for f in ours] != [hashes(f.splits["test"]) for f in other]


def test_what_cannot_be_folded_is_refused() -> None:
    table = manifest()
    with pytest.raises(ManifestError, match="expected 2 to 20"):
        folds_of(table, "kfold", folds=21)
    with pytest.raises(ManifestError, match="--folds 7 with 6 speakers"):
        folds_of(table, "speaker_kfold", folds=7)
    with pytest.raises(ManifestError, match="add the column speaker"):
        folds_of(table.drop(columns="speaker"), "loso")
    with pytest.raises(ManifestError, match="needs at least 2 folds"):
        folds_of(table.assign(speaker="s0"), "loso", inner_val=0)
    with pytest.raises(ManifestError, match="unknown protocol 'threefold'"):
        folds_of(table, "threefold")


@pytest.mark.parametrize("key", ["content_hash", "id", "speaker"])
def test_given_folds_are_kept_and_the_unnamed_left_out(key: str, tmp_path: Path) -> None:
    table = manifest()
    known = table[table["speaker"] != "s5"]
    folds = known["speaker"].map({"s0": "a", "s1": "a", "s2": "b", "s3": "b", "s4": "c"})
    given_csv = pd.DataFrame({"id": known["speech"].str[3:6], "content_hash": known["content_hash"], "fold": folds})
    given_csv["speaker"] = known["speaker"]
    given_csv[[key, "fold"]].to_csv(tmp_path / "folds.csv", index=False)
    assigned = assignment(table, tmp_path / "folds.csv", "fold")
    found = folds_of(table, "speaker_kfold", inner_val=0, assigned=assigned)
    assert [fold.name for fold in found] == ["a", "b", "c"]
    assert [set(fold.splits["test"]["speaker"]) for fold in found] == [{"s0", "s1"}, {"s2", "s3"}, {"s4"}]
    assert {name for fold in found for name in fold.splits["train"]["speaker"]} == {"s0", "s1", "s2", "s3", "s4"}


def test_given_folds_that_are_none(tmp_path: Path) -> None:
    table, csv = manifest(), tmp_path / "folds.csv"
    with pytest.raises(ManifestError, match="cannot read"):
        assignment(table, csv, "fold")
    csv.write_text("content_hash,part\nh1,a\n")
    with pytest.raises(ManifestError, match="content_hash or id"):
        assignment(table, csv, "fold")
    csv.write_text("content_hash,fold\nh1,a\nh1,b\n")
    with pytest.raises(ManifestError, match="gives h1 two different folds"):
        assignment(table, csv, "fold")
    csv.write_text("content_hash,fold\nzz,a\n")
    with pytest.raises(ManifestError, match="60 recordings"):
        assignment(table, csv, "fold")
    spread = pd.Series(["a", "b"] * 30)
    with pytest.raises(ManifestError, match=r"speaker s\d is in the folds a, b; expected one"):
        folds_of(table, "speaker_kfold", assigned=spread)


def test_what_was_heard_before_is_counted() -> None:
    columns = ["speaker", "label", "statement", "intensity"]
    train = pd.DataFrame([("s1", "sad", "kids", "normal"), ("s2", "sad", "dogs", "normal")], columns=columns)
    test = pd.DataFrame(
        [("s1", "sad", "kids", "normal"), ("s1", "calm", "kids", "normal"), ("s3", "sad", "kids", "normal")],
        columns=columns,
    )
    fold = Fold("1", {"train": train, "inner_val": train.iloc[:0], "test": test})
    assert sharing(fold) == {"speakers": 2, "takes": 1}
    bare = {name: part.drop(columns="speaker") for name, part in fold.splits.items()}
    assert sharing(Fold("1", bare)) == {"speakers": None, "takes": None}


def test_folds_by_name_where_the_contents_are_unknown(tmp_path: Path) -> None:
    table = manifest().assign(content_hash="")
    given = pd.DataFrame({"content_hash": [f"h{i}" for i in range(60)], "id": [f"{i:03d}" for i in range(60)]})
    given.assign(fold=[str(i % 2) for i in range(60)]).to_csv(tmp_path / "folds.csv", index=False)
    assert assignment(table, tmp_path / "folds.csv", "fold").tolist() == [str(i % 2) for i in range(60)]


def test_one_recording_under_two_names_or_voices_is_not_trained_on_and_tested() -> None:
    table = manifest(copies=1)
    with pytest.raises(ManifestError, match=r"the same recording is in the .* part"):
        folds_of(table, "kfold", assigned=pd.Series(["a"] * 60 + ["b"]), inner_val=0)
    table.loc[60, "speaker"] = "s5"
    with pytest.raises(ManifestError, match="the same recording"):
        folds_of(table, "loso", inner_val=0)
    with pytest.raises(ManifestError, match="speaker s5 is in the folds"):
        folds_of(table, "speaker_kfold", folds=6, inner_val=0)


def test_blank_speakers_are_not_one_known_voice() -> None:
    part = pd.DataFrame({"speaker": ["", ""], "label": ["sad", "calm"], "speech": ["a", "b"]})
    fold = Fold("1", {"train": part, "inner_val": part.iloc[:0], "test": part})
    assert sharing(fold) == {"speakers": None, "takes": None}


def several_families() -> pd.DataFrame:
    """Six speakers of RAVDESS, who speak and sing, seven of CREMA-D, and six of a corpus of nobody's."""
    rows = []
    for corpus, prefix, speakers in (
        ("ravdess_speech", "RAVDESS", 6),
        ("ravdess_song", "RAVDESS", 6),
        ("crema_d", "CREMA-D", 7),
        ("mine", "mine", 6),
    ):
        for speaker in range(speakers):
            for take in range(4):
                path = f"/{corpus}/{speaker}-{take}.wav"
                row = {"speech": path, "label": ("sad", "happy")[take % 2], "speaker": f"{prefix}_{speaker:02d}"}
                rows.append(row | {"corpus": corpus, "content_hash": path})
    return pd.DataFrame(rows)


def test_folds_of_several_families_hold_a_share_of_each_and_no_speaker_twice() -> None:
    table = several_families()
    folds = folds_of(table, "speaker_kfold", folds=3, inner_val=0)
    tested = [fold.splits["test"] for fold in folds]
    assert sum(map(len, tested)) == len(table)
    for part in tested:
        per_family = part.groupby(part["speaker"].str.rpartition("_")[0])["speaker"].nunique()
        assert per_family.to_dict() in ({"RAVDESS": 2, "CREMA-D": n, "mine": 2} for n in (2, 3))
        assert set(part["corpus"]) == {"ravdess_speech", "ravdess_song", "crema_d", "mine"}
    speakers = [set(part["speaker"]) for part in tested]
    assert len(set.union(*speakers)) == sum(map(len, speakers)) == 19
    with pytest.raises(ManifestError, match="speakers of RAVDESS; expected 2 to 6"):
        folds_of(table, "speaker_kfold", folds=7)


def test_loco_leaves_a_family_out_speech_and_song_together() -> None:
    folds = folds_of(several_families(), "loco", inner_val=0)
    held = {fold.name: set(fold.splits["test"]["corpus"]) for fold in folds}
    assert held == {"RAVDESS": {"ravdess_speech", "ravdess_song"}, "CREMA-D": {"crema_d"}, "mine": {"mine"}}
    for fold in folds:
        assert not set(fold.splits["train"]["corpus"]) & held[fold.name]
