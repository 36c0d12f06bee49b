"""`ser adapt`: a model of one's own, that everything takes; and what it refuses, in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
import toy_data
from bundles import NARROW, untrained
from scipy.special import log_softmax

from jobs import adapt as job
from jobs import infer
from pipeline.data.labels import RAVDESS_LABELS
from pipeline.data.manifest import scan_folder
from pipeline.evaluation import leaks
from pipeline.features.features import FeatureConfig
from pipeline.features.store import load_features
from pipeline.inference.predictor import Predictor
from pipeline.models.backends import open_backend
from pipeline.models.bundle import Bundle, load_bundle
from pipeline.models.networks import build_model
from pipeline.training import adapt, embeddings
from pipeline.training.last_layer import Head

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
pytestmark = pytest.mark.usefixtures("undrawn")
DONE, USAGE, SOME_FAILED = 0, 2, 4
LABELS = RAVDESS_LABELS[:4]
CONFIG = FeatureConfig(sample_rate_hz=16_000, window_s=1.0, n_mels=32, n_fft=512, hop_length=256)


def parent_in(folder: Path, model: str = "inception", members: int = 1, **more: Any) -> Bundle:
    """An untrained network: its features tell the voices of the tests apart, its answers are chance."""
    config = CONFIG if model == "inception" else replace(CONFIG, kind="frame_features", n_mfcc=20)
    options = (NARROW if model == "inception" else {}) | ({"members": members} if members > 1 else {})
    return untrained(folder, model, options, **{"features": config} | more)


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return parent_in(tmp_path_factory.mktemp("parent") / "old")


@pytest.fixture
def mine(ravdess_like: Path, tmp_path: Path) -> Path:
    """A CSV of 64 recordings of four speakers, eight classes."""
    return written(scan_folder(ravdess_like), tmp_path / "mine.csv")


def written(table: pd.DataFrame, path: Path) -> Path:
    table[["speech", "label", "speaker"]].to_csv(path, index=False)
    return path


def right(bundle: Path, table: pd.DataFrame, **how: Any) -> float:
    """The share of the recordings that the written model answers as they are labelled."""
    heard = Predictor.from_bundle(bundle, threads=1, **how).predict(table["speech"].tolist())
    return float(np.mean([one.predicted == label for one, label in zip(heard, table["label"], strict=True)]))


def run(csv: Path, out: Path, parent: Bundle, *words: str) -> int:
    return job.main(["--data_csv", str(csv), "--out", str(out), "--model_weights", str(parent.folder), *words])


def test_it_writes_an_ordinary_bundle(mine: Path, parent: Bundle, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "models" / "mine"
    assert run(mine, out, parent, "--learning_curve") == DONE
    said = capsys.readouterr().out
    assert "verdict: adapted" in said
    assert said.count("of the recordings: UAR") == 3
    made, table = load_bundle(out), pd.read_csv(mine)
    assert made.labels == parent.labels
    assert made.temperature > 0
    assert leaks.find(table, made.training).mask.all()
    assert right(out, table) > 0.8
    figures = made.metrics["out_of_fold"]
    assert figures["uar"] > made.metrics["training"]["adapted"]["verdict"]["before"]
    assert figures["n"] == 64
    assert figures["intervals_95"]["uar"]
    card = (out / "README.md").read_text(encoding="utf-8")
    assert all(told in card for told in (parent.weights_sha256[:12], "| UAR | ", "by speaker"))
    assert not (out / ".adapt").exists()
    assert json.loads((out / "report" / "comparison.json").read_text(encoding="utf-8"))["n"] == 64
    assert infer.main(["--model_weights", str(out), "--file", table["speech"][0]]) == DONE
    assert run(mine, out, parent) == USAGE
    assert run(mine, parent.folder, parent, "--overwrite") == USAGE
    assert run(mine, tmp_path / "again", made) == USAGE  # it knows them all by now


def test_the_window_with_most_speech_is_heard_and_compared_with_the_middle_which_keeps_the_old_model(
    mine: Path, parent: Bundle, tmp_path: Path, capsys: Capture
) -> None:
    """Voices of a second at the end of a long silence: the middle tells nothing."""
    table = pd.read_csv(mine)
    for number, path in enumerate(table["speech"]):
        voice, rate_hz = soundfile.read(path, dtype="float32")
        late = tmp_path / f"{number}.wav"
        soundfile.write(late, np.concatenate([np.zeros(5 * rate_hz, np.float32), voice]), rate_hz)
        table.loc[number, "speech"] = str(late)
    csv, middle = written(table, tmp_path / "late.csv"), tmp_path / "middle"
    assert run(csv, middle, parent) == DONE
    assert "keep the old one" in capsys.readouterr().out
    assert not (middle / "config.json").exists()
    assert run(csv, middle, parent, "--anyway") == DONE
    assert load_bundle(middle).labels == parent.labels
    assert run(csv, tmp_path / "speech", parent, "--window", "speech") == DONE
    assert "verdict: adapted" in capsys.readouterr().out
    made = load_bundle(tmp_path / "speech")
    assert made.features == replace(parent.features, window="speech")
    about = made.metrics["training"]["adapted"]
    assert about["window"] == "speech"
    assert about["windows"]["speech"] > about["windows"]["middle"] + 0.2
    assert about["windows"]["speech"] == about["verdict"]["after"]
    assert right(made.folder, table, backend="torch") > 0.8
    old = toy_data.write_features(tmp_path / "old", 30)
    assert run(csv, tmp_path / "no", parent, "--window", "speech", "--features", str(old)) == USAGE
    assert "window middle, not speech" in capsys.readouterr().err.strip().splitlines()[-1]


def test_own_classes_are_the_models_classes(mine: Path, parent: Bundle, tmp_path: Path) -> None:
    table = pd.read_csv(mine)
    table["label"] = np.where(table["label"].isin(["angry", "fearful", "happy", "surprised"]), "loud", "quiet")
    csv = written(table, tmp_path / "two.csv")
    assert run(csv, tmp_path / "two", parent, "--anyway") == DONE
    assert load_bundle(tmp_path / "two").labels == ("loud", "quiet")
    assert run(csv, tmp_path / "ten", parent, "--anyway", "--classes", "all") == DONE
    assert set(load_bundle(tmp_path / "ten").labels) == {*parent.labels, "loud", "quiet"}


def one_class_a_speaker(table: pd.DataFrame, _: Path) -> pd.DataFrame:
    return table.assign(label=table["speaker"].map(dict(zip(table["speaker"].unique(), LABELS, strict=True))))


def a_copy_with_another_label(table: pd.DataFrame, folder: Path) -> pd.DataFrame:
    copy = shutil.copy(table["speech"][0], folder / "copy.wav")
    label = "calm" if table["label"][0] == "sad" else "sad"
    return pd.concat([table, table.head(1).assign(speech=str(copy), label=label)])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t, _: t.assign(label="sad"), "another class"),
        (lambda t, _: t[(t["label"] != "sad") | ~t["label"].duplicated()], "(sad 1)"),
        (lambda t, _: t.head(12), "too few"),
        (one_class_a_speaker, "one speaker only"),
        (lambda t, _: t.assign(speech=t["speech"] + ".gone"), "none of the 64"),
        (lambda t, _: t.replace({"label": {"calm": "silence"}}), "--label_map silence="),
        (a_copy_with_another_label, "same sound"),
    ],
)
def test_what_cannot_be_adapted_to_is_refused_in_one_line(
    change: Callable[..., pd.DataFrame], said: str, mine: Path, parent: Bundle, tmp_path: Path, capsys: Capture
) -> None:
    csv = written(change(pd.read_csv(mine), tmp_path), tmp_path / "bad.csv")
    assert run(csv, tmp_path / "out", parent) == USAGE
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert said in last
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_copy_and_what_is_broken_are_left_out_and_without_speakers_folds_are_of_recordings(
    mine: Path, parent: Bundle, tmp_path: Path, capsys: Capture
) -> None:
    table = pd.read_csv(mine)
    names = [shutil.copy(path, tmp_path / f"{number}.wav") for number, path in enumerate(table["speech"])]  # no speaker
    names += [shutil.copy(names[0], tmp_path / "copy.wav"), tmp_path / "broken.wav"]
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    labels = [*table["label"], table["label"][0], "sad"]
    csv = tmp_path / "plain.csv"
    pd.DataFrame({"speech": names, "label": labels}).to_csv(csv, index=False)
    assert run(csv, tmp_path / "out", parent, "--anyway") == SOME_FAILED
    told = capsys.readouterr().err
    assert "broken.wav" in told
    assert "by recording" in told
    assert load_bundle(tmp_path / "out").metrics["out_of_fold"]["n"] == 64


def test_what_was_heard_is_not_heard_again_but_for_a_changed_recording(
    mine: Path, parent: Bundle, tmp_path: Path, monkeypatch: Patch
) -> None:
    table = pd.read_csv(mine)
    table["speech"] = copies = [shutil.copy(path, tmp_path) for path in table["speech"]]
    first = embeddings.embed_all(table, parent, tmp_path / "kept")
    decoded: list[object] = []
    real = embeddings.load_once
    monkeypatch.setattr(embeddings, "load_once", lambda source, **how: decoded.append(source) or real(source, **how))
    again = embeddings.embed_all(table, parent, tmp_path / "kept")
    assert not decoded
    np.testing.assert_array_equal(first.embeddings["middle"], again.embeddings["middle"])
    shutil.copy(copies[-1], copies[0])  # another sound under the old name
    changed = embeddings.embed_all(table, parent, tmp_path / "kept")
    assert decoded
    assert changed.table["content_hash"][0] == changed.table["content_hash"].iloc[-1]


@pytest.mark.parametrize(("model", "members"), [("inception", 1), ("inception", 2), ("cnn_bilstm", 1)])
def test_hidden_features_and_the_last_layer_are_the_network(model: str, members: int, tmp_path: Path) -> None:
    bundle = parent_in(tmp_path / "it", model, members)
    features = np.random.default_rng(0).standard_normal((5, *bundle.features.input_shape)).astype(np.float32)
    network = bundle.build_model()
    with torch.inference_mode():
        expected = network(torch.from_numpy(features)).numpy()
    weight, bias = embeddings.last_layer(network)
    heard = embeddings.embed(open_backend(bundle, "torch", "cpu", 1), features)
    np.testing.assert_allclose(heard @ weight.T + bias, expected, atol=1e-4)
    rng = np.random.default_rng(1)
    other, shift = rng.standard_normal((3, weight.shape[1])), rng.standard_normal(3)
    changed = build_model(model, dict(bundle.model_options), 3, bundle.features.input_shape).eval()
    changed.load_state_dict(embeddings.with_last_layer(bundle, other, shift))
    with torch.inference_mode():
        found = changed(torch.from_numpy(features)).numpy()
    np.testing.assert_allclose(found, heard @ other.T + shift, atol=1e-3)


def test_the_last_stage_competes_when_there_is_time(
    mine: Path, parent: Bundle, tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(adapt, "EPOCHS", 2)
    monkeypatch.setattr(job, "usable_cpus", lambda: 1)
    half = written(pd.read_csv(mine).iloc[::2], tmp_path / "half.csv")
    assert run(half, tmp_path / "out", parent, "--max_minutes", "60", "--anyway") == DONE
    assert "last stage: " in capsys.readouterr().err
    assert load_bundle(tmp_path / "out").build_model()


def test_training_the_last_stage_leaves_what_comes_before_it(parent: Bundle, monkeypatch: Patch) -> None:
    monkeypatch.setattr(adapt, "EPOCHS", 30)
    monkeypatch.setattr(adapt, "RATE", 3e-3)
    features = np.random.default_rng(0).standard_normal((12, *parent.features.input_shape)).astype(np.float32)
    features[::2, :, :8] += 3.0
    truth = np.arange(12) % 2
    given = adapt.before_tail(parent, features)
    weight, bias = embeddings.last_layer(parent.build_model())
    start = Head(weight[:2], bias[:2])
    state = adapt.tune(parent, start, given, truth, np.arange(12), threads=1)
    before = parent.state_dict()
    changed = {name.split(".")[0] for name in state if name in before and not torch.equal(state[name], before[name])}
    assert changed == {"stage5", "head"}
    assert not any("running_" in name and not torch.equal(state[name], before[name]) for name in state)
    network = build_model("inception", dict(parent.model_options), 2, parent.features.input_shape).eval()
    network.load_state_dict(dict(state))
    with torch.inference_mode():
        whole = network(torch.from_numpy(features)).numpy()
    np.testing.assert_allclose(adapt.tail_logits(parent, state, given), whole, atol=1e-4)
    own = start.logits(embeddings.embed(open_backend(parent, "torch", "cpu", 1), features))
    rows = np.arange(12)
    assert log_softmax(whole, axis=1)[rows, truth].mean() > log_softmax(own, axis=1)[rows, truth].mean()


def test_rehearsal_takes_what_the_parent_learnt_of_these_classes_and_nothing_of_the_users(tmp_path: Path) -> None:
    arrays = load_features(toy_data.write_features(tmp_path / "old", 30, copies=1))
    training = pd.DataFrame({"id": [f"{n:03d}" for n in range(30)], "content_hash": "", "speaker": ""})
    training["split"] = ["test" if n >= 27 else "train" for n in range(30)]
    bundle = parent_in(tmp_path / "it", features=toy_data.CONFIG, training=training)
    own = arrays.table.head(1).assign(content_hash="")  # a calm one, by its path
    found = embeddings.rehearsed(arrays, ("calm", "sad", "bored"), own, bundle)
    assert found is not None
    assert np.bincount(found[1]).tolist() == [8, 9]
    assert found[0].shape == (17, embeddings.last_layer(bundle.build_model())[0].shape[1])
    assert embeddings.rehearsed(arrays, ("bored",), own, bundle) is None
