"""How a report was made: the facts needed to reproduce it."""

from __future__ import annotations

import os
import platform
import time
from contextlib import suppress
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
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return found | {
        "command": command,
        "versions": versions,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "made": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }
