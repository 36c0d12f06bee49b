from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
from made_predictions import LABELS, made_predictions

from pipeline.data.splits import add_hashes
from pipeline.evaluation import leaks


@pytest.fixture
def manifest(write_audio: Callable[..., Path]) -> pd.DataFrame:
    paths = [write_audio(f"{i}.wav", seed=i, duration_s=0.3) for i in range(6)]
    return pd.DataFrame({"speech": map(str, paths), "label": "sad", "speaker": [f"s{i % 3}" for i in range(6)]})


def trained_on(manifest: pd.DataFrame, splits: list[str]) -> pd.DataFrame:
    """A bundle's training table that holds the first rows of the manifest."""
    return add_hashes(manifest.head(len(splits))).assign(id="x", split=splits)[
        ["id", "content_hash", "speaker", "split"]
    ]


def test_recordings_are_found_by_content_in_another_format_and_under_another_name(
    manifest: pd.DataFrame, tmp_path: Path
) -> None:
    training = trained_on(manifest, ["train", "inner_val"])
    samples, rate_hz = soundfile.read(manifest["speech"][0], dtype="int16")
    soundfile.write(tmp_path / "renamed.flac", samples, rate_hz, subtype="PCM_16")
    given = manifest.assign(speech=[str(tmp_path / "renamed.flac"), *manifest["speech"][1:]])
    assert leaks.find(given, training).mask.tolist() == [True, True, False, False, False, False]


def test_the_test_part_of_the_training_table_was_not_used(manifest: pd.DataFrame) -> None:
    found = leaks.find(manifest, trained_on(manifest, ["test", "test", "train"]))
    assert found.mask.tolist() == [False, False, True, False, False, False]
    assert found.shared_speakers == ("s2",)


def test_duplicates_and_unreadable_files(manifest: pd.DataFrame, tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("no audio")
    copy = tmp_path / "copy.wav"
    copy.write_bytes(Path(manifest["speech"][1]).read_bytes())
    more = pd.DataFrame({"speech": [str(tmp_path / "text.wav"), str(tmp_path / "text.wav"), str(copy)], "label": "sad"})
    found = leaks.find(pd.concat([manifest, more], ignore_index=True), trained_on(manifest, ["train"]))
    assert found.duplicates == ((manifest["speech"][1], str(copy)),)
    assert found.mask.sum() == 1


def test_a_column_of_the_csv_does_not_say_what_a_recording_holds(manifest: pd.DataFrame) -> None:
    """Others may mean another hash by the name, or fill it in wrongly: the recordings are read."""
    training = trained_on(manifest, ["train", "train"])
    for cells in ("d41d8cd98f00b204e9800998ecf8427e", ""):
        found = leaks.find(manifest.assign(content_hash=cells), training)
        assert found.mask.tolist() == [True, True, False, False, False, False]
        assert (found.duplicates, found.unread) == ((), 0)


def test_a_bundle_that_lists_nothing_says_so(manifest: pd.DataFrame) -> None:
    found = leaks.find(manifest, pd.DataFrame())
    assert not found.mask.any()
    assert "no leak can be found" in str(found.note)


def test_figures_with_and_without() -> None:
    table = made_predictions(100, accuracy=1.0)
    table.loc[50:, "predicted"] = [next(n for n in LABELS if n != t) for t in table["label_name"][50:]]
    found = leaks.describe(leaks.Leaks(np.arange(100) < 25, ("s1",), ()), table, LABELS)
    assert (found["leaked"], found["all"]["n"], found["unseen"]["n"]) == (25, 100, 75)
    assert found["all"]["accuracy"] == pytest.approx(0.5)
    assert found["unseen"]["accuracy"] == pytest.approx(25 / 75)
    everything = leaks.describe(leaks.Leaks(np.ones(100, dtype=bool), (), ()), table, LABELS)
    assert everything["unseen"] == {"n": 0, "accuracy": None, "uar": None, "weighted_f1": None}


def test_a_bundle_that_was_trained_without_the_audio_is_compared_by_name_and_says_so(manifest: pd.DataFrame) -> None:
    training = trained_on(manifest, ["train", "train", "test"]).assign(content_hash="", id=["0", "1", "2"])
    found = leaks.find(manifest, training)
    assert found.mask.tolist() == [True, True, False, False, False, False]
    assert (found.by_name, found.unread) == (2, 0)


def test_what_cannot_be_read_is_not_counted_as_compared(manifest: pd.DataFrame, tmp_path: Path) -> None:
    gone = pd.DataFrame({"speech": [str(tmp_path / "gone.wav")], "label": "sad"})
    asked = pd.concat([manifest.head(2), gone], ignore_index=True)
    found = leaks.find(asked, trained_on(manifest, ["train"]).assign(id="gone"))
    assert found.mask.tolist() == [True, False, False]
    told = leaks.describe(found, asked.assign(status="ok"), LABELS)
    assert told["checked"] == 2


@pytest.mark.parametrize("speaker", [None, ""])
def test_voices_are_known_by_ravdess_names_on_both_sides(speaker: str | None) -> None:
    """A model may have been trained from a CSV of two columns too, and a column of speakers may be empty."""
    heard = pd.DataFrame({"id": ["03-01-05-01-01-01-07", "03-01-04-01-01-01-08"], "split": ["train", "test"]})
    training = heard.assign(content_hash="x", speaker="")
    given = pd.DataFrame({"speech": [f"/judges/03-01-03-01-01-01-0{i}.wav" for i in (7, 8, 9)], "label": "happy"})
    asked = given if speaker is None else given.assign(speaker=speaker)
    found = leaks.find(asked, training, contents=asked.assign(content_hash=["a", "b", "c"]))
    assert found.shared_speakers == ("RAVDESS_07",)


def test_a_path_that_is_listed_twice_is_no_copy(manifest: pd.DataFrame) -> None:
    twice = pd.concat([manifest, manifest.head(1)], ignore_index=True)
    assert leaks.find(twice, trained_on(manifest, ["train"])).duplicates == ()
