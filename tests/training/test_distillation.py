"""Learning from trained models: the loss against its formula, who may teach, and that a student does learn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from bundles import untrained
from torch import nn
from torch.nn import functional
from toy_data import CONFIG, LABELS, toy_data, toy_model, write_features

from jobs.train import main
from pipeline.features.features import FeatureConfig
from pipeline.models.bundle import load_bundle
from pipeline.storage.errors import SerError
from pipeline.training.config import FitConfig
from pipeline.training.loop import fit
from pipeline.training.losses import Teachers, load_teachers, refuse_leaks, without_batch_norms
from pipeline.training.plan import Plan, check_start

pytestmark = pytest.mark.usefixtures("undrawn")
FAST = ["--num_workers", "0", "--epochs", "1", "--batch_size", "16", "--inner_val", "0", "--threads", "1"]
FAST += ["--width", "0.125"]
TRAINING = pd.DataFrame({"id": ["a", "b"], "content_hash": ["1", "2"], "speaker": "", "split": ["train", "test"]})


def a_bundle(folder: Path, training: pd.DataFrame | None = TRAINING) -> Path:
    return untrained(folder, labels=LABELS, features=CONFIG, seed=3, name="teacher", training=training).folder


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_the_loss_is_cross_entropy_against_the_mixture_of_labels_and_mean_answers(share: float) -> None:
    torch.manual_seed(0)
    models = [toy_model().eval(), toy_model().eval()]
    features, logits = torch.randn(5, *CONFIG.input_shape), torch.randn(5, 3)
    labels = functional.one_hot(torch.tensor([0, 1, 2, 1, 0]), 3).float()
    with torch.inference_mode():
        mean = (models[0](features).softmax(1) + models[1](features).softmax(1)) / 2
    mixed = functional.cross_entropy(logits, (1 - share) * labels + share * mean.clone())
    ours = Teachers(models, share).loss(features, logits, functional.cross_entropy(logits, labels))
    assert float(ours) == pytest.approx(float(mixed), rel=1e-6)


def test_a_student_learns_from_its_teacher_what_its_labels_do_not_tell() -> None:
    data, config = toy_data(48, 0), FitConfig(epochs=15, batch_size=8, lr=1e-2, threads=1)
    torch.manual_seed(0)
    teacher, student = toy_model(), toy_model()
    teacher.load_state_dict(fit(teacher, data, config).weights)
    teacher.eval().requires_grad_(False)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    wrong = toy_data(48, 0, classes=(data.classes + 1) % 3)
    student.load_state_dict(fit(student, wrong, config, teachers=Teachers([teacher], 1.0)).weights)
    with torch.inference_mode():
        answers = student.eval()(torch.from_numpy(data.features)).argmax(dim=1).numpy()
    assert np.array_equal(answers, data.classes)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_who_may_teach(tmp_path: Path) -> None:
    teacher = a_bundle(tmp_path / "teacher")
    found = load_teachers([teacher, teacher], 0.5, LABELS, CONFIG)
    assert found is not None
    assert len(found.models) == 2
    assert not any(model.training or next(model.parameters()).requires_grad for model in found.models)
    assert load_teachers([], 0.5, LABELS, CONFIG) is None
    speech = replace(CONFIG, window="speech")
    for path, labels, features, word in (
        (tmp_path / "nobody", LABELS, CONFIG, "no model bundle"),
        (teacher, ("calm", "sad", "happy"), CONFIG, "classes"),
        (teacher, LABELS, FeatureConfig(), "n_mels 16, not 64"),
        (teacher, LABELS, speech, "window middle, not speech"),
    ):
        with pytest.raises(SerError, match=word):
            load_teachers([path], 0.5, labels, features)
    for share in (0.0, 1.01, float("nan")):
        with pytest.raises(SerError, match="share"):
            Teachers([nn.Identity()], share)
    (teacher / "metrics.json").write_text('{"training": {}}')
    assert check_start(teacher, "inception", CONFIG)
    with pytest.raises(SerError, match="window middle, not speech"):
        check_start(teacher, "inception", speech)


def test_batch_norms_folded_into_convolutions_answer_the_same(tmp_path: Path) -> None:
    path = a_bundle(tmp_path / "teacher")
    model, plain = load_bundle(path).build_model(), load_bundle(path).build_model()
    features = torch.randn(4, *CONFIG.input_shape)
    taught = load_teachers([path], 0.7, LABELS, CONFIG)
    assert taught is not None
    torch.testing.assert_close(taught.answers(features), plain(features).softmax(dim=1))
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_mean, -1, 1)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    with torch.inference_mode():
        expected, found = model(features), without_batch_norms(model)(features)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize("part", ["inner_val", "test"])
def test_a_teacher_that_knows_what_the_student_is_measured_by_is_refused(part: str, tmp_path: Path) -> None:
    teacher = a_bundle(tmp_path / "teacher")
    splits = {name: pd.DataFrame({"content_hash": ["2", "3"]}) for name in ("inner_val", "test")}
    splits["train"] = pd.DataFrame({"content_hash": ["1", "2"]})
    refuse_leaks([teacher], splits)  # its own test part does not count
    splits[part] = pd.DataFrame({"content_hash": ["1", "3"]})
    with pytest.raises(SerError, match=f"on 1 recordings of the {part} part"):
        refuse_leaks([teacher], splits)


def test_the_part_that_chose_a_teachers_epoch_may_choose_its_students(tmp_path: Path) -> None:
    parts = {name: pd.DataFrame({"content_hash": [name]}) for name in ("train", "inner_val", "test")}
    training = pd.DataFrame({"id": list(parts), "content_hash": list(parts), "speaker": "", "split": list(parts)})
    teacher = a_bundle(tmp_path / "teacher", training=training)
    refuse_leaks([teacher], parts)
    with pytest.raises(SerError, match="1 recordings of the test part"):
        refuse_leaks([teacher], parts | {"test": parts["inner_val"], "inner_val": parts["test"]})


def test_a_plan_keeps_its_teachers_and_is_not_continued_with_others(tmp_path: Path) -> None:
    plan = Plan(tmp_path / "run", (tmp_path,), LABELS, "inception", {}, FitConfig(), (tmp_path / "teacher",), 0.4)
    again = Plan.from_dict(plan.to_dict(), plan.out)
    assert (again.teachers, again.distill) == ((tmp_path / "teacher",), 0.4)
    plan.check_continues(again)
    without = {k: v for k, v in plan.to_dict().items() if k not in ("teachers", "distill")}  # of an earlier version
    with pytest.raises(SerError, match="started with teachers"):
        plan.check_continues(Plan.from_dict(without, plan.out))


def test_the_command_tells_whom_the_model_learnt_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    features, teacher = write_features(tmp_path / "features", n=45), a_bundle(tmp_path / "teacher")
    words = ["--features", str(features), *FAST, "--out", str(tmp_path / "run"), "--teachers", str(teacher)]
    for share in ("2", "0", "nan", "much"):
        assert main([*words, "--distill", share]) == 2
        assert "--distill" in capsys.readouterr().err
    assert main([*words, "--distill", "0.5"]) == 0
    training = load_bundle(tmp_path / "run").metrics["training"]
    sha256 = load_bundle(teacher).weights_sha256
    assert (training["distill"], [about["model_sha256"] for about in training["teachers"]]) == (0.5, [sha256])
    assert sha256[:12] in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")


def test_a_teacher_is_known_by_name_where_the_contents_are_not(tmp_path: Path) -> None:
    teacher, silent = a_bundle(tmp_path / "teacher"), a_bundle(tmp_path / "silent", training=None)
    gone = pd.DataFrame({"content_hash": ["", ""], "speech": ["/gone/a.wav", "/gone/b.wav"]})
    splits = {"train": gone, "inner_val": gone.iloc[:0], "test": gone.iloc[1:]}
    refuse_leaks([teacher], splits)  # b is of its own test part
    with pytest.raises(SerError, match="on 1 recordings of the test part"):
        refuse_leaks([teacher], splits | {"test": gone})
    with pytest.raises(SerError, match="no list of its training recordings"):
        refuse_leaks([silent], splits)


def test_teachers_answer_among_the_classes_that_a_corpus_has() -> None:
    """Both distributions renormalised over them: the cross-entropy of a problem that has only those classes."""
    generator = torch.Generator().manual_seed(3)
    taught, logits = (torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    allowed = torch.tensor([[True, False, True], [True, True, True], [False, True, True], [True, True, False]])

    class Fixed(nn.Module):
        def forward(self, _: torch.Tensor) -> torch.Tensor:
            return taught

    found = Teachers([Fixed()], share=0.6).loss(torch.zeros(4, 1), logits, torch.tensor(2.0), allowed)
    expected = 0.0
    for row, own, classes in zip(taught.numpy(), logits.numpy(), allowed.numpy(), strict=True):
        q, p = (np.exp(values[classes]) / np.exp(values[classes]).sum() for values in (row, own))
        expected -= float(q @ np.log(p)) / 4
    assert float(found) == pytest.approx(0.4 * 2.0 + 0.6 * expected, rel=1e-6)
