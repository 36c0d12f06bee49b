"""How a report was made: the facts needed to reproduce it."""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pipeline.models.bundle import Bundle

_PACKAGES = ("torch", "onnxruntime", "ray", "numpy", "pandas", "librosa", "soundfile", "soxr")


def provenance(command: str, bundle: Bundle | None = None) -> dict[str, Any]:
    """Model, command, package versions, machine and time, in the order that a report shows them."""
    found: dict[str, Any] = {}
    if bundle is not None:
        found |= {
            "model": bundle.name,
            "model_folder": str(bundle.folder),
            "model_sha256": bundle.weights_sha256,
            "feature_fingerprint": bundle.features.fingerprint(),
            "temperature": bundle.temperature,
        }
    return found | {
        "command": command,
        "versions": {"python": platform.python_version(), **_versions()},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "made": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
