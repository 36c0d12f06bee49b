"""Losses and teachers against their formulas in float64 and torch's own cross-entropy; who may teach."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
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
from pipeline.training.losses import ClassificationLoss, Teachers, load_teachers, refuse_leaks, without_batch_norms
from pipeline.training.plan import check_start

pytestmark = pytest.mark.usefixtures("undrawn")
FAST = ["--num_workers", "0", "--epochs", "1", "--batch_size", "16", "--inner_val", "0", "--threads", "1"]
FAST += ["--width", "0.125"]
TRAINING = pd.DataFrame({"id": ["a", "b"], "content_hash": ["1", "2"], "speaker": "", "split": ["train", "test"]})
WEIGHTS = (0.5, 1.0, 2.5, 4.0)


def batch(n: int = 7, n_classes: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, classes, and mixtures of classes."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, n_classes, generator=generator, dtype=torch.float64)
    classes = torch.randint(n_classes, (n,), generator=generator)
    mixtures = torch.rand(n, n_classes, generator=generator, dtype=torch.float64)
    return logits, classes, mixtures / mixtures.sum(dim=1, keepdim=True)


def by_hand(logits: np.ndarray, targets: np.ndarray, weights: np.ndarray, smoothing: float, gamma: float) -> float:
    """The module's formula, one term at a time."""
    total, norm = 0.0, 0.0
    for row, target in zip(logits, targets, strict=True):
        p = np.exp(row) / np.exp(row).sum()
        for c in range(len(p)):
            smooth = (1 - smoothing) * target[c] + smoothing / len(p)
            total += weights[c] * smooth * (1 - p[c]) ** gamma * -np.log(p[c])
            norm += weights[c] * target[c]
    return total / norm


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_torchs(smoothing: float) -> None:
    logits, classes, mixtures = batch()
    for weights, targets in ((None, classes), (WEIGHTS, classes), (None, mixtures)):
        ours = ClassificationLoss(4, class_weights=weights, label_smoothing=smoothing)(logits, targets)
        tensor = None if weights is None else torch.tensor(weights, dtype=torch.float64)
        expected = functional.cross_entropy(logits, targets, tensor, label_smoothing=smoothing)
        assert ours.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(("weights", "smoothing", "gamma"), list(product([None, WEIGHTS], [0.0, 0.2], [0.5, 2.0])))
def test_focal_loss_is_the_formula(weights: tuple[float, ...] | None, smoothing: float, gamma: float) -> None:
    logits, classes, mixtures = batch()
    loss = ClassificationLoss(4, class_weights=weights, label_smoothing=smoothing, focal_gamma=gamma)
    for targets in (functional.one_hot(classes, 4).double(), mixtures):
        expected = by_hand(logits.numpy(), targets.numpy(), np.array(weights or [1.0] * 4), smoothing, gamma)
        assert loss(logits, targets).item() == pytest.approx(expected, rel=1e-6)
    assert torch.equal(loss(logits, classes), loss(logits, functional.one_hot(classes, 4).double()))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_certain_answers_keep_finite_gradients(gamma: float) -> None:
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], requires_grad=True)
    loss = ClassificationLoss(2, label_smoothing=0.1, focal_gamma=gamma)(logits, torch.tensor([0, 0]))
    loss.backward()
    assert torch.isfinite(loss)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"class_weights": (1.0, 2.0)}, "2 class weights"),
        ({"class_weights": (1.0, 0.0, 1.0)}, "class weight 0"),
        ({"label_smoothing": 1.0}, "smoothing"),
        ({"label_smoothing": -0.1}, "smoothing"),
        ({"focal_gamma": -1.0}, "gamma"),
    ],
)
def test_wrong_settings_are_refused(options: dict[str, object], word: str) -> None:
    with pytest.raises(SerError, match=word):
        ClassificationLoss(3, **options)


ALLOWED = torch.tensor([[True, True, True, True], [True, False, True, True], [False, True, True, False]])


@pytest.mark.parametrize(("smoothing", "gamma"), list(product([0.0, 0.2], [0.0, 2.0])))
def test_a_class_that_a_corpus_lacks_is_out_of_the_softmax(smoothing: float, gamma: float) -> None:
    """Each clip's loss is what the formula gives for a problem that has only the allowed classes."""
    logits, _, mixtures = batch(3)
    targets = mixtures * ALLOWED
    targets /= targets.sum(dim=1, keepdim=True)
    loss = ClassificationLoss(4, class_weights=WEIGHTS, label_smoothing=smoothing, focal_gamma=gamma)
    total, norm = 0.0, 0.0
    for row, target, allowed in zip(logits.numpy(), targets.numpy(), ALLOWED.numpy(), strict=True):
        weights = np.array(WEIGHTS)[allowed]
        share = float(weights @ target[allowed])
        total += share * by_hand(row[None, allowed], target[None, allowed], weights, smoothing, gamma)
        norm += share
    assert loss(logits, targets, ALLOWED).item() == pytest.approx(total / norm, rel=1e-6)


def test_a_masked_class_gets_no_gradient_and_all_classes_allowed_is_no_mask() -> None:
    logits, classes, _ = batch(3)
    loss = ClassificationLoss(4, label_smoothing=0.1, focal_gamma=1.0)
    targets = torch.tensor([0, 2, 1])
    logits.requires_grad_()
    loss(logits, targets, ALLOWED).backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert not logits.grad[~ALLOWED].any()
    assert (logits.grad[ALLOWED] != 0).all()
    everything = torch.ones_like(ALLOWED)
    torch.testing.assert_close(loss(logits, classes, everything), loss(logits, classes))


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
