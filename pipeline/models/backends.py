"""Running a bundle's network: ONNX Runtime on the CPU, PyTorch on the CPU (the reference) or a GPU.

Both map float32 features ``(n, *input_shape)`` to float32 logits ``(n, classes)`` and agree within 1e-5. Threads are
set explicitly: ONNX Runtime a session, PyTorch for the whole process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.models.bundle import Bundle
from pipeline.models.onnx_export import ensure_onnx, open_session
from pipeline.storage.cpus import usable_cpus
from pipeline.storage.errors import SerError

if TYPE_CHECKING:
    import onnxruntime as ort

BACKENDS = ("auto", "onnx", "torch")
Array = NDArray[np.float32]


class Backend(Protocol):
    """A network that is ready to run."""

    name: str

    def logits(self, features: Array) -> Array:
        """float32 ``(n, *input_shape)`` -> float32 ``(n, classes)``."""
        ...


def open_backend(bundle: Bundle, name: str, device: str, threads: int | None) -> Backend:
    """The back end called ``name``; ``auto`` is ONNX Runtime on the CPU, and PyTorch where that cannot be had.

    Args:
        device: ``cpu``, or a PyTorch device such as ``cuda`` or ``cuda:1``.
        threads: math threads; all CPUs that this process may use when None.

    Raises:
        SerError: an unknown name, a device that is not there, no threads, or ``onnx`` where it cannot be had.
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
    """ONNX Runtime on the CPU."""

    name = "onnx"

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session

    def logits(self, features: Array) -> Array:
        """Float32 ``(n, classes)`` of float32 ``(n, *input_shape)``."""
        result: Any = self._session.run(["logits"], {"features": features})[0]
        return np.asarray(result, dtype=np.float32)


class TorchBackend:
    """Eager PyTorch, channels-last for pictures."""

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

    def logits(self, features: Array) -> Array:
        """Float32 ``(n, classes)`` of float32 ``(n, *input_shape)``."""
        import torch

        with torch.inference_mode():
            batch = torch.from_numpy(features).to(self._device).contiguous(memory_format=self._format)
            result: Array = self._model(batch).float().cpu().numpy()
        return result
