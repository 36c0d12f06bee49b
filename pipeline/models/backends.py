"""Runs a bundle's network: with ONNX Runtime on the CPU, or with PyTorch on the CPU (the reference) or a GPU.

Both agree within 1e-5. The number of threads is set per session in ONNX Runtime, for the whole process in PyTorch.

Also exports a bundle's network: ``model.onnx`` maps ``features`` (batch, *input_shape) to ``logits`` (batch, classes)
and ``embedding`` (batch, d), the penultimate features, float32, for any batch size. Its metadata hold the sha256 of the
weights that it was made from; if that differs, the file is made again. PyTorch's tracing exporter takes 1 s, the newer
one 20 s, and the logits are the same within 1e-6.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.models.bundle import Bundle
from pipeline.storage.errors import SerError
from pipeline.storage.files import usable_cpus
from pipeline.storage.journal import atomic_path

if TYPE_CHECKING:
    import onnxruntime as ort

ONNX_NAME = "model.onnx"
_OPSET = 17
_SHA_KEY = "weights_sha256"
_OUTPUTS = ("logits", "embedding")


class ExportError(SerError):
    """A network that cannot be written as ONNX."""


def cache_path(bundle: Bundle) -> Path:
    """Path of the ONNX file in the user's cache folder, used if the bundle's folder is not writable."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base, "ser", "onnx", f"{bundle.weights_sha256}.onnx")


def open_session(bundle: Bundle, threads: int) -> ort.InferenceSession | None:
    """ONNX Runtime session of the bundle's ``model.onnx`` or of the cached one; None if neither exists and fits."""
    for path in (bundle.folder / ONNX_NAME, cache_path(bundle)):
        session = _open(path, threads) if path.is_file() else None
        if session is None:
            continue
        ours = session.get_modelmeta().custom_metadata_map.get(_SHA_KEY) == bundle.weights_sha256
        if ours and [output.name for output in session.get_outputs()] == list(_OUTPUTS):  # else of an earlier version
            return session
    return None


def export(bundle: Bundle, path: Path | None = None) -> Path:
    """Write the network as ONNX to ``path``, by default into the bundle or else the user's cache; returns the path.

    Raises:
        ExportError: torch or onnx is missing, the network cannot be traced, or no folder is writable.
    """
    content = _onnx_bytes(bundle)
    places = [path] if path is not None else [bundle.folder / ONNX_NAME, cache_path(bundle)]
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(place) as beside:  # several processes may export at the same time
                beside.write_bytes(content)
            return place
        except OSError as error:
            reason = error
    raise ExportError(f"cannot write {places[-1]}: {reason}; free some space, or make the folder writable")


def ensure_onnx(bundle: Bundle) -> bool:
    """Export the network if ``open_session`` finds none, and say so on stderr; False if it cannot be exported."""
    if open_session(bundle, threads=1) is not None:
        return True
    try:
        path = export(bundle)
    except ExportError as error:
        print(f"{bundle.name}: no ONNX model ({error}); using PyTorch", file=sys.stderr)
        return False
    print(f"{bundle.name}: exported to {path}", file=sys.stderr)
    return True


def _open(path: Path, threads: int) -> ort.InferenceSession | None:
    """Session of one file; None if the file is damaged."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception:  # ONNX Runtime's exceptions have no public base class; a damaged file is exported again
        return None


def _onnx_bytes(bundle: Bundle) -> bytes:
    try:
        import onnx
        import torch
    except ImportError as error:
        raise ExportError(f"the package {error.name} is missing; install it with pip") from error

    class Outputs(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = bundle.build_model()

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.model.outputs(x)

    example = torch.zeros(1, *bundle.features.input_shape)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the newer exporter, and about LSTMs with other batch sizes than 1
        path = os.path.join(folder, ONNX_NAME)
        try:
            torch.onnx.export(
                Outputs(),
                (example,),
                path,
                input_names=["features"],
                output_names=list(_OUTPUTS),
                dynamic_axes={name: {0: "batch"} for name in ("features", *_OUTPUTS)},
                opset_version=_OPSET,
                dynamo=False,
            )
            proto = onnx.load(path)
        except Exception as error:  # the exporter raises classes of several modules, and RuntimeError
            raise ExportError(f"exporting failed: {str(error).splitlines()[0]}") from error
    onnx.helper.set_model_props(proto, {_SHA_KEY: bundle.weights_sha256})
    content: bytes = proto.SerializeToString()
    return content


BACKENDS = ("auto", "onnx", "torch")
Array = NDArray[np.float32]


class Backend(Protocol):
    """A loaded network."""

    name: str

    def outputs(self, features: Array) -> tuple[Array, Array]:
        """float32 ``(n, *input_shape)`` -> logits ``(n, classes)``, penultimate features ``(n, d)``, float32."""
        ...


def open_backend(bundle: Bundle, name: str, device: str, threads: int | None) -> Backend:
    """Open the back end ``name``; ``auto`` is ONNX Runtime on the CPU, and PyTorch otherwise.

    Args:
        device: ``cpu``, or a PyTorch device such as ``cuda`` or ``cuda:1``.
        threads: threads of the network; None: all CPUs that this process may use.

    Raises:
        SerError: an unknown name, an unavailable device, fewer than 1 thread, or ``onnx`` cannot run this network.
    """
    if name not in BACKENDS:
        raise SerError(f"unknown back end {name!r}; choose one of {', '.join(BACKENDS)}")
    if name == "onnx" and device != "cpu":
        raise SerError(f"the onnx back end runs on the CPU, got device {device!r}; use --backend torch")
    if threads is not None and threads < 1:
        raise SerError(f"threads must be 1 or more, got {threads}; leave it out for all CPUs")
    threads = usable_cpus() if threads is None else threads
    if name == "torch" or device != "cpu":
        return TorchBackend(bundle, device, threads)
    try:
        session = open_session(bundle, threads)
        if session is None and ensure_onnx(bundle):
            session = open_session(bundle, threads)
    except ImportError as error:
        if name == "onnx":
            raise SerError("the package onnxruntime is missing; install it, or use --backend torch") from error
        session = None
    if session is not None:
        return OnnxBackend(session)
    if name == "onnx":
        raise SerError(f"{bundle.name} cannot be run by ONNX Runtime; use --backend torch")
    return TorchBackend(bundle, device, threads)


class OnnxBackend:
    """ONNX Runtime on the CPU: features ``(n, *input_shape)``, see ``Backend``."""

    name = "onnx"

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session

    def outputs(self, features: Array) -> tuple[Array, Array]:
        logits, embedding = self._session.run(list(_OUTPUTS), {"features": features})
        return np.asarray(logits, dtype=np.float32), np.asarray(embedding, dtype=np.float32)


class TorchBackend:
    """Eager PyTorch, channels-last for pictures: features ``(n, *input_shape)``, see ``Backend``."""

    name = "torch"

    def __init__(self, bundle: Bundle, device: str, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        try:
            self._device = torch.device(device)
            model = bundle.build_model().to(self._device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            remedy = "use --device cpu (jobs.score: leave --num_gpus out)"
            raise SerError(f"cannot use device {device!r}: {reason}; {remedy}") from error
        pictures = len(bundle.features.input_shape) == 3
        self._format = torch.channels_last if pictures else torch.contiguous_format
        self._model = model.to(memory_format=self._format)  # type: ignore[call-overload]

    def outputs(self, features: Array) -> tuple[Array, Array]:
        import torch

        with torch.inference_mode():
            batch = torch.from_numpy(features).to(self._device).contiguous(memory_format=self._format)
            logits, embedding = (found.float().cpu().numpy() for found in self._model.outputs(batch))
        return logits, embedding
