"""The state of a run on disk, `checkpoint.pt`: written whole or not at all, read without running code in it."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import torch

from pipeline.storage.errors import SerError


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write the state; the one before it stays until the new one is whole.

    Raises:
        SerError: the disk is full or cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # process ids repeat on other nodes
    try:
        torch.save(state, temporary)
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError where it finds no room
        temporary.unlink(missing_ok=True)
        raise SerError(
            f"cannot write {path}, is the disk full? Make room, then go on with the same command and --resume"
        ) from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Tensors and plain values only (`weights_only=True`), on the CPU.

    Raises:
        SerError: no readable checkpoint.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, ... for damaged files
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise SerError(f"cannot read the checkpoint {path}: {reason}; start a new run") from error
    if not isinstance(state, dict) or not {"version", "history"} <= state.keys():
        raise SerError(f"{path} is no checkpoint of a run; start a new run")
    return state
