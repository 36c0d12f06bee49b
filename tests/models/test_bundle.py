"""Bundles: what is saved comes back; what is missing, changed, unknown or pickled is refused in one line."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from pipeline.data.labels import RAVDESS_LABELS
from pipeline.features.features import FeatureConfig
from pipeline.models import bundle as checkpoint
from pipeline.models.bundle import Bundle, BundleError, load_bundle, save_bundle


def save(folder: Path, **changes: Any) -> Bundle:
    values: dict[str, Any] = {
        "name": "net",
        "state_dict": {"weight": torch.arange(6.0).reshape(2, 3)},
        "model_name": "inception",
        "model_options": {"dropout": 0.4},
        "labels": RAVDESS_LABELS,
        "features": FeatureConfig(),
        "metrics": {"test": {"accuracy": 0.5}, "note": "x"},
        "training": pd.DataFrame({"id": ["a"], "content_hash": ["h"], "speaker": ["s"], "split": ["train"]}),
        "card": "# card\n",
        "temperature": 1.5,
        "crops": 3,
    }
    return save_bundle(folder, **{**values, **changes})


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return save(tmp_path / "net")


def test_round_trip_by_folder_and_by_weights_file(bundle: Bundle) -> None:
    for path in (bundle.folder, bundle.weights_path, str(bundle.folder)):
        again = load_bundle(path)
        assert again.labels == RAVDESS_LABELS
        assert again.features.fingerprint() == FeatureConfig().fingerprint()
        assert (again.temperature, again.crops, again.model_options) == (1.5, 3, {"dropout": 0.4})
        assert torch.equal(again.state_dict()["weight"], torch.arange(6.0).reshape(2, 3))
        assert again.training["content_hash"].tolist() == ["h"]
    assert bundle.metrics == {"test": {"accuracy": 0.5, "model_sha256": bundle.weights_sha256}, "note": "x"}
    with pytest.raises(BundleError, match="do not fit"):
        bundle.build_model()


def test_a_bundle_half_written_is_none(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(path: Path, values: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_json", full_disk)
    with pytest.raises(BundleError, match="No space left"):
        save(bundle.folder)
    with pytest.raises(BundleError, match=r"config\.json"):
        load_bundle(bundle.folder)


@pytest.mark.parametrize("name", ["net.pt", "training.csv"])
def test_changed_or_missing_files_are_refused(bundle: Bundle, name: str) -> None:
    path = bundle.folder / name
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    for content, word in ((path.read_bytes()[:-1] + b"?", name), (pointer, f"{name} .*git lfs pull"), (None, name)):
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(BundleError, match=word):
            load_bundle(bundle.folder)


WRONG: dict[str, list[Any]] = {
    **{"format_version": [2, None], "labels": [["b", "a"], None], "features": [{"colour": 1}], "temperature": [0]},
    **{"crops": [0], "model": [{}], "name": ["../net"], "files": [[], {"net.pt": "x", "../../etc/passwd": "y"}]},
}


@pytest.mark.parametrize(
    "change", ["", "{", "[]", "\x00", *({name: value} for name, values in WRONG.items() for value in values)]
)
def test_configs_that_are_not_understood_are_refused_in_one_line(bundle: Bundle, change: Any) -> None:
    path = bundle.folder / "config.json"
    path.write_text(change if isinstance(change, str) else json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(BundleError) as caught:
        load_bundle(bundle.folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nowhere", "nowhere.pt", "empty"])
def test_nothing_there(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BundleError, match=name):
        load_bundle(tmp_path / name)


@pytest.mark.parametrize("name", ["other.pt", "checkpoint.pt"])
def test_other_weights_beside_the_bundles_are_not_taken_for_them(bundle: Bundle, name: str) -> None:
    other = bundle.folder / name
    other.write_bytes(b"other weights")
    with pytest.raises(BundleError, match=rf"{name} is not .*net\.pt"):
        load_bundle(other)
    other.unlink()
    other.symlink_to("net.pt")
    assert load_bundle(other).name == "net"


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.mark),))


def test_pickled_code_is_never_run(bundle: Bundle, tmp_path: Path) -> None:
    mark = tmp_path / "exploded"
    for write in (
        lambda path: torch.save({"weight": Bomb(mark)}, path),
        lambda path: path.write_bytes(pickle.dumps(Bomb(mark), protocol=2)),
    ):
        write(bundle.weights_path)
        with pytest.raises(BundleError):
            load_bundle(bundle.folder).state_dict()
        with pytest.raises(BundleError):  # even when somebody has mended the hash
            bundle.state_dict()
        assert not mark.exists()
