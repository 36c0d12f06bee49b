"""Which recordings of an evaluation a bundle was trained on: by their content, else by their name."""

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
    columns = ["id", "content_hash", "speaker", "split"]
    return add_hashes(manifest.head(len(splits))).assign(id="x", split=splits)[columns]


@pytest.mark.parametrize("cells", [None, "d41d8cd98f00b204e9800998ecf8427e", ""])
def test_used_recordings_are_found_by_content_alone(manifest: pd.DataFrame, tmp_path: Path, cells: str | None) -> None:
    """In another format, under another name, and whatever the CSV itself says about its contents."""
    training = trained_on(manifest, ["train", "inner_val", "test"])
    samples, rate_hz = soundfile.read(manifest["speech"][0], dtype="int16")
    soundfile.write(tmp_path / "renamed.flac", samples, rate_hz, subtype="PCM_16")
    given = manifest.assign(speech=[str(tmp_path / "renamed.flac"), *manifest["speech"][1:]])
    found = leaks.find(given if cells is None else given.assign(content_hash=cells), training)
    assert found.mask.tolist() == [True, True, False, False, False, False]
    assert (found.shared_speakers, found.duplicates, found.unread) == (("s0", "s1"), (), 0)


def test_copies_repeats_and_unreadable_files(manifest: pd.DataFrame, tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("no audio")
    copy = tmp_path / "copy.wav"
    copy.write_bytes(Path(manifest["speech"][1]).read_bytes())
    paths = [
        manifest["speech"][0],
        *(str(tmp_path / name) for name in ("text.wav", "text.wav", "copy.wav", "gone.wav")),
    ]
    asked = pd.concat([manifest, pd.DataFrame({"speech": paths, "label": "sad"})], ignore_index=True)
    found = leaks.find(asked, trained_on(manifest, ["train"]).assign(id="gone"))
    assert found.duplicates == ((manifest["speech"][1], str(copy)),)  # a path that is listed twice is no copy
    assert np.flatnonzero(found.mask).tolist() == [0, 6]
    assert leaks.describe(found, asked.assign(status="ok"), LABELS)["checked"] == 11 - 3


def test_a_bundle_without_contents_is_compared_by_name_and_one_without_a_list_says_so(manifest: pd.DataFrame) -> None:
    training = trained_on(manifest, ["train", "train", "test"]).assign(content_hash="", id=["0", "1", "2"])
    found = leaks.find(manifest, training)
    assert found.mask.tolist() == [True, True, False, False, False, False]
    assert (found.by_name, found.unread, found.note) == (2, 0, None)
    nothing = leaks.find(manifest, pd.DataFrame())
    assert not nothing.mask.any()
    assert nothing.note


def test_figures_with_and_without() -> None:
    table = made_predictions(100, accuracy=1.0)
    table.loc[50:, "predicted"] = [next(n for n in LABELS if n != t) for t in table["label_name"][50:]]
    found = leaks.describe(leaks.Leaks(np.arange(100) < 25, ("s1",), ()), table, LABELS)
    assert (found["leaked"], found["all"]["n"], found["unseen"]["n"]) == (25, 100, 75)
    assert found["all"]["accuracy"] == pytest.approx(0.5)
    assert found["unseen"]["accuracy"] == pytest.approx(25 / 75)
    everything = leaks.describe(leaks.Leaks(np.ones(100, dtype=bool), (), ()), table, LABELS)
    assert everything["unseen"] == {"n": 0, "accuracy": None, "uar": None, "weighted_f1": None}


def test_voices_are_known_by_ravdess_names_on_both_sides() -> None:
    """A model may have been trained from a CSV of two columns too, and a column of speakers may be empty."""
    heard = pd.DataFrame({"id": ["03-01-05-01-01-01-07", "03-01-04-01-01-01-08"], "split": ["train", "test"]})
    training = heard.assign(content_hash="x", speaker="")
    given = pd.DataFrame({"speech": [f"/judges/03-01-03-01-01-01-0{i}.wav" for i in (7, 8, 9)], "label": "happy"})
    for asked in (given, given.assign(speaker="")):
        found = leaks.find(asked, training, contents=asked.assign(content_hash=["a", "b", "c"]))
        assert found.shared_speakers == ("RAVDESS_07",)
