"""What a network's last layer is given of each recording: decoded, made into features, heard by all but that layer.

Recordings are heard in blocks, each kept in a file of its own, so that a start after a crash goes on where it was. The
hidden features of a model of several networks (`members`) are theirs side by side, and its last layer is theirs
together: the mean of their logits. Limits: one window a recording, its middle, as the bundle's network takes it.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from pipeline.audio.load import AudioError, load_once
from pipeline.data.segments import HASH_COLUMN, bounds, source_at
from pipeline.data.splits import leaked
from pipeline.evaluation.outcomes import Floats
from pipeline.features.features import extract
from pipeline.features.store import FeatureArrays
from pipeline.models.bundle import Bundle
from pipeline.models.networks import JoinedModel
from pipeline.storage.errors import SerError
from pipeline.storage.journal import atomic_path

BLOCK = 64  # recordings between two files
_BATCH = 16

Tell = Callable[[int, int, int], None]  # recordings heard, in all, of them unreadable


def last_layers(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The last layer of a network, or of each of its members, and its name in the state dict.

    Raises:
        SerError: a network that does not end in a linear layer.
    """
    members = dict(model.members.named_children()) if isinstance(model, JoinedModel) else {"": model}
    found = []
    for number, member in members.items():
        linear = [(name, layer) for name, layer in member.named_modules() if isinstance(layer, nn.Linear)]
        if not linear:
            raise SerError("this network has no linear layer at its end, which could be fitted anew; train it instead")
        name, layer = linear[-1]
        found.append((f"members.{number}.{name}" if number else name, layer))
    return found


def last_layer(model: nn.Module) -> tuple[Floats, Floats]:
    """Weights (C, d) and biases (C,) that give the model's logits of its hidden features (d,)."""
    layers = [layer for _, layer in last_layers(model)]
    weights = [layer.weight.detach().double().numpy() for layer in layers]
    biases = [layer.bias.detach().double().numpy() for layer in layers]
    return np.concatenate(weights, axis=1) / len(layers), np.asarray(np.mean(biases, axis=0))


def with_last_layer(bundle: Bundle, weight: Floats, bias: Floats) -> dict[str, Tensor]:
    """The weights of a bundle with another last layer, (C, d) and (C,), as `last_layer` gives it."""
    state, start = dict(bundle.state_dict()), 0
    layers = last_layers(bundle.build_model())
    for name, layer in layers:
        part = weight[:, start : start + layer.in_features] * len(layers)
        state[f"{name}.weight"] = torch.from_numpy(np.ascontiguousarray(part)).float()
        state[f"{name}.bias"] = torch.from_numpy(bias.copy()).float()
        start += layer.in_features
    return state


class Ear:
    """A bundle's network without its last layer."""

    def __init__(self, bundle: Bundle) -> None:
        model = bundle.build_model()
        self.pictures = len(bundle.features.input_shape) == 3
        self.model = model.to(memory_format=torch.channels_last) if self.pictures else model  # type: ignore[call-overload]
        self._given: list[Tensor] = []
        for _, layer in last_layers(model):
            layer.register_forward_pre_hook(lambda _, given: self._given.append(given[0]))

    def hidden(self, features: np.ndarray) -> np.ndarray:
        """float32 features (n, *input_shape) -> float32 (n, d)."""
        found = []
        with torch.inference_mode():
            for start in range(0, len(features), _BATCH):
                self._given.clear()
                batch = torch.from_numpy(np.ascontiguousarray(features[start : start + _BATCH]))
                self.model(batch.contiguous(memory_format=torch.channels_last) if self.pictures else batch)
                found.append(torch.cat(self._given, dim=1))
        return torch.cat(found).numpy()


@dataclass(frozen=True)
class Heard:
    """What was heard of the rows of a manifest that can be read.

    Attributes:
        table: these rows, with `content_hash`.
        features: (n, *input_shape) float32.
        hidden: (n, d) float64.
        unread: why each row that is not there could not be read: path -> error.
    """

    table: pd.DataFrame
    features: np.ndarray
    hidden: Floats
    unread: Mapping[str, str]


def hear(table: pd.DataFrame, bundle: Bundle, folder: Path, tell: Tell | None = None) -> Heard:
    """Hear every recording of a manifest; what `folder` holds of an earlier start is taken from there.

    Raises:
        SerError: none can be read, or `folder` cannot be written.
    """
    ear = Ear(bundle)
    places = list(zip(table["speech"], *bounds(table), strict=True))
    parts, bad = [], 0
    for start in range(0, len(places), BLOCK):
        part = _block(places[start : start + BLOCK], bundle, ear, folder)
        parts.append(part)
        bad += int((part["error"] != "").sum())
        if tell is not None:
            tell(min(start + BLOCK, len(places)), len(places), bad)
    errors = np.concatenate([part["error"] for part in parts])
    read = errors == ""
    if not read.any():
        raise SerError(f"none of the {len(table)} recordings can be read, as {errors[0]}; see their paths and --root")
    hashes = np.concatenate([part["hash"] for part in parts])
    return Heard(
        table.assign(**{HASH_COLUMN: hashes})[read].reset_index(drop=True),
        np.concatenate([part["features"] for part in parts])[read],
        np.concatenate([part["hidden"] for part in parts])[read].astype(np.float64),
        dict(zip(table["speech"][~read], errors[~read], strict=True)),
    )


def _block(places: Sequence[Sequence[object]], bundle: Bundle, ear: Ear, folder: Path) -> Mapping[str, np.ndarray]:
    """One block, from its file or heard now."""
    told = repr([(*place, _stamp(str(place[0]))) for place in places])
    path = folder / f"{hashlib.sha256(f'{bundle.weights_sha256} {told}'.encode()).hexdigest()[:20]}.npz"
    try:
        with np.load(path, allow_pickle=False) as kept:
            return {name: kept[name] for name in ("error", "hash", "features", "hidden")}
    except (OSError, ValueError, KeyError, EOFError):
        pass  # not there, or cut off: heard now
    rows = [_read(place, bundle) for place in places]
    features = np.stack([row[2] for row in rows])
    found = {
        "error": np.array([row[0] for row in rows], dtype=str),
        "hash": np.array([row[1] for row in rows], dtype=str),
        "features": features,
        "hidden": ear.hidden(features),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as beside, beside.open("wb") as file:
            np.savez(file, **found)  # type: ignore[arg-type]
    except OSError as error:
        raise SerError(f"cannot write into {folder}: {error.strerror}; make room, or choose another --out") from error
    return found


def _stamp(path: str) -> tuple[int, int]:
    """Size and time of a file; of what is none, zeros."""
    try:
        found = Path(path).stat()
    except (OSError, ValueError):
        return 0, 0
    return found.st_size, found.st_mtime_ns


def _read(place: Sequence[object], bundle: Bundle) -> tuple[str, str, np.ndarray]:
    """Error, content hash and features of a recording."""
    config = bundle.features
    try:
        found = load_once(source_at(*place), windows_s=[config.window_s], sample_rate_hz=config.sample_rate_hz)  # type: ignore[arg-type]
    except AudioError as error:
        return " ".join(str(error).split()), "", np.zeros(config.input_shape, np.float32)
    return "", found.content_hash, extract(found.clips[0].samples, config)


def of_arrays(arrays: FeatureArrays, rows: np.ndarray, bundle: Bundle) -> Floats:
    """Hidden features (n, d) of rows of extracted features."""
    ear = Ear(bundle)
    return ear.hidden(np.asarray(arrays.features[rows])).astype(np.float64)


def rehearsed(
    arrays: FeatureArrays, labels: Sequence[str], own: pd.DataFrame, bundle: Bundle, most: int = 600, seed: int = 0
) -> tuple[Floats, np.ndarray] | None:
    """Hidden features (n, d) and classes (n,) of old recordings of the classes `labels`, each class alike.

    Only what the parent has learnt from (its test part stays unheard, `training.csv` true); copies of another pitch,
    and what `own` holds too, are left out. None where nothing remains.
    """
    table = arrays.table
    known = table if HASH_COLUMN in table.columns else table.assign(**{HASH_COLUMN: ""})
    fits = table["label"].isin(labels) & leaked(known, bundle.training)
    if "parent_id" in table.columns:
        fits &= table["parent_id"].fillna("") == ""
    if HASH_COLUMN in table.columns:
        fits &= ~table[HASH_COLUMN].isin(set(own[HASH_COLUMN]) - {""})
    fits &= ~table["speech"].isin(set(own["speech"]))
    rng, rows = np.random.default_rng(seed), np.flatnonzero(fits)
    classes = np.array([labels.index(name) for name in table["label"].iloc[rows]], np.int64)
    number = max(1, most // max(1, len(np.unique(classes))))
    chosen = [rng.permutation(rows[classes == index])[:number] for index in np.unique(classes)]
    if not chosen:
        return None
    found = np.concatenate(chosen)
    return of_arrays(arrays, found, bundle), np.array([labels.index(name) for name in table["label"].iloc[found]])


def forget(folder: Path) -> None:
    """Remove what was kept for another start."""
    shutil.rmtree(folder, ignore_errors=True)
