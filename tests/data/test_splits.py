"""Splits: stratified, reproducible, disjoint in recordings, contents and (when asked) speakers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile as sf

from pipeline.data.manifest import ManifestError
from pipeline.data.splits import add_hashes, check_disjoint, duplicates_in, leaked, split_table, unknown_content


def manifest(n: int = 200, speakers: int = 10) -> pd.DataFrame:
    labels = ["angry", "calm", "happy", "sad"]
    return pd.DataFrame(
        {
            "speech": [f"/data/s{i % speakers}/{i:04d}.wav" for i in range(n)],
            "label": [labels[i % 4] for i in range(n)],
            "speaker": [f"s{i % speakers}" for i in range(n)],
        }
    )


def test_stratified_shares_and_disjoint() -> None:
    table = manifest()
    parts = split_table(table)
    assert {name: len(part) for name, part in parts.items()} == {"train": 128, "inner_val": 32, "test": 40}
    assert sorted(pd.concat(parts.values())["speech"]) == sorted(table["speech"])
    for part in parts.values():
        assert part["label"].value_counts().nunique() == 1


def test_the_split_depends_on_stems_and_seed_alone() -> None:
    table = manifest()
    moved = table.sample(frac=1, random_state=1).assign(
        speech=lambda t: [f"/elsewhere/{Path(p).stem}.flac" for p in t["speech"]]
    )
    stems = [sorted(Path(p).stem for p in split_table(t)["test"]["speech"]) for t in (table, moved)]
    assert stems[0] == stems[1]
    assert stems[0] != sorted(Path(p).stem for p in split_table(table, seed=1)["test"]["speech"])


def test_speakers_stay_whole() -> None:
    parts = split_table(manifest(), by="speaker")
    voices = [set(part["speaker"]) for part in parts.values()]
    assert all(voices)
    assert sum(map(len, voices)) == len(set.union(*voices)) == 10


def test_no_inner_validation_when_refitting() -> None:
    parts = split_table(manifest(), inner_val=0)
    assert len(parts["inner_val"]) == 0
    assert sorted(parts["test"]["speech"]) == sorted(split_table(manifest())["test"]["speech"])


def test_same_content_falls_on_one_side() -> None:
    table = manifest()
    table["content_hash"] = [f"h{i // 8}_{i % 4}" for i in range(len(table))]  # pairs of the same class
    for seed in range(20):
        parts = split_table(table, seed=seed)
        check_disjoint(parts)
        sides = [set(part["content_hash"]) for part in parts.values()]
        assert sum(map(len, sides)) == table["content_hash"].nunique()


def test_a_recording_on_both_sides_is_refused() -> None:
    table = manifest(8).assign(content_hash=["x"] * 8)
    with pytest.raises(ManifestError, match="same recording"):
        check_disjoint({"train": table.iloc[:4], "test": table.iloc[4:]})


def test_a_given_split_column_is_kept() -> None:
    table = manifest(40)
    table["split"] = ["test" if i < 8 else "Validation" if i < 16 else "train" for i in range(40)]
    parts = split_table(table)
    assert {name: len(part) for name, part in parts.items()} == {"train": 24, "inner_val": 8, "test": 8}
    with pytest.raises(ManifestError, match="holdout"):
        split_table(table.assign(split="holdout"))


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


def test_hashes_are_of_the_samples_not_the_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pcm = (rng.standard_normal(4_800) * 3_000).astype(np.int16)
    sf.write(tmp_path / "a.wav", pcm, 48_000)
    sf.write(tmp_path / "b.flac", pcm, 48_000)
    sf.write(tmp_path / "c.wav", pcm[:-1], 48_000)
    (tmp_path / "d.wav").write_text("no audio")
    table = add_hashes(pd.DataFrame({"speech": [str(tmp_path / n) for n in ("a.wav", "b.flac", "c.wav", "d.wav")]}))
    first, second, third, broken = table["content_hash"]
    assert first == second != third
    assert broken == ""
    assert duplicates_in(table) == [[str(tmp_path / "a.wav"), str(tmp_path / "b.flac")]]


def test_leaks_are_training_and_selection_recordings_only() -> None:
    training = pd.DataFrame({"content_hash": ["a", "b", "c", ""], "split": ["train", "inner_val", "test", "train"]})
    asked = pd.DataFrame({"content_hash": ["a", "b", "c", "d", ""]})
    assert leaked(asked, training).tolist() == [True, True, False, False, False]
    assert not leaked(asked, pd.DataFrame()).any()


def test_a_given_split_is_trained_on_whole_when_no_inner_validation_is_wanted() -> None:
    table = manifest(40)
    table["split"] = ["test" if i < 8 else "inner_val" if i < 16 else "train" for i in range(40)]
    parts = split_table(table, inner_val=0)
    assert {name: len(part) for name, part in parts.items()} == {"train": 32, "inner_val": 0, "test": 8}
    assert list(parts["train"]["speech"].map(lambda p: Path(p).stem)) == [f"{i:04d}" for i in range(8, 40)]


def test_where_contents_are_unknown_names_decide() -> None:
    training = pd.DataFrame({"id": ["a", "b", "c", "t"], "content_hash": ["", "2", "3", ""]})
    training["split"] = ["train", "train", "train", "test"]
    asked = pd.DataFrame({"speech": [f"/x/{name}.wav" for name in "abcdt"], "content_hash": ["9", "", "9", "", ""]})
    # a: the bundle's is unknown; b: the asked one's; c: both known and different; t: of the test part
    assert leaked(asked, training).tolist() == [True, True, False, False, False]


def test_unknown_contents_are_told() -> None:
    table = pd.DataFrame({"speech": ["a.wav", "b.wav"], "content_hash": ["1", "2"]})
    assert unknown_content(table) is None
    assert str(unknown_content(table.assign(content_hash=["1", ""]))).startswith("1 of 2 recordings cannot be read")


def test_a_given_split_by_speaker_has_no_voice_in_two_parts() -> None:
    table = manifest(40, speakers=4)
    apart = table.assign(split=["test" if speaker == table["speaker"][0] else "train" for speaker in table["speaker"]])
    parts = split_table(apart, by="speaker")
    assert [part["speaker"].nunique() for part in parts.values()] == [2, 1, 1]
    mixed = table.assign(split=["test" if i % 5 == 0 else "train" for i in range(40)])
    assert len(split_table(mixed)["test"]) == 8
    with pytest.raises(
        ManifestError, match=r"the given split has speaker .* in the .* and the .* part; put each speaker"
    ):
        split_table(mixed, by="speaker")
    with pytest.raises(ManifestError, match="add the column speaker"):
        split_table(apart.assign(speaker=""), by="speaker")
