"""The folder of a run: laid down, trained in, resumed, refused, and at last a bundle. In this process, without Ray."""

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
import torch
from sklearn.metrics import accuracy_score, log_loss
from torch import nn
from toy_data import CONFIG, LABELS, mel_powers, toy_model, write_features

from pipeline.data.splits import split_table
from pipeline.features.features import normalise_power
from pipeline.features.store import load_features
from pipeline.models.bundle import load_bundle
from pipeline.models.networks import build_model
from pipeline.storage.errors import SerError
from pipeline.storage.journal import locked
from pipeline.training import results
from pipeline.training import run as runs
from pipeline.training.config import FitConfig
from pipeline.training.loop import Run, StateDict
from pipeline.training.plan import Plan, read_plan
from pipeline.training.results import keep_weights, write_results
from pipeline.training.run import (
    begin,
    check,
    check_resumes,
    read_history,
    read_splits,
    rows_of,
    save_checkpoint,
    train_here,
    training_data,
)

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_features(tmp_path_factory.mktemp("toy") / "features", copies=1)


@pytest.fixture
def plan(features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """A new run of a tiny model in the Inception's place."""

    def build(name: str, options: Any, n_classes: int, input_shape: Any) -> nn.Module:
        assert name == "inception"
        return toy_model(n_classes)

    for module in ("training.run", "training.results", "models.networks"):
        monkeypatch.setattr(f"pipeline.{module}.build_model", build)
    config = FitConfig(epochs=3, batch_size=8, lr=1e-2, ema=0.5, augment=("crop", "mixup", "pitch"), threads=1)
    made = Plan(tmp_path / "run", (features,), LABELS, "inception", {}, config)
    begin(made, split_of(features))
    return made


def split_of(features: Path) -> dict[str, pd.DataFrame]:
    table = load_features(features).table
    return split_table(table[table["parent_id"] == ""])


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same(ours: StateDict, theirs: StateDict) -> None:
    torch.testing.assert_close(dict(ours), dict(theirs), rtol=0, atol=0)


def interrupt_after(epochs: int) -> Callable[[dict[str, Any], Run], None]:
    def stop(record: dict[str, Any], run: Run) -> None:
        if record["epoch"] == epochs:
            raise KeyboardInterrupt

    return stop


def test_splits_hold_every_clip_once_and_no_copy(plan: Plan) -> None:
    data, parts = training_data(plan), read_splits(plan.out)
    assert [len(parts[name]) for name in ("train", "inner_val", "test")] == [38, 10, 12]
    ids = [int(row) for part in parts.values() for row in part["row_id"]]
    assert sorted(ids) == list(range(60))
    table = load_features(plan.features).table
    for rows, name in ((data.train_rows, "train"), (data.valid_rows, "inner_val")):
        assert table["row_id"].iloc[rows].tolist() == parts[name]["row_id"].tolist()
        assert [LABELS[c] for c in data.classes[rows]] == parts[name]["label"].tolist()
    assert data.copies is not None
    assert set(data.copies) == set(np.flatnonzero(table["parent_id"] == ""))


def test_a_run_from_the_start_to_its_bundle_and_figures(plan: Plan) -> None:
    seen: list[list[int]] = []
    result = train_here(plan, on_epoch=lambda record, run: seen.append([r["epoch"] for r in read_history(plan.out)]))
    assert seen == [[1], [1, 2], [1, 2, 3]]  # history.csv grows as it runs
    made = write_results(plan, "test")
    bundle = load_bundle(plan.out)
    assert (bundle.name, bundle.labels) == ("inception_ser_final", LABELS)
    assert_same(bundle.state_dict(), result.weights)
    table = pd.read_csv(plan.out / "training.csv", dtype=str)
    assert table["split"].value_counts().to_dict() == {"train": 38, "inner_val": 10, "test": 12}
    training, test = bundle.metrics["training"], bundle.metrics["test"]
    assert (training["epochs"], training["settings"]["seed"]) == (3, 42)
    assert test["trained_on"] == training["trained_on"] == "38 clips (splits/train.csv)"
    assert test["model_sha256"] == bundle.weights_sha256
    assert "accuracy" in made.summary
    written = {"curves.png", "history.csv", "README.md", "report/report.html", "report/metrics.json"}
    assert written <= set(files(plan.out))
    assert not (plan.out / "interrupted").exists()

    arrays, part = load_features(plan.features), read_splits(plan.out)["test"]
    model = toy_model()
    model.load_state_dict(result.weights)
    rows = [arrays.table["row_id"].tolist().index(row) for row in part["row_id"]]
    with torch.inference_mode():
        p = model.eval()(torch.from_numpy(arrays.features[rows])).double().softmax(dim=1).numpy()
    truth = part["label"].map(LABELS.index)
    assert test["n"] == len(part) == 12
    assert test["accuracy"] == pytest.approx(accuracy_score(truth, p.argmax(axis=1)))
    assert test["confidence"]["log_loss"] == pytest.approx(log_loss(truth, p, labels=range(len(LABELS))))
    intervals = test["intervals_95"]
    assert "over recordings" in intervals["method"]  # 4 speakers are too few
    for name in ("accuracy", "uar", "weighted_f1", "macro_f1"):
        low, high = intervals[name]
        assert low <= test[name] <= high
        assert high - low > 0.1  # few recordings: nothing is certain
    for label, interval in intervals["class_recall"].items():
        assert interval is None or interval[0] <= test["class_recall"][label] <= interval[1]


def test_an_interrupted_run_goes_on_to_the_same_end(plan: Plan, tmp_path: Path) -> None:
    whole = replace(plan, out=tmp_path / "whole")
    begin(whole, split_of(plan.features[0]))
    expected = train_here(whole)
    assert train_here(plan, on_epoch=interrupt_after(2)).interrupted
    kept = keep_weights(plan).bundle
    assert kept.folder == plan.out / "interrupted"
    assert kept.metrics["training"]["epochs"] == 2
    assert "test" not in kept.metrics  # no split is opened before the end
    assert not (plan.out / "config.json").exists()
    assert_same(train_here(plan).weights, expected.weights)
    histories = [[(r["epoch"], r["train_loss"]) for r in read_history(out)] for out in (plan.out, whole.out)]
    assert histories[0] == histories[1]
    assert [epoch for epoch, _ in histories[0]] == [1, 2, 3]
    write_results(plan, "none")
    assert not (plan.out / "interrupted").exists()


def test_a_finished_run_is_not_trained_again_but_its_history_mended(plan: Plan) -> None:
    """A kill between the checkpoint and the history leaves the history one epoch short."""
    train_here(plan)
    checkpoint, text = plan.checkpoint.read_bytes(), (plan.out / "history.csv").read_text()
    (plan.out / "history.csv").write_text("\n".join(text.splitlines()[:3]) + "\n")
    (plan.out / ".checkpoint.pt.1.tmp").write_bytes(b"half")
    again = train_here(plan, on_epoch=lambda *_: pytest.fail("an epoch too many"))
    assert len(again.history) == 3
    assert plan.checkpoint.read_bytes() == checkpoint
    assert (plan.out / "history.csv").read_text() == text
    assert not list(plan.out.glob(".*.tmp"))


def test_no_validation_part(plan: Plan, tmp_path: Path) -> None:
    table = load_features(plan.features).table
    bare = replace(plan, out=tmp_path / "bare")
    begin(bare, split_table(table[table["parent_id"] == ""].assign(corpus="mine"), inner_val=0))
    result = train_here(bare)
    assert result.best_epoch == 3
    assert write_results(bare, "inner_val").report is None  # nothing to report on
    bundle = load_bundle(bare.out)
    assert set(bundle.metrics) == {"training"}
    assert "CC BY-NC-SA" not in (bare.out / "README.md").read_text()  # RAVDESS's licence, of other recordings
    assert_same(bundle.state_dict(), result.weights)


def test_two_processes_cannot_train_one_run(plan: Plan) -> None:
    with locked(plan.out / ".lock", "training"), pytest.raises(SerError, match="another process is training"):
        train_here(plan, lock_wait_s=0.2)
    train_here(plan)


def test_a_run_is_not_written_over(plan: Plan) -> None:
    begin(plan, split_of(plan.features[0]))  # no epoch is done yet
    train_here(plan, on_epoch=interrupt_after(1))
    before = files(plan.out)
    with pytest.raises(SerError, match="--resume"):
        begin(plan, split_of(plan.features[0]))
    assert files(plan.out) == before


def test_other_settings_are_refused(plan: Plan) -> None:
    started = read_plan(plan.out)
    plan.check_continues(started)
    replace(plan, fit=replace(plan.fit, threads=2, patience=1)).check_continues(started)
    for other, word in (
        (replace(plan, model_name="cnn_bilstm"), "model"),
        (replace(plan, model_options={"dropout": 0.1}), "model"),
        (replace(plan, labels=("calm", "sad")), "labels"),
        (replace(plan, teachers=(plan.out,)), "teachers"),
        (replace(plan, crops=3), "crops 1, got 3"),
        (replace(plan, fit=replace(plan.fit, seed=1)), "seed=42, got 1"),
    ):
        with pytest.raises(SerError, match=f"started with {word}"):
            other.check_continues(started)


def test_single_examples_are_too_few_where_the_last_stage_is_one_pixel(features: Path, tmp_path: Path) -> None:
    """It is of features of 16 x 32; of the brief's 64 x 188 it is 2 x 6, and there one example is enough."""
    config = FitConfig(epochs=1, batch_size=1)
    plan = Plan(tmp_path / "run", (features,), LABELS, "inception", {"width": 0.125}, config)
    begin(plan, split_of(features))
    pairs = replace(plan, fit=replace(config, batch_size=2))
    check(pairs)
    for too_few, workers in ((plan, 1), (pairs, 2)):
        with pytest.raises(SerError, match="--batch_size"):
            check(too_few, workers)
    runs._check_single(build_model("inception", {"width": 0.125}, 8, (1, 64, 188)), (1, 64, 188))


def test_what_cannot_be_trained_is_found_before_the_start(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(plan, 2)
    with pytest.raises(SerError, match="multiple of 3"):
        check(plan, 3)
    with pytest.raises(SerError, match="crops must be 1 or more"):
        check(replace(plan, crops=0))
    for read in (read_plan, read_splits):
        with pytest.raises(SerError, match="no run to resume"):
            read(tmp_path)
    without = replace(load_features(plan.features), mel_power=None)
    monkeypatch.setattr(runs, "load_features", lambda _folder: without)
    plain = replace(plan, fit=replace(plan.fit, augment=()))
    check(plain)
    with pytest.raises(SerError, match="--mel_power_s 6"):
        check(replace(plain, crops=3))
    with pytest.raises(SerError, match="--mel_power_s 6"):
        without.crops(0, 3)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('{"version":', "damaged"),
        ("[]", "damaged"),
        ('{"version": 1}', "damaged"),
        ('{"version": 1, "features": 3, "labels": null}', "damaged"),
        ('{"version": 9}', "version 9"),
    ],
)
def test_a_damaged_plan_is_told(text: str, word: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(SerError, match=word):
        read_plan(tmp_path)


def test_features_of_other_settings_are_refused_even_with_the_same_recordings(plan: Plan, tmp_path: Path) -> None:
    """A fold of pictures of 2 s and one of 3 s would pass for one run."""
    check_resumes(plan)
    elsewhere = Path(shutil.copytree(plan.features[0], tmp_path / "moved"))
    moved = replace(plan, features=(elsewhere,))
    check_resumes(moved)
    manifest = json.loads((elsewhere / "manifest.json").read_text())
    longer = replace(CONFIG, window_s=2 * CONFIG.window_s)
    manifest |= {"features": longer.to_dict(), "fingerprint": longer.fingerprint()}
    (elsewhere / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SerError, match=r"features of other settings .*moved"):
        check_resumes(moved)

    path = plan.out / "plan.json"
    older = {name: value for name, value in json.loads(path.read_text()).items() if name != "feature_fingerprint"}
    path.write_text(json.dumps(older))
    check_resumes(moved)  # begun before this was kept: nothing is known


def test_other_recordings_or_labels_under_the_same_numbers_are_refused(plan: Plan, tmp_path: Path) -> None:
    table, part = load_features(plan.features).table, read_splits(plan.out)["train"]
    rows = rows_of(table, part, plan.features)
    elsewhere = part.assign(speech=[speech.replace("/audio/", "D:\\copies\\") for speech in part["speech"]])
    np.testing.assert_array_equal(rows_of(table, elsewhere, plan.features), rows)
    other = part.assign(speech=["/audio/other.wav", *part["speech"][1:]])
    renamed = table.assign(label=table["label"].map(dict(zip(LABELS, (*LABELS[1:], LABELS[0]), strict=True))))
    for found, begun, word in ((table, other, r"/audio/other\.wav"), (renamed, part, "start a new run")):
        with pytest.raises(SerError, match=word):
            rows_of(found, begun, plan.features)
    with pytest.raises(SerError, match="is not in"):
        train_here(replace(plan, features=(write_features(tmp_path / "fewer", n=30),)))


def test_checkpoints_hold_no_code(plan: Plan, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (tmp_path.joinpath("touched").touch, ())

    save_checkpoint(plan.checkpoint, {"version": 1, "evil": Evil()})
    with pytest.raises(SerError, match="cannot read the checkpoint"):
        train_here(plan)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("content", [b"", b"PK", b"PK no checkpoint", None])
def test_a_damaged_checkpoint_is_told(content: bytes | None, plan: Plan) -> None:
    if content is None:
        torch.save({"weights": torch.zeros(1)}, plan.checkpoint)
    else:
        plan.checkpoint.write_bytes(content)
    with pytest.raises(SerError, match="start a new run"):
        check(plan)


def test_a_full_disk_is_told_and_leaves_the_epochs_before(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(_: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 6245056 vs 6244952")  # torch's

    train_here(plan, on_epoch=interrupt_after(1))
    before = plan.checkpoint.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", no_room)
        with pytest.raises(SerError, match="--resume"):
            train_here(plan)
        assert plan.checkpoint.read_bytes() == before
        assert not list(plan.out.glob(".*.tmp"))
        with pytest.raises(SerError, match="cannot write the bundle"):
            write_results(plan, "none")
    train_here(plan)
    write_results(plan, "none")
    assert load_bundle(plan.out)


def test_several_crops_are_the_mean_of_their_log_probabilities(plan: Plan) -> None:
    """By hand: 96 frames and a window of 32 leave room for 65 starts, of which 10, 32 and 54 lie mid-way in thirds."""
    torch.manual_seed(0)
    model, power = toy_model(len(LABELS)).eval(), mel_powers(60)[0]
    found = results.predict(replace(plan, crops=3), model.state_dict(), read_splits(plan.out)["test"])
    for row_id, *told in found[["row_id", *(f"p_{label}" for label in LABELS)]].itertuples(index=False):
        windows = [normalise_power(power[int(row_id)][:, start : start + 32], CONFIG) for start in (10, 32, 54)]
        with torch.inference_mode():
            p = model(torch.from_numpy(np.stack(windows))).double().softmax(dim=1).numpy()
        pooled = np.prod(p, axis=0) ** (1 / 3)
        np.testing.assert_allclose(told, pooled / pooled.sum(), rtol=1e-5)
    assert (found["confidence"] > 1 / 3).all()
    loaded = load_features(plan.features)
    as_long_as_the_window = replace(loaded, n_frames=np.full(len(loaded.table), CONFIG.n_frames))
    np.testing.assert_array_equal(as_long_as_the_window.crops(3, 5), loaded.features[3:4])
    np.testing.assert_array_equal(loaded.crops(3, 1), loaded.features[3:4])


def test_a_worker_goes_on_from_the_epoch_that_the_first_one_goes_on_from(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group that was killed may save one more epoch until the first of its successors has the lock."""
    train_here(plan, on_epoch=interrupt_after(1))
    older = plan.checkpoint.read_bytes()
    train_here(plan, on_epoch=interrupt_after(2))
    newer = plan.checkpoint.read_bytes()
    plan.checkpoint.write_bytes(older)

    class Second(runs.Workers):
        def wait_for_all(self) -> None:
            plan.checkpoint.write_bytes(newer)

    monkeypatch.setattr(runs.Workers, "current", classmethod(lambda _: Second(rank=1)))
    epochs: list[int] = []
    monkeypatch.setattr(runs, "fit", lambda *_, state, **__: epochs.append(len(state["history"])))
    train_here(plan)
    assert epochs == [2]


def test_several_folders_are_read_as_one(features: Path, tmp_path: Path) -> None:
    other = write_features(tmp_path / "other", n=9)
    loaded, first, second = (load_features(folders) for folders in ((features, other), features, other))
    n, last = len(first.features), len(loaded.features) - 1
    assert len(loaded.table) == len(loaded.features) == n + 9
    assert loaded.table["row_id"].is_unique
    np.testing.assert_array_equal(loaded.features[last], second.features[8])
    np.testing.assert_array_equal(loaded.features[1:3], first.features[1:3])
    expected = np.stack([second.mel_power[8], first.mel_power[0], second.mel_power[0], first.mel_power[3]])
    np.testing.assert_array_equal(loaded.mel_power[np.array([last, 0, n, 3])], expected)
    np.testing.assert_array_equal(loaded.crops(last, 3), second.crops(8, 3))
    copies = loaded.table[loaded.table["parent_id"] != ""]
    parents = loaded.table.set_index("row_id")["speech"]
    assert (parents[copies["parent_id"]].to_numpy() == copies["speech"].to_numpy()).all()
    with pytest.raises(SerError, match="given twice"):
        load_features((features, features))


def test_a_plan_is_read_as_it_was_written_also_by_earlier_releases(plan: Plan) -> None:
    plan = replace(plan, teachers=(plan.out / "teacher",), distill=0.4, crops=3)
    values = plan.to_dict()
    assert Plan.from_dict(values, plan.out) == plan
    one_folder = values | {"features": values["features"][0]}
    older = {name: value for name, value in one_folder.items() if name not in ("teachers", "distill", "crops", "init")}
    assert Plan.from_dict(older, plan.out) == replace(plan, teachers=(), distill=0.7, crops=1)
