"""ONNX against PyTorch, and every way that ``model.onnx`` can be missing, old, damaged or unwritable."""

from __future__ import annotations

import shutil
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from bundles import untrained

from pipeline.features.features import FeatureConfig
from pipeline.models import backends
from pipeline.models.backends import (
    ExportError,
    OnnxBackend,
    TorchBackend,
    cache_path,
    ensure_onnx,
    export,
    open_backend,
    open_session,
)
from pipeline.models.bundle import Bundle, load_bundle
from pipeline.storage.errors import SerError


@pytest.fixture(scope="module")
def exported(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A copy of the tiny bundle with its ``model.onnx``, for the whole module."""
    folder = tmp_path_factory.mktemp("exported") / "tiny"
    shutil.copytree(tiny_bundle.folder, folder, ignore=shutil.ignore_patterns("*.onnx"))
    bundle = load_bundle(folder)
    export(bundle)
    return bundle


@pytest.fixture
def bundle(exported: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """A copy of its own with ``model.onnx``, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(exported.folder, tmp_path / "bundle")
    return load_bundle(tmp_path / "bundle")


def softmax(logits: np.ndarray) -> np.ndarray:
    return torch.softmax(torch.from_numpy(logits).double(), dim=1).numpy()


@pytest.mark.parametrize("name", ["tiny", "narrow", "lstm"])
def test_onnx_equals_torch(name: str, exported: Bundle, tmp_path: Path) -> None:
    if name == "tiny":
        bundle = exported
    elif name == "narrow":
        bundle = untrained(tmp_path / name, options={"width": 0.25})
    else:
        bundle = untrained(tmp_path / name, "cnn_bilstm", {}, features=FeatureConfig(kind="frame_features"))
    by_onnx, by_torch = (open_backend(bundle, backend, "cpu", threads=1) for backend in ("onnx", "torch"))
    for rows in (1, 7):
        features = np.random.default_rng(rows).standard_normal((rows, *bundle.features.input_shape)).astype(np.float32)
        with torch.inference_mode():
            plain = softmax(bundle.build_model()(torch.from_numpy(features)).numpy())
        found, expected = by_onnx.outputs(features), by_torch.outputs(features)
        np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(softmax(found[0]), plain, rtol=0, atol=1e-4)
        np.testing.assert_allclose(softmax(expected[0]), plain, rtol=0, atol=1e-5)
        assert np.ptp(plain[0]) > 1e-3, "all classes alike: this test cannot fail"


def test_the_file_names_its_weights_and_folds_batch_norm(exported: Bundle) -> None:
    proto = onnx.load(exported.folder / "model.onnx")
    onnx.checker.check_model(proto)
    assert {entry.key: entry.value for entry in proto.metadata_props} == {"weights_sha256": exported.weights_sha256}
    assert "BatchNormalization" not in {node.op_type for node in proto.graph.node}


def test_auto_takes_onnx_and_exports_it_once(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    path = bundle.folder / "model.onnx"
    path.unlink()
    for said in (f"tiny: exported to {path}\n", ""):
        assert isinstance(open_backend(bundle, "auto", "cpu", 1), OnnxBackend)
        assert capsys.readouterr() == ("", said)
    assert not list(bundle.folder.glob("*.tmp"))


@pytest.mark.parametrize("damage", ["empty", "no network", "half", "of other weights"])
def test_a_damaged_file_or_one_of_other_weights_is_made_again(damage: str, bundle: Bundle) -> None:
    path = bundle.folder / "model.onnx"
    if damage == "of other weights":
        proto = onnx.load(path)
        proto.metadata_props[0].value = "0" * 64
        onnx.save(proto, path)
    else:
        whole = path.read_bytes()
        path.write_bytes({"empty": b"", "no network": b"not a network", "half": whole[: len(whole) // 2]}[damage])
    assert open_session(bundle, 1) is None
    assert ensure_onnx(bundle)
    assert open_session(bundle, 1) is not None
    assert onnx.load(path).metadata_props[0].value == bundle.weights_sha256


def test_a_bundle_that_cannot_be_written_is_exported_into_the_cache(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    make = backends.atomic_path

    def refuse(path: Path) -> AbstractContextManager[Path]:  # root is not bound by permissions
        if path.parent == bundle.folder:
            raise PermissionError(13, "Permission denied")
        return make(path)

    monkeypatch.setattr(backends, "atomic_path", refuse)
    (bundle.folder / "model.onnx").unlink()
    for said in (f"tiny: exported to {cache_path(bundle)}\n", ""):  # the cache is found again
        assert isinstance(open_backend(bundle, "auto", "cpu", 1), OnnxBackend)
        assert capsys.readouterr().err == said
    assert cache_path(bundle).is_file()
    assert cache_path(bundle).is_relative_to(tmp_path / "cache")
    assert not (bundle.folder / "model.onnx").exists()


def test_without_any_place_to_write_pytorch_serves(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (bundle.folder / "model.onnx").unlink()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(backends, "atomic_path", full)
    with pytest.raises(ExportError, match="No space left"):
        export(bundle)
    assert isinstance(open_backend(bundle, "auto", "cpu", 1), TorchBackend)
    said = capsys.readouterr().err
    assert "No space left" in said
    assert said.endswith("using PyTorch\n")
    assert said.count("\n") == 1
    with pytest.raises(SerError, match="--backend torch"):
        open_backend(bundle, "onnx", "cpu", 1)


def test_without_the_packages_pytorch_serves(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert isinstance(open_backend(bundle, "auto", "cpu", 1), TorchBackend)
    with pytest.raises(SerError, match="onnxruntime is missing"):
        open_backend(bundle, "onnx", "cpu", 1)
    (bundle.folder / "model.onnx").unlink()
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert not ensure_onnx(bundle)
    assert "onnx is missing" in capsys.readouterr().err


def test_an_export_goes_where_it_is_told(exported: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "new" / "net.onnx"
    assert export(exported, path) == path
    assert path.stat().st_mode & 0o777 == 0o644
