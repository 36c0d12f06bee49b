"""The penultimate features (embeddings) of recordings: the input of a network's last layer.

Recordings are decoded and embedded in blocks, and each block is saved in a file, so that a restart after a crash
continues. For a model of several networks (`members`) the embeddings of all are concatenated, and one last layer gives
the mean of their logits. Limits: one window per recording, the middle or the one with most speech.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast
from zipfile import BadZipFile

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from pipeline.audio.load import AudioError, load_once
from pipeline.audio.windows import Window
from pipeline.data.segments import HASH_COLUMN, bounds, source_at
from pipeline.data.splits import leaked
from pipeline.evaluation.outcomes import Floats
from pipeline.features.features import FeatureConfig, extract
from pipeline.features.store import FeatureArrays
from pipeline.models.backends import Backend, open_backend
from pipeline.models.bundle import Bundle
from pipeline.models.networks import JoinedModel, Network
from pipeline.storage.errors import SerError
from pipeline.storage.files import stamps_of, usable_cpus
from pipeline.storage.journal import atomic_path

BLOCK = 64  # recordings per file
MOST_OLD = 600  # of the parent's training recordings, for rehearsal
_BATCH = 16

Tell = Callable[[int, int, int], None]  # recordings done, in all, unreadable ones among those done


def last_layers(model: Network) -> list[tuple[str, nn.Linear]]:
    """The last layer of a network, or of each of its members, with its name in the state dict."""
    if isinstance(model, JoinedModel):
        members = [(number, cast("Network", member)) for number, member in model.members.named_children()]
        return [
            (f"members.{number}.{name}", layer) for number, member in members for name, layer in last_layers(member)
        ]
    return [(f"head.{len(model.head) - 1}", cast("nn.Linear", model.head[-1]))]


def last_layer(model: Network) -> tuple[Floats, Floats]:
    """Weights (C, d) and biases (C,) that map the model's penultimate features (d,) to its logits."""
    layers = [layer for _, layer in last_layers(model)]
    weights = [layer.weight.detach().double().numpy() for layer in layers]
    biases = [layer.bias.detach().double().numpy() for layer in layers]
    return np.concatenate(weights, axis=1) / len(layers), np.asarray(np.mean(biases, axis=0))


def with_last_layer(bundle: Bundle, weight: Floats, bias: Floats) -> dict[str, Tensor]:
    """The state dict of a bundle with another last layer, (C, d) and (C,), in the form that `last_layer` returns."""
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
    """Open the bundle's network on all CPUs, with ONNX Runtime if possible, which takes half of PyTorch's time."""
    return open_backend(bundle, "auto", "cpu", usable_cpus())


@dataclass(frozen=True)
class Embedded:
    """The n readable recordings of a manifest."""

    table: pd.DataFrame  # their rows, with content_hash
    embeddings: Mapping[Window, Floats]  # window -> (n, d)
    features: np.ndarray | None  # (n, *input_shape) float32 of the first window; None without keep_features
    unread: Mapping[str, str]  # path -> error, for each recording that could not be read


def embed_all(
    table: pd.DataFrame,
    bundle: Bundle,
    folder: Path,
    windows: Sequence[Window] = ("middle",),
    *,
    keep_features: bool = False,
    tell: Tell | None = None,
) -> Embedded:
    """Decode and embed every recording of a manifest, with each of the input `windows`.

    Blocks that an earlier start saved in `folder` are reused.

    Raises:
        SerError: no recording can be read, or `folder` cannot be written.
    """
    network = open_network(bundle)
    configs = [replace(bundle.features, window=window) for window in windows]
    places = list(zip(table["speech"], *bounds(table), strict=True))
    parts, bad = [], 0
    for start in range(0, len(places), BLOCK):
        part = _block(places[start : start + BLOCK], bundle, configs, network, folder, keep_features)
        parts.append(part)
        bad += int((part["error"] != "").sum())
        if tell is not None:
            tell(min(start + BLOCK, len(places)), len(places), bad)
    errors = np.concatenate([part["error"] for part in parts])
    read = errors == ""
    if not read.any():
        raise SerError(
            f"none of the {len(table)} recordings can be read, for example: {errors[0]}; check their paths and --root"
        )
    hashes = np.concatenate([part["hash"] for part in parts])
    return Embedded(
        table.assign(**{HASH_COLUMN: hashes})[read].reset_index(drop=True),
        {name: np.concatenate([part[name] for part in parts])[read].astype(np.float64) for name in windows},
        np.concatenate([part["features"] for part in parts])[read] if keep_features else None,
        dict(zip(table["speech"][~read], errors[~read], strict=True)),
    )


def _block(
    places: Sequence[Sequence[object]],
    bundle: Bundle,
    configs: Sequence[FeatureConfig],
    network: Backend,
    folder: Path,
    keep_features: bool,
) -> Mapping[str, np.ndarray]:
    """One block, read from its file or computed: `error`, `hash`, the embeddings of each window, perhaps `features`."""
    stamps = stamps_of([str(path) for path, *_ in places]).tolist()
    key = f"{bundle.weights_sha256} {[config.fingerprint() for config in configs]} {keep_features} {places} {stamps}"
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:20]}.npz"
    try:
        with np.load(path, allow_pickle=False) as kept:
            return dict(kept)
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        pass  # missing or incomplete: compute it
    rows = [_read(place, configs) for place in places]
    found = {name: np.array([row[i] for row in rows], dtype=str) for i, name in enumerate(("error", "hash"))}
    features = [np.stack([row[2][number] for row in rows]) for number in range(len(configs))]
    first = embed(network, features[0])
    for config, these in zip(configs, features, strict=True):
        moved = (these != features[0]).any(axis=tuple(range(1, these.ndim)))
        found[config.window] = first.copy()
        if moved.any():
            found[config.window][moved] = embed(network, these[moved])
    if keep_features:
        found["features"] = features[0]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as beside, beside.open("wb") as file:
            np.savez(file, **found)  # type: ignore[arg-type]
    except OSError as error:
        raise SerError(
            f"cannot write into {folder}: {error.strerror}; free some space, or choose another --out"
        ) from error
    return found


def _read(place: Sequence[object], configs: Sequence[FeatureConfig]) -> tuple[str, str, list[np.ndarray]]:
    """Error, content hash and features of each window of a recording.

    If a later window cannot be read, the features of the first one are used in its place.
    """
    digest, found = "", list[np.ndarray]()
    for config in configs:
        how = {"windows_s": [config.window_s], "sample_rate_hz": config.sample_rate_hz, "window": config.window}
        try:
            loaded = load_once(source_at(*place), **how)  # type: ignore[arg-type]
        except AudioError as error:
            if not found:
                return " ".join(str(error).split()), "", [np.zeros(config.input_shape, np.float32)] * len(configs)
            found.append(found[0])
            continue
        digest = digest or loaded.content_hash
        found.append(extract(loaded.clips[0].samples, config))
    return "", digest, found


def of_arrays(arrays: FeatureArrays, rows: np.ndarray, bundle: Bundle) -> Floats:
    """Penultimate features (n, d) of these rows of extracted features."""
    return embed(open_network(bundle), np.asarray(arrays.features[rows])).astype(np.float64)


def rehearsed(
    arrays: FeatureArrays, labels: Sequence[str], own: pd.DataFrame, bundle: Bundle, seed: int = 0
) -> tuple[Floats, np.ndarray] | None:
    """Penultimate features (n, d) and classes (n,) of recordings that the parent was trained on, for rehearsal.

    Takes at most `MOST_OLD` recordings, an equal number of each class of `labels`. Left out are the parent's test part,
    pitch-shifted copies, and recordings that are also in `own`. None if nothing remains.
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
    number = max(1, MOST_OLD // max(1, len(np.unique(classes))))
    chosen = [rng.permutation(rows[classes == index])[:number] for index in np.unique(classes)]
    if not chosen:
        return None
    found = np.concatenate(chosen)
    return of_arrays(arrays, found, bundle), np.array([labels.index(name) for name in table["label"].iloc[found]])


def forget(folder: Path) -> None:
    """Remove the folder of saved blocks."""
    shutil.rmtree(folder, ignore_errors=True)
