"""Two models that learn from each other: the loss by hand, what they share and what not, folds cut off and gone on."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional
from toy_data import write_features

from benchmarks.mutual import MutualLoss, Twins, main, train_twins
from pipeline.corpora import label_set
from pipeline.fit import Run
from pipeline.fit_config import FitConfig
from pipeline.folds import folds_of
from pipeline.losses import ClassificationLoss
from pipeline.plan import Plan
from pipeline.runs import begin, training_data


def small_model(*_: object) -> nn.Module:
    """Batch norm, and no dropout, whose draws two models would share."""
    layers = nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 7 * 15, 3)
    return nn.Sequential(*layers)


def test_the_loss_is_the_formula_and_the_other_is_not_moved_by_it() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 2, 3, requires_grad=True)
    targets = torch.tensor([0, 2, 1, 1])
    loss = MutualLoss(ClassificationLoss(3), 0.4)(logits, targets)
    a, b = logits[:, 0], logits[:, 1]
    by_hand = 0.0
    for own, other in ((a, b), (b, a)):
        to_other = functional.cross_entropy(own, other.detach().softmax(1))
        by_hand = by_hand + 0.6 * functional.cross_entropy(own, targets) + 0.4 * to_other
    torch.testing.assert_close(loss, by_hand)
    loss.backward()
    p = logits.detach().softmax(2)
    expected = (0.6 * (p[:, 0] - functional.one_hot(targets, 3)) + 0.4 * (p[:, 0] - p[:, 1])) / 4
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[:, 0], expected)  # d/da of b's loss is zero


def test_with_no_share_the_first_is_the_plain_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.mutual.build_model", small_model)
    features = write_features(tmp_path / "features", n=24)
    table = pd.DataFrame(
        {"speech": [f"/audio/{i:03d}.wav" for i in range(24)], "row_id": [str(i) for i in range(24)]}
    ).assign(label=[("calm", "happy", "sad")[i % 3] for i in range(24)], speaker=[str(i % 4) for i in range(24)])
    plan = Plan(
        out=tmp_path / "run",
        features=(features,),
        labels=label_set(table).names,
        model_name="inception",
        model_options={},
        fit=FitConfig(epochs=2, batch_size=8, lr=1e-3, ema=0.5, augment=("mixup",), patience=0, threads=1),
        distill=0.0,
    )
    begin(plan, folds_of(table, "speaker_kfold", folds=2, inner_val=0)[0].splits)
    twins = train_twins(plan)
    data = training_data(plan)
    torch.manual_seed(plan.fit.seed)
    alone = Run(small_model(), data, plan.fit)
    while not alone.finished:
        alone.epoch()
    for name, value in alone.chosen_weights().items():
        torch.testing.assert_close(twins[f"first.{name}"], value)
    assert not torch.equal(twins["first.0.weight"], twins["second.0.weight"])


def test_after_training_only_the_first_answers() -> None:
    twins = Twins(nn.Linear(2, 3), nn.Linear(2, 3))
    x = torch.randn(5, 2)
    assert twins(x).shape == (5, 2, 3)
    torch.testing.assert_close(twins.eval()(x), twins.first(x))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_folds_side_by_side_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    features, folds, out = write_features(tmp_path / "features", n=24), tmp_path / "folds.csv", tmp_path / "out"
    folds.write_text("speaker,fold\nActor_01,1\nActor_02,1\nActor_03,2\nActor_04,2\n")
    words = ["--features", str(features), "--folds_csv", str(folds), "--out", str(out), "--epochs", "1"]
    words += ["--batch_size", "8", "--at_once", "1"]
    monkeypatch.setattr("sys.argv", ["mutual", *words])
    main()
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines() if line.split()[1:3] == ["2", "24"]] == [
        "first",
        "second",
        "both",
    ]
    found = json.loads((out / "protocols.json").read_text())
    assert all(row["heard_before"]["speakers"] == 0 for row in found["protocols"])
    tables = {name: pd.read_parquet(out / f"fold-1/{name}.parquet") for name in ("first", "second")}
    assert (tables["first"]["row_id"] == tables["second"]["row_id"]).all()
    assert not tables["first"]["p_sad"].equals(tables["second"]["p_sad"])

    (out / "fold-2" / "second.parquet").unlink()  # as if cut off in the last fold
    kept = (out / "fold-1" / "first.parquet").stat().st_mtime_ns
    main()
    assert json.loads((out / "protocols.json").read_text()) == found
    assert (out / "fold-1" / "first.parquet").stat().st_mtime_ns == kept
