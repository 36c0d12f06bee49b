"""The model bundle on disk: a folder with the weights and everything needed to use and to judge them.

``NAME.pt`` is a plain state_dict, always loaded with ``weights_only=True``, which runs no pickled code. ``config.json``
holds the format version, the model's name and options, the labels in index order, the FeatureConfig, temperature and
crops, and the sha256 of each file; ``metrics.json`` the measured figures; ``training.csv`` the recordings that were
used (names and content hashes, no audio); ``README.md`` the model card. Another format version or hash is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.labels import LabelError, LabelSet
from pipeline.features.features import FeatureConfig, FeatureError
from pipeline.storage.errors import SerError
from pipeline.storage.journal import atomic_path, write_json

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from pipeline.models.doubt import Familiarity
    from pipeline.models.networks import Network

FORMAT_VERSION = 1
_SHIPPED = [
    Path(__file__).resolve().parents[n] / place / "inception_ser_final" for n, place in ((2, "models"), (1, "shipped"))
]
DEFAULT_BUNDLE = next(filter(Path.is_dir, _SHIPPED), _SHIPPED[0])  # in the project's folder or in an installed copy
_CONFIG, _METRICS, _TRAINING, _CARD = "config.json", "metrics.json", "training.csv", "README.md"


class BundleError(SerError):
    """A model bundle that is missing, damaged, or of an unknown version."""


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. Only ``state_dict`` and ``build_model`` read the weights; opening needs no PyTorch."""

    folder: Path
    name: str
    model_name: str
    model_options: Mapping[str, Any]
    labels: tuple[str, ...]
    features: FeatureConfig
    temperature: float
    crops: int
    weights_sha256: str
    corpora: Mapping[str, Sequence[str]] = field(default_factory=dict)  # training corpus -> its classes

    @property
    def weights_path(self) -> Path:
        """The ``.pt`` file."""
        return self.folder / f"{self.name}.pt"

    @property
    def metrics(self) -> dict[str, Any]:
        """The measured figures of ``metrics.json``; empty if there is no such file."""
        path = self.folder / _METRICS
        return dict(_read_json(path)) if path.is_file() else {}

    def about(self, names: Sequence[str] = ("epochs", "trained_on", "settings")) -> dict[str, Any]:
        """The sha256 of the weights and entries of the training record, for the record of a model made from this."""
        record = self.metrics.get("training", {})
        return {"model_sha256": self.weights_sha256} | {name: record.get(name) for name in names}

    @property
    def training(self) -> pd.DataFrame:
        """Rows of ``training.csv`` (``id, content_hash, speaker, split``); empty if there is no such file."""
        import pandas as pd

        path = self.folder / _TRAINING
        return pd.read_csv(path, dtype=str, keep_default_na=False) if path.is_file() else pd.DataFrame()

    @property
    def familiarity(self) -> Familiarity | None:
        """The familiarity measure, see ``models.doubt``; None if the bundle has none.

        Raises:
            BundleError: its file is damaged.
        """
        from pipeline.models.doubt import NAME, Familiarity

        path = self.folder / NAME
        if not path.is_file():
            return None
        try:
            return Familiarity.from_bytes(path.read_bytes())
        except (OSError, ValueError, KeyError) as error:
            raise BundleError(f"{path} is damaged ({error}); get the bundle again") from error

    def state_dict(self) -> dict[str, Tensor]:
        """The weights, each of any shape, on the CPU.

        Raises:
            BundleError: the file cannot be read, or it holds no weights.
        """
        import torch

        try:
            state = torch.load(self.weights_path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, ... for damaged files
            reason = str(error).splitlines()[0]
            raise BundleError(f"cannot read the weights {self.weights_path}: {reason}; get the bundle again") from error
        if not isinstance(state, dict):
            raise BundleError(f"{self.weights_path} holds no state_dict; expected the weights that jobs.train wrote")
        return state

    def build_model(self) -> Network:
        """The network with its weights, in evaluation mode, on the CPU.

        Raises:
            BundleError: the weights cannot be read, or do not fit the model.
        """
        from pipeline.models.networks import build_model

        model = build_model(self.model_name, dict(self.model_options), len(self.labels), self.features.input_shape)
        try:
            model.load_state_dict(self.state_dict())
        except RuntimeError as error:
            raise BundleError(
                f"the weights in {self.weights_path} do not fit the model {self.model_name!r} of its config.json; "
                "keep the files of one bundle together"
            ) from error
        return model.eval()


def load_bundle(path: str | os.PathLike[str] | None = None) -> Bundle:
    """Open a bundle: its folder, the ``.pt`` in it, or (None) the shipped one.

    Raises:
        BundleError: no bundle at this path, a file is missing or changed, the ``.pt`` is not the bundle's, or the
            version or a setting is unknown.
    """
    given = folder = Path(path) if path is not None else DEFAULT_BUNDLE
    if given.suffix == ".pt":
        if not given.is_file():
            raise BundleError(f"no file {given}; give the folder that jobs.train wrote, or the .pt in it")
        folder = given.parent
    if path is None and not folder.is_dir():
        raise BundleError(
            f"the shipped model is missing ({folder}); install the package again, or name your own model "
            "(--model_weights, serve: --bundles)"
        )
    if not folder.is_dir():
        raise BundleError(f"no model bundle at {folder}; give the folder that jobs.train wrote, or the .pt in it")
    if not (folder / _CONFIG).is_file():
        raise BundleError(f"{folder} has no {_CONFIG}; is the training finished? (continue it with --resume)")
    bundle, files = _parse(folder, _read_json(folder / _CONFIG))
    for name, expected in files.items():
        if not (folder / name).is_file():
            raise BundleError(f"{folder} lacks {name}; keep the files of one bundle together")
        if file_sha256(folder / name) != expected:
            with (folder / name).open("rb") as file:
                if file.read(64).startswith(b"version https://git-lfs"):
                    raise BundleError(f"{folder / name} is a Git LFS pointer instead of the weights; run git lfs pull")
            raise BundleError(f"{folder / name} does not match the hash in config.json; get the bundle again")
    if given.suffix == ".pt" and not given.samefile(bundle.weights_path):
        raise BundleError(f"{given} is not the weights file of its bundle; give {bundle.weights_path}")
    return bundle


def _parse(folder: Path, config: Mapping[str, Any]) -> tuple[Bundle, dict[str, str]]:
    if config.get("format_version") != FORMAT_VERSION:
        raise BundleError(
            f"{folder} has format version {config.get('format_version')!r}, this code reads {FORMAT_VERSION}; "
            "update the project, or train again"
        )
    try:
        files = {str(name): str(digest) for name, digest in config["files"].items()}
        name = str(config["name"])
        if any(Path(n).name != n for n in [name, *files]):
            raise BundleError(f"{folder / _CONFIG} names files outside its folder; get the bundle again")
        bundle = Bundle(
            folder=folder,
            name=name,
            model_name=str(config["model"]["name"]),
            model_options=dict(config["model"]["options"]),
            labels=LabelSet(tuple(config["labels"])).names,
            features=FeatureConfig.from_dict(config["features"]),
            temperature=float(config["temperature"]),
            crops=int(config["crops"]),
            weights_sha256=files[f"{name}.pt"],
            corpora={str(name): tuple(classes) for name, classes in config.get("corpora", {}).items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError, FeatureError, LabelError) as error:
        raise BundleError(f"{folder / _CONFIG} is damaged ({error}); get the bundle again") from error
    if not bundle.temperature > 0 or bundle.crops < 1:
        raise BundleError(
            f"{folder / _CONFIG} has temperature {bundle.temperature}, crops {bundle.crops}; both must be > 0"
        )
    return bundle, files


def save_bundle(
    folder: str | os.PathLike[str],
    *,
    name: str,
    state_dict: Mapping[str, Tensor],
    model_name: str,
    model_options: Mapping[str, Any],
    labels: Sequence[str],
    features: FeatureConfig,
    metrics: Mapping[str, Any],
    training: pd.DataFrame | None = None,
    card: str | None = None,
    temperature: float = 1.0,
    crops: int = 1,
    corpora: Mapping[str, Sequence[str]] | None = None,
) -> Bundle:
    """Write a bundle into ``folder`` (made if missing). ``config.json`` is written last: if it exists, all is complete.

    Every block of figures in ``metrics`` (a value that is a mapping) gets the entry ``model_sha256``.

    Raises:
        BundleError: the folder is not writable.
    """
    import torch

    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _CONFIG).unlink(missing_ok=True)
        weights = folder / f"{name}.pt"
        torch.save({k: v.detach().cpu().contiguous() for k, v in state_dict.items()}, weights)
        digests = {weights.name: file_sha256(weights)}
        if training is not None:
            training.to_csv(folder / _TRAINING, index=False)
            digests[_TRAINING] = file_sha256(folder / _TRAINING)
        write_json(folder / _METRICS, stamped(metrics, digests[weights.name]))
        if card is not None:
            (folder / _CARD).write_text(card, encoding="utf-8")
        config = {
            "format_version": FORMAT_VERSION,
            "name": name,
            "model": {"name": model_name, "options": dict(model_options)},
            "labels": list(labels),
            "features": features.to_dict(),
            "features_fingerprint": features.fingerprint(),
            "temperature": temperature,
            "crops": crops,
            "corpora": {name: list(classes) for name, classes in (corpora or {}).items()},
            "files": digests,
        }
        write_json(folder / _CONFIG, config)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError if the disk is full
        reason = getattr(error, "strerror", None) or "the disk is full"
        raise BundleError(
            f"cannot write the bundle {folder}: {reason}; free some space, or choose another --out"
        ) from error
    return load_bundle(folder)


def set_temperature(bundle: Bundle, temperature: float, figures: Mapping[str, Any]) -> None:
    """Write a new temperature into a bundle, and the figures of its fit into ``metrics.json`` (``calibration``)."""
    config = dict(_read_json(bundle.folder / _CONFIG))
    block = {"calibration": {"temperature": temperature, **figures}}
    write_json(bundle.folder / _METRICS, bundle.metrics | stamped(block, bundle.weights_sha256))
    write_json(bundle.folder / _CONFIG, config | {"temperature": temperature})


def set_familiarity(bundle: Bundle, found: Familiarity) -> None:
    """Write a familiarity measure into a bundle."""
    from pipeline.models.doubt import NAME

    with atomic_path(bundle.folder / NAME) as beside:
        beside.write_bytes(found.to_bytes())
    config = dict(_read_json(bundle.folder / _CONFIG))
    config["files"] = config["files"] | {NAME: file_sha256(bundle.folder / NAME)}
    write_json(bundle.folder / _CONFIG, config)


def stamped(metrics: Mapping[str, Any], weights_sha256: str) -> dict[str, Any]:
    """``metrics`` with ``model_sha256`` in every block that is a mapping."""
    return {
        key: {**value, "model_sha256": weights_sha256} if isinstance(value, Mapping) else value
        for key, value in metrics.items()
    }


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(f"cannot read {path}: {error}; get the bundle again") from error
    if not isinstance(values, dict):
        raise BundleError(f"{path} holds no JSON object; get the bundle again")
    return values
