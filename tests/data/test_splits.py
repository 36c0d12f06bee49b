"""Splits and folds: stratified, reproducible, nothing heard twice; against counting by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.manifest import ManifestError
from pipeline.data.splits import (
    PROTOCOLS,
    Fold,
    assignment,
    check_disjoint,
    folds_of,
    leaked,
    sharing,
    split_table,
    unknown_content,
)

LABELS = ("calm", "happy", "sad")


def manifest(n: int = 60, speakers: int = 6, copies: int = 0) -> pd.DataFrame:
    """Recording i: class i % 3, speaker (i // 3) % speakers; the first ``copies`` come twice under another name."""
    table = pd.DataFrame(
        {
            "speech": [f"/a/{i:03d}.wav" for i in range(n)],
            "label": [LABELS[i % 3] for i in range(n)],
            "speaker": [f"s{(i // 3) % speakers}" for i in range(n)],
            "content_hash": [f"h{i}" for i in range(n)],
        }
    )
    again = table[:copies].copy()
    again["speech"] = again["speech"].str.replace("/a/", "/a/again-")
    return pd.concat([table, again], ignore_index=True)


def kept_apart(parts: dict[str, pd.DataFrame], column: str) -> bool:
    """Whether no two parts share a value of the column."""
    values = [set(part[column]) for part in parts.values()]
    return sum(map(len, values)) == len(set.union(*values))


def sizes(parts: dict[str, pd.DataFrame]) -> tuple[int, ...]:
    return tuple(len(parts[name]) for name in ("train", "inner_val", "test"))


def stems(part: pd.DataFrame) -> list[str]:
    return sorted(Path(path).stem for path in part["speech"])


def test_stratified_and_disjoint_by_stems_and_seed_alone() -> None:
    table = manifest(150)
    parts = split_table(table)
    assert sizes(parts) == (96, 24, 30)
    assert sorted(pd.concat(parts.values())["speech"]) == sorted(table["speech"])
    assert all(part["label"].value_counts().nunique() == 1 for part in parts.values())
    shuffled = table.sample(frac=1, random_state=1)
    moved = shuffled.assign(speech=[f"/elsewhere/{Path(path).stem}.flac" for path in shuffled["speech"]])
    assert stems(split_table(moved)["test"]) == stems(parts["test"])
    assert stems(split_table(table, seed=1)["test"]) != stems(parts["test"])
    refitted = split_table(table, inner_val=0)
    assert sizes(refitted) == (120, 0, 30)
    assert stems(refitted["test"]) == stems(parts["test"])


def test_speakers_stay_whole() -> None:
    parts = split_table(manifest(), by="speaker")
    assert all(len(part) for part in parts.values())
    assert kept_apart(parts, "speaker")


def test_same_content_falls_on_one_side() -> None:
    table = manifest(150)
    table["content_hash"] = [f"h{i // 6}_{i % 3}" for i in range(len(table))]  # pairs of the same class
    for seed in range(20):
        parts = split_table(table, seed=seed)
        check_disjoint(parts)
        assert kept_apart(parts, "content_hash")
    with pytest.raises(ManifestError, match="same recording"):
        check_disjoint({"train": table.iloc[:4], "test": table.iloc[4:8]})


def test_a_given_split_column_is_kept() -> None:
    table = manifest(40)
    table["split"] = ["test" if i < 8 else "Validation" if i < 16 else "train" for i in range(40)]
    assert sizes(split_table(table)) == (24, 8, 8)
    whole = split_table(table, inner_val=0)  # what would be validated is trained on, in order
    assert sizes(whole) == (32, 0, 8)
    assert [Path(path).stem for path in whole["train"]["speech"]] == [f"{i:03d}" for i in range(8, 40)]
    with pytest.raises(ManifestError, match="holdout"):
        split_table(table.assign(split="holdout"))


def test_a_given_split_by_speaker_has_no_voice_in_two_parts() -> None:
    table = manifest(40, speakers=4)
    apart = table.assign(split=["test" if speaker == "s0" else "train" for speaker in table["speaker"]])
    parts = split_table(apart, by="speaker")
    assert [part["speaker"].nunique() for part in parts.values()] == [2, 1, 1]
    mixed = table.assign(split=["test" if i % 5 == 0 else "train" for i in range(40)])
    assert len(split_table(mixed)["test"]) == 8
    for table, complaint in ((mixed, "put each speaker into one part"), (apart.assign(speaker=""), "add the column")):
        with pytest.raises(ManifestError, match=complaint):
            split_table(table, by="speaker")


@pytest.mark.parametrize(
    ("table", "options"),
    [
        (manifest(4), {}),
        (manifest().drop(columns="speaker"), {"by": "speaker"}),
        (manifest(speakers=1), {"by": "speaker"}),
        (manifest(), {"test_size": 1.0}),
    ],
)
def test_impossible_splits_are_refused(table: pd.DataFrame, options: dict[str, object]) -> None:
    with pytest.raises(ManifestError):
        split_table(table, **options)  # type: ignore[arg-type]


def test_leaks_are_recordings_of_training_and_selection_by_name_where_contents_are_unknown() -> None:
    training = pd.DataFrame({"content_hash": ["a", "b", "c", ""], "split": ["train", "inner_val", "test", "train"]})
    asked = pd.DataFrame({"content_hash": ["a", "b", "c", "d", ""]})
    assert leaked(asked, training).tolist() == [True, True, False, False, False]
    assert not leaked(asked, pd.DataFrame()).any()
    training = pd.DataFrame({"id": ["a", "b", "c", "t"], "content_hash": ["", "2", "3", ""]})
    training["split"] = ["train", "train", "train", "test"]
    asked = pd.DataFrame({"speech": [f"/x/{name}.wav" for name in "abcdt"], "content_hash": ["9", "", "9", "", ""]})
    # a: the bundle's is unknown; b: the asked one's; c: both known and different; t: of the test part
    assert leaked(asked, training).tolist() == [True, True, False, False, False]
    assert str(unknown_content(asked)).startswith("3 of 5")
    assert unknown_content(asked.iloc[[0, 2]]) is None


# Folds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("inner_val", [0.0, 0.2])
def test_parts_share_nothing_and_every_recording_is_tested_once(protocol: str, inner_val: float) -> None:
    table = manifest(copies=5)
    if protocol == "loco":
        table["corpus"] = table["speaker"].map(lambda name: "odd" if int(name[1:]) % 2 else "even")
    found = folds_of(table, protocol, folds=3, inner_val=inner_val)
    assert len(found) == {"holdout": 1, "kfold": 3, "speaker_kfold": 3, "loso": 6, "loco": 2}[protocol]
    for fold in found:
        assert kept_apart(fold.splits, "content_hash")
        assert bool(len(fold.splits["inner_val"])) == (inner_val > 0)
        assert sum(map(len, fold.splits.values())) == 65
        if protocol in ("speaker_kfold", "loso", "loco"):
            assert kept_apart(fold.splits, "speaker")
            assert sharing(fold)["speakers"] == 0
    if protocol != "holdout":
        tested = pd.concat([fold.splits["test"] for fold in found])
        assert sorted(tested["speech"]) == sorted(table["speech"])


@settings(max_examples=30, deadline=None)
@given(n=st.integers(30, 80), folds=st.integers(2, 5), seed=st.integers(0, 5))
def test_stratified_folds_hold_each_class_evenly(n: int, folds: int, seed: int) -> None:
    found = folds_of(manifest(n), "kfold", folds=folds, seed=seed)
    counts = [fold.splits["test"]["label"].value_counts() for fold in found]
    for label in LABELS:
        assert max(c[label] for c in counts) - min(c[label] for c in counts) <= 1


def test_folds_depend_on_names_and_seed_alone() -> None:
    shuffled = manifest().sample(frac=1, random_state=3)
    shuffled["speech"] = shuffled["speech"].str.replace("/a/", "/elsewhere/")

    def tested(table: pd.DataFrame, seed: int) -> list[set[str]]:
        return [set(fold.splits["test"]["content_hash"]) for fold in folds_of(table, "kfold", folds=3, seed=seed)]

    assert tested(manifest(), 0) == tested(shuffled, 0) != tested(manifest(), 1)


@pytest.mark.parametrize(
    ("protocol", "changes", "options", "complaint"),
    [
        ("kfold", {}, {"folds": 21}, "expected 2 to 20"),
        ("speaker_kfold", {}, {"folds": 7}, "7 with 6 speakers"),
        ("loso", {"speaker": ""}, {}, "add the column speaker"),
        ("loso", {"speaker": "s0"}, {"inner_val": 0}, "at least 2 folds"),
        ("threefold", {}, {}, "unknown protocol 'threefold'"),
        ("speaker_kfold", {}, {"assigned": pd.Series(["a", "b"] * 30)}, r"speaker s\d is in the folds a, b"),
    ],
)
def test_what_cannot_be_folded_is_refused(protocol: str, changes: Any, options: Any, complaint: str) -> None:
    with pytest.raises(ManifestError, match=complaint):
        folds_of(manifest().assign(**changes), protocol, **options)


@pytest.mark.parametrize("key", ["content_hash", "id", "speaker"])
def test_given_folds_are_kept_and_the_unnamed_left_out(key: str, tmp_path: Path) -> None:
    table = manifest()
    known = table[table["speaker"] != "s5"].assign(id=table["speech"].str[3:6])
    known["fold"] = known["speaker"].map({"s0": "a", "s1": "a", "s2": "b", "s3": "b", "s4": "c"})
    known[[key, "fold"]].to_csv(tmp_path / "folds.csv", index=False)
    assigned = assignment(table, tmp_path / "folds.csv", "fold")
    found = folds_of(table, "speaker_kfold", inner_val=0, assigned=assigned)
    assert [fold.name for fold in found] == ["a", "b", "c"]
    assert [set(fold.splits["test"]["speaker"]) for fold in found] == [{"s0", "s1"}, {"s2", "s3"}, {"s4"}]
    assert {name for fold in found for name in fold.splits["train"]["speaker"]} == {"s0", "s1", "s2", "s3", "s4"}


def test_given_folds_by_name_where_the_contents_are_unknown_and_those_that_are_none(tmp_path: Path) -> None:
    table, csv = manifest(), tmp_path / "folds.csv"
    folds = [str(i % 2) for i in range(60)]
    table.assign(id=table["speech"].str[3:6], fold=folds)[["content_hash", "id", "fold"]].to_csv(csv, index=False)
    assert assignment(table.assign(content_hash=""), csv, "fold").tolist() == folds
    with pytest.raises(ManifestError, match="cannot read"):
        assignment(table, tmp_path / "missing.csv", "fold")
    for text, complaint in (
        ("content_hash,part\nh1,a\n", "content_hash or id"),
        ("content_hash,fold\nh1,a\nh1,b\n", "gives h1 two different folds"),
        ("content_hash,fold\nzz,a\n", "60 recordings"),
    ):
        csv.write_text(text)
        with pytest.raises(ManifestError, match=complaint):
            assignment(table, csv, "fold")


def test_what_was_heard_before_is_counted() -> None:
    columns = ["speaker", "label", "statement", "intensity"]
    train = pd.DataFrame([("s1", "sad", "kids", "normal"), ("s2", "sad", "dogs", "normal")], columns=columns)
    heard = [("s1", "sad", "kids", "normal"), ("s1", "calm", "kids", "normal"), ("s3", "sad", "kids", "normal")]
    parts = {"train": train, "inner_val": train.iloc[:0], "test": pd.DataFrame(heard, columns=columns)}
    assert sharing(Fold("1", parts)) == {"speakers": 2, "takes": 1}
    without = {name: part.drop(columns="speaker") for name, part in parts.items()}
    blank = {name: part.assign(speaker="") for name, part in parts.items()}  # not one known voice
    for unknown in (without, blank):
        assert sharing(Fold("1", unknown)) == {"speakers": None, "takes": None}


def test_one_recording_under_two_names_or_voices_is_not_trained_on_and_tested() -> None:
    table = manifest(copies=1)
    with pytest.raises(ManifestError, match="the same recording"):
        folds_of(table, "kfold", assigned=pd.Series(["a"] * 60 + ["b"]), inner_val=0)
    table.loc[60, "speaker"] = "s5"
    with pytest.raises(ManifestError, match="the same recording"):
        folds_of(table, "loso", inner_val=0)
    with pytest.raises(ManifestError, match="speaker s5 is in the folds"):
        folds_of(table, "speaker_kfold", folds=6, inner_val=0)


FAMILIES = {"ravdess_speech": ("RAVDESS", 6), "ravdess_song": ("RAVDESS", 6), "crema_d": ("CREMA-D", 7)}
FAMILIES["mine"] = ("mine", 6)


def several_families() -> pd.DataFrame:
    """Six speakers of RAVDESS, who speak and sing, seven of CREMA-D, and six of a corpus of nobody's; 4 takes each."""
    rows = [
        (f"/{corpus}/{speaker}-{take}.wav", ("sad", "happy")[take % 2], f"{family}_{speaker:02d}", corpus)
        for corpus, (family, speakers) in FAMILIES.items()
        for speaker in range(speakers)
        for take in range(4)
    ]
    table = pd.DataFrame(rows, columns=["speech", "label", "speaker", "corpus"])
    return table.assign(content_hash=table["speech"])


def test_folds_of_several_families_hold_a_share_of_each_and_no_speaker_twice() -> None:
    table = several_families()
    tested = [fold.splits["test"] for fold in folds_of(table, "speaker_kfold", folds=3, inner_val=0)]
    assert sum(map(len, tested)) == len(table)
    for part in tested:
        per_family = part.groupby(part["speaker"].str.rpartition("_")[0])["speaker"].nunique()
        assert per_family.to_dict() in ({"RAVDESS": 2, "CREMA-D": n, "mine": 2} for n in (2, 3))
        assert set(part["corpus"]) == set(FAMILIES)
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
