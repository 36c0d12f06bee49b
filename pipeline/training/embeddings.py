"""The penultimate features of recordings: what a network's last layer is given of each.

Recordings are decoded and embedded in blocks, each kept in a file of its own, so that a start after a crash goes on.
The penultimate features of a model of several networks (`members`) are theirs side by side, and its last layer is
theirs together: the mean of their logits. Limits: one window a recording, its middle, as the network takes it.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

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
from pipeline.models.backends import Backend, open_backend
from pipeline.models.bundle import Bundle
from pipeline.models.networks import JoinedModel, Network
from pipeline.storage.errors import SerError
from pipeline.storage.files import usable_cpus
from pipeline.storage.journal import atomic_path

BLOCK = 64  # recordings between two files
_BATCH = 16

Tell = Callable[[int, int, int], None]  # recordings done, in all, of them unreadable


def last_layers(model: Network) -> list[tuple[str, nn.Linear]]:
    """The last layer of a network, or of each of its members, and its name in the state dict."""
    if isinstance(model, JoinedModel):
        members = [(number, cast("Network", member)) for number, member in model.members.named_children()]
        return [
            (f"members.{number}.{name}", layer) for number, member in members for name, layer in last_layers(member)
        ]
    return [(f"head.{len(model.head) - 1}", cast("nn.Linear", model.head[-1]))]


def last_layer(model: Network) -> tuple[Floats, Floats]:
    """Weights (C, d) and biases (C,) that give the model's logits of its penultimate features (d,)."""
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


def embed(network: Backend, features: np.ndarray) -> np.ndarray:
    """Penultimate features, float32 (n, d), of float32 features (n, *input_shape)."""
    starts = range(0, len(features), _BATCH)
    return np.concatenate([network.outputs(np.ascontiguousarray(features[i : i + _BATCH]))[1] for i in starts])


def open_network(bundle: Bundle) -> Backend:
    """Its network, on all CPUs."""
    return open_backend(bundle, "torch", "cpu", usable_cpus())


@dataclass(frozen=True)
class Embedded:
    """The rows of a manifest that can be read.

    Attributes:
        table: these rows, with `content_hash`.
        features: (n, *input_shape) float32.
        embeddings: (n, d) float64.
        unread: why each row that is not there could not be read: path -> error.
    """

    table: pd.DataFrame
    features: np.ndarray
    embeddings: Floats
    unread: Mapping[str, str]


def embed_all(table: pd.DataFrame, bundle: Bundle, folder: Path, tell: Tell | None = None) -> Embedded:
    """Decode and embed every recording of a manifest; what `folder` holds of an earlier start is taken from there.

    Raises:
        SerError: none can be read, or `folder` cannot be written.
    """
    network = open_network(bundle)
    places = list(zip(table["speech"], *bounds(table), strict=True))
    parts, bad = [], 0
    for start in range(0, len(places), BLOCK):
        part = _block(places[start : start + BLOCK], bundle, network, folder)
        parts.append(part)
        bad += int((part["error"] != "").sum())
        if tell is not None:
            tell(min(start + BLOCK, len(places)), len(places), bad)
    errors = np.concatenate([part["error"] for part in parts])
    read = errors == ""
    if not read.any():
        raise SerError(f"none of the {len(table)} recordings can be read, as {errors[0]}; see their paths and --root")
    hashes = np.concatenate([part["hash"] for part in parts])
    return Embedded(
        table.assign(**{HASH_COLUMN: hashes})[read].reset_index(drop=True),
        np.concatenate([part["features"] for part in parts])[read],
        np.concatenate([part["embeddings"] for part in parts])[read].astype(np.float64),
        dict(zip(table["speech"][~read], errors[~read], strict=True)),
    )


def _block(
    places: Sequence[Sequence[object]], bundle: Bundle, network: Backend, folder: Path
) -> Mapping[str, np.ndarray]:
    """One block, from its file or made now."""
    told = repr([(*place, _stamp(str(place[0]))) for place in places])
    path = folder / f"{hashlib.sha256(f'{bundle.weights_sha256} {told}'.encode()).hexdigest()[:20]}.npz"
    try:
        with np.load(path, allow_pickle=False) as kept:
            return {name: kept[name] for name in ("error", "hash", "features", "embeddings")}
    except (OSError, ValueError, KeyError, EOFError):
        pass  # not there, or cut off: made now
    rows = [_read(place, bundle) for place in places]
    features = np.stack([row[2] for row in rows])
    found = {
        "error": np.array([row[0] for row in rows], dtype=str),
        "hash": np.array([row[1] for row in rows], dtype=str),
        "features": features,
        "embeddings": embed(network, features),
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
    return embed(open_network(bundle), np.asarray(arrays.features[rows])).astype(np.float64)


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
