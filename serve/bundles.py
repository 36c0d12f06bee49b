"""The model bundles that the service shall serve, checked before anything starts."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.models.backends import ensure_onnx
from pipeline.models.bundle import Bundle, load_bundle
from pipeline.storage.errors import SerError


def open_bundles(paths: Sequence[str]) -> list[Bundle]:
    """The bundles at ``paths`` (none: the shipped one), each able to run, in order.

    Raises:
        SerError: a bundle that is missing or cannot be used, or two of one name.
    """
    bundles = [load_bundle(path) for path in paths or (None,)]
    names = [bundle.name for bundle in bundles]
    if len(set(names)) < len(names):
        raise SerError(f"bundles need names of their own, got {', '.join(names)}; leave one out")
    for bundle in bundles:
        if not ensure_onnx(bundle):
            bundle.build_model()  # PyTorch will run it: its weights must fit
    return bundles
