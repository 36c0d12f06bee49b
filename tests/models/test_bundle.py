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
    assert bundle.metrics["test"]["model_sha256"] == bundle.weights_sha256
    assert bundle.metrics["note"] == "x"


def test_a_bundle_half_written_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path)

    def full_disk(path: Path, values: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_json", full_disk)
    with pytest.raises(BundleError, match="No space left"):
        save(tmp_path)
    with pytest.raises(BundleError, match=r"config\.json"):
        load_bundle(tmp_path)


@pytest.mark.parametrize("name", ["net.pt", "training.csv"])
def test_changed_or_missing_files_are_refused(bundle: Bundle, name: str) -> None:
    path = bundle.folder / name
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(BundleError, match=name):
        load_bundle(bundle.folder)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(BundleError, match=f"{name} is a Git LFS pointer.*git lfs pull"):
        load_bundle(bundle.folder)
    path.unlink()
    with pytest.raises(BundleError, match=name):
        load_bundle(bundle.folder)


@pytest.mark.parametrize(
    "change",
    [
        {"format_version": 2},
        {"format_version": None},
        {"labels": ["b", "a"]},
        {"labels": None},
        {"features": {"colour": 1}},
        {"temperature": 0},
        {"crops": 0},
        {"model": {}},
        {"files": []},
        {"name": "../net"},
        {"files": {"net.pt": "x", "../../etc/passwd": "y"}},
    ],
)
def test_configs_that_are_not_understood_are_refused_in_one_line(bundle: Bundle, change: dict[str, Any]) -> None:
    path = bundle.folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(BundleError) as caught:
        load_bundle(bundle.folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_damaged_json(bundle: Bundle, text: str) -> None:
    (bundle.folder / "config.json").write_text(text)
    with pytest.raises(BundleError):
        load_bundle(bundle.folder)


@pytest.mark.parametrize("name", ["nowhere", "nowhere.pt", "empty"])
def test_nothing_there(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BundleError, match=name):
        load_bundle(tmp_path / name)


@pytest.mark.parametrize("name", ["other.pt", "checkpoint.pt"])
def test_other_weights_beside_the_bundles_are_not_taken_for_them(bundle: Bundle, name: str) -> None:
    (bundle.folder / name).write_bytes(b"other weights")
    with pytest.raises(BundleError, match=rf"{name} is not the weights file of its bundle; give .*net\.pt"):
        load_bundle(bundle.folder / name)
    (bundle.folder / name).unlink()
    (bundle.folder / name).symlink_to("net.pt")
    assert load_bundle(bundle.folder / name).name == "net"


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.mark),))


def test_pickled_code_is_never_run(bundle: Bundle, tmp_path: Path) -> None:
    mark = tmp_path / "exploded"
    for write in (
        lambda p: torch.save({"weight": Bomb(mark)}, p),
        lambda p: p.write_bytes(pickle.dumps(Bomb(mark), protocol=2)),
    ):
        write(bundle.weights_path)
        with pytest.raises(BundleError):
            load_bundle(bundle.folder).state_dict()
        with pytest.raises(BundleError):  # even when somebody has mended the hash
            Bundle(**{**bundle.__dict__}).state_dict()
        assert not mark.exists()


def test_weights_of_another_model_do_not_fit(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="do not fit"):
        bundle.build_model()
