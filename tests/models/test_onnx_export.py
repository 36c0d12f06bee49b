"""ONNX against PyTorch, and every way that ``model.onnx`` can be missing, old, damaged or unwritable."""

from __future__ import annotations

import dataclasses
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


@pytest.fixture(scope="module")
def narrow_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return untrained(tmp_path_factory.mktemp("bundles") / "narrow", options={"width": 0.25})


@pytest.fixture(scope="module")
def lstm_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    config = FeatureConfig(kind="frame_features")
    return untrained(tmp_path_factory.mktemp("bundles") / "lstm", "cnn_bilstm", {}, features=config)


def softmax(logits: np.ndarray) -> np.ndarray:
    return torch.softmax(torch.from_numpy(logits).double(), dim=1).numpy()


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("name", ["exported", "narrow_bundle", "lstm_bundle"])
def test_onnx_equals_torch(name: str, rows: int, request: pytest.FixtureRequest) -> None:
    bundle: Bundle = request.getfixturevalue(name)
    features = np.random.default_rng(rows).standard_normal((rows, *bundle.features.input_shape)).astype(np.float32)
    onnx_backend = open_backend(bundle, "onnx", "cpu", threads=1)
    torch_backend = open_backend(bundle, "torch", "cpu", threads=1)
    found, expected = onnx_backend.outputs(features), torch_backend.outputs(features)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=1e-3)
    found, expected = softmax(found[0]), softmax(expected[0])
    with torch.inference_mode():
        plain = softmax(bundle.build_model()(torch.from_numpy(features)).numpy())
    assert np.abs(found - plain).max() <= 1e-4
    assert np.abs(expected - plain).max() <= 1e-5
    assert np.ptp(plain[0]) > 1e-3, "all classes alike: this test cannot fail"


def test_the_file_names_its_weights_and_folds_batch_norm(exported: Bundle) -> None:
    proto = onnx.load(exported.folder / "model.onnx")
    onnx.checker.check_model(proto)
    assert {entry.key: entry.value for entry in proto.metadata_props} == {"weights_sha256": exported.weights_sha256}
    assert "BatchNormalization" not in {node.op_type for node in proto.graph.node}


def test_auto_takes_onnx_and_exports_it_once(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    path = bundle.folder / "model.onnx"
    path.unlink()
    assert isinstance(open_backend(bundle, "auto", "cpu", 1), OnnxBackend)
    captured = capsys.readouterr()
    assert captured.err == f"tiny: exported to {path}\n"
    assert captured.out == ""
    assert isinstance(open_backend(bundle, "auto", "cpu", 1), OnnxBackend)
    assert capsys.readouterr().err == ""
    assert [p.name for p in bundle.folder.glob("*.tmp")] == []


def test_a_file_of_other_weights_is_not_believed(bundle: Bundle) -> None:
    path = bundle.folder / "model.onnx"
    proto = onnx.load(path)
    proto.metadata_props[0].value = "0" * 64
    onnx.save(proto, path)
    assert open_session(bundle, 1) is None
    assert ensure_onnx(bundle)
    assert onnx.load(path).metadata_props[0].value == bundle.weights_sha256


@pytest.mark.parametrize("content", [b"", b"not a network", None])
def test_a_damaged_file_is_made_again(content: bytes | None, bundle: Bundle) -> None:
    path = bundle.folder / "model.onnx"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    assert open_session(bundle, 1) is None
    assert ensure_onnx(bundle)
    assert open_session(bundle, 1) is not None


def read_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file can be made in ``folder`` (root is not bound by permissions, so the call is made to fail)."""
    make = backends.atomic_path

    def refuse(path: Path) -> AbstractContextManager[Path]:
        if path.parent == folder:
            raise PermissionError(13, "Permission denied")
        return make(path)

    monkeypatch.setattr(backends, "atomic_path", refuse)


def test_a_bundle_that_cannot_be_written_is_exported_into_the_cache(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (bundle.folder / "model.onnx").unlink()
    read_only(bundle.folder, monkeypatch)
    assert isinstance(open_backend(bundle, "auto", "cpu", 1), OnnxBackend)
    assert cache_path(bundle).is_file()
    assert cache_path(bundle).is_relative_to(tmp_path / "cache")
    assert not (bundle.folder / "model.onnx").exists()
    assert capsys.readouterr().err == f"tiny: exported to {cache_path(bundle)}\n"
    assert isinstance(open_backend(bundle, "onnx", "cpu", 1), OnnxBackend), "the cache is found again"
    assert capsys.readouterr().err == ""


def test_without_any_place_to_write_pytorch_serves(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (bundle.folder / "model.onnx").unlink()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(backends, "atomic_path", full)
    with pytest.raises(ExportError, match="No space left on device"):
        export(bundle)
    assert isinstance(open_backend(bundle, "auto", "cpu", 1), TorchBackend)
    assert "No space left on device" in (said := capsys.readouterr().err)
    assert said.endswith("using PyTorch\n")
    assert said.count("\n") == 1
    with pytest.raises(SerError, match="--backend torch"):
        open_backend(bundle, "onnx", "cpu", 1)


def test_without_the_packages_pytorch_serves(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert isinstance(open_backend(bundle, "auto", "cpu", 1), TorchBackend)
    with pytest.raises(SerError, match="the package onnxruntime is missing"):
        open_backend(bundle, "onnx", "cpu", 1)


def test_without_onnx_nothing_is_exported(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (bundle.folder / "model.onnx").unlink()
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert not ensure_onnx(bundle)
    assert "the package onnx is missing" in capsys.readouterr().err


def test_an_export_goes_where_it_is_told(exported: Bundle, tmp_path: Path) -> None:
    other = dataclasses.replace(exported)
    assert export(other, tmp_path / "new" / "net.onnx") == tmp_path / "new" / "net.onnx"
    assert (tmp_path / "new" / "net.onnx").stat().st_mode & 0o777 == 0o644
