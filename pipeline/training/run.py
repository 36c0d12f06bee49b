"""The folder of one training run: its plan, parts, checkpoint and history, and at the end its bundle.

`plan.json` holds the plan, `splits/` the recordings of each part. `checkpoint.pt` is the full state after the last
epoch; it is replaced in one step, and reading it runs no code from it. `history.csv` is written anew from that state
after each epoch, so that it holds no epoch twice. The bundle's `config.json` is written last: if it exists, the run is
finished. With several machines the folder must be on storage that all of them share. TensorBoard is optional.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from pipeline.audio.windows import check_crops
from pipeline.data.splits import HASH_COLUMN, SPLITS
from pipeline.features.store import NO_CROPS, load_features, read_shard_manifest
from pipeline.models.networks import build_model
from pipeline.storage import journal
from pipeline.storage.errors import SerError
from pipeline.storage.journal import PLAN, atomic_path, locked, remove_temporaries, write_plan
from pipeline.training.batches import TrainingData, from_arrays
from pipeline.training.loop import BatchCallback, EpochCallback, FitResult, Record, Run, Workers, batches_of, fit
from pipeline.training.losses import load_teachers
from pipeline.training.plan import KIND, Plan, read_plan, start_from

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


HISTORY = "history.csv"
_VALIDATION = ("val_loss", "val_accuracy", "val_weighted_f1")
COLUMNS = ("epoch", "lr", "train_loss", *_VALIDATION, "weights", "seconds", "train_seconds")
_PANELS = (("train_loss", "val_loss"), ("val_accuracy", "val_weighted_f1"), ("lr",))


def write_history(folder: Path, records: Sequence[Record]) -> None:
    """Write `history.csv`, one row for each epoch; the file is replaced in one step."""
    with atomic_path(folder / HISTORY) as beside:
        pd.DataFrame(records, columns=list(COLUMNS)).to_csv(beside, index=False, float_format="%.6g")


def read_history(folder: Path) -> list[Record]:
    """The records of `history.csv`, missing figures as None; empty if there is no such file yet."""
    path = folder / HISTORY
    if not path.is_file():
        return []
    table = pd.read_csv(path).astype(object)
    rows = table.where(table.notna(), None).to_dict("records")
    return [{str(name): cell for name, cell in row.items()} for row in rows]


class NewRecords:
    """Returns, at each call, the epochs of a run that were added to its history since the last call."""

    def __init__(self, out: Path) -> None:
        self.out, self.seen = out, len(read_history(out))
        self.read: tuple[int, ...] = ()  # time, inode and size of history.csv when it was last read

    def __call__(self) -> list[Record]:
        try:
            status = (self.out / HISTORY).stat()
        except FileNotFoundError:
            return []
        found = (status.st_mtime_ns, status.st_ino, status.st_size)
        if found == self.read:  # saves CPU time
            return []
        self.read = found
        new = read_history(self.out)[self.seen :]
        self.seen += len(new)
        return new


def plot_curves(records: Sequence[Record], path: Path) -> None:
    """Draw loss, validation figures (of a run that has them) and learning rate over the epochs, as a PNG."""
    from matplotlib.figure import Figure

    table = pd.DataFrame(records, columns=list(COLUMNS))
    panels = [known for names in _PANELS if (known := [name for name in names if table[name].notna().any()])] or _PANELS
    figure = Figure(figsize=(3.7 * len(panels), 3.2), layout="constrained")
    for axis, names in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name in names:
            axis.plot(table["epoch"], table[name].astype(float), label=name, marker="." if len(table) == 1 else "")
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)


class EventLog:
    """Writes the figures of each epoch as TensorBoard events into `folder`, if tensorboard is installed.

    Args:
        done: number of finished epochs; events of later epochs, left by an interrupted run, are hidden.
    """

    def __init__(self, folder: Path, done: int = 0) -> None:
        self._writer: SummaryWriter | None = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder), purge_step=done + 1)

    def add(self, record: Record) -> None:
        """Write one epoch."""
        if self._writer is None:
            return
        for name in COLUMNS[1:]:
            if isinstance(record[name], float):
                self._writer.add_scalar(name, record[name], record["epoch"])
        self._writer.flush()

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write the state in place of the earlier one. Raise SerError if the disk is full or not writable."""
    try:
        with atomic_path(path) as beside:
            torch.save(state, beside)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError where it finds no room
        raise SerError(
            f"cannot write {path}, is the disk full? Free some space, then run the same command with --resume"
        ) from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, tensors and plain values only, onto the CPU. Raise SerError if it cannot be read."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, ... for damaged files
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise SerError(f"cannot read the checkpoint {path}: {reason}; start a new run") from error
    if not isinstance(state, dict) or not {"version", "history"} <= state.keys():
        raise SerError(f"{path} is no checkpoint of a run; start a new run")
    return state


LOCK_WAIT_S = 15.0
LOCK_WAIT_NODES_S = 120.0  # a file server frees the locks of a dead machine only after its lease: 90 s with NFSv4
_FINGERPRINT = "feature_fingerprint"
_LEFT = (  # files and folders of a run, without splits/, which is written before plan.json
    *(PLAN, "config.json", "metrics.json", "training.csv", "README.md", "history.csv", "curves.png"),
    *("report", "interrupted", "tensorboard", "ray"),
)


def begin(plan: Plan, splits: Mapping[str, pd.DataFrame]) -> None:
    """Start a new run's folder: write `splits/`, then `plan.json`. A run without a finished epoch is overwritten.

    Raises:
        SerError: the folder holds another run.
    """
    refuse_begun(plan.out)
    (plan.out / "splits").mkdir(parents=True, exist_ok=True)
    for name in SPLITS:
        splits[name].to_csv(plan.out / "splits" / f"{name}.csv", index=False)
    write_plan(plan.out, KIND, plan.to_dict() | {_FINGERPRINT: _fingerprint(plan.features)})


def check_resumes(plan: Plan) -> None:
    """Raise SerError if the run in `plan.out` may not be resumed with this plan."""
    plan.check_continues(read_plan(plan.out))
    begun = (journal.read_plan(plan.out, KIND) or {}).get(_FINGERPRINT)
    if begun not in (None, _fingerprint(plan.features)):  # None: older runs did not record it
        raise SerError(
            f"the run was started with features of other settings than those in {plan.features[0]}; "
            "give the features that it was started with"
        )


def _fingerprint(features: Sequence[Path]) -> str:
    return str(read_shard_manifest(features[0])["fingerprint"])  # load_features refuses folders that differ


def refuse_begun(out: Path) -> None:
    """Raise SerError if `out` holds a run with a finished epoch, or a file with a run's file name that is of no run."""
    ours = journal.read_plan(out, KIND) is not None and (out / "splits").is_dir()
    if not ours and (foreign := next((out / name for name in _LEFT if (out / name).exists()), None)):
        raise SerError(f"{foreign} does not belong to a training run; give another --out")
    if (out / "checkpoint.pt").exists() or (out / "config.json").exists():
        raise SerError(f"{out} already holds a run; continue it with --resume, or give another --out")


def read_splits(out: Path) -> dict[str, pd.DataFrame]:
    """The recordings of each split (`train`, `inner_val`, `test`) as strings. Raise SerError if there is no run."""
    missing = [name for name in SPLITS if not (out / "splits" / f"{name}.csv").is_file()]
    if missing:
        raise SerError(f"{out} holds no run to resume (no splits/{missing[0]}.csv); leave --resume out to start one")
    return {name: pd.read_csv(out / "splits" / f"{name}.csv", dtype=str, keep_default_na=False) for name in SPLITS}


def training_data(plan: Plan) -> TrainingData:
    """The arrays and rows that a plan trains and validates on.

    Raises:
        SerError: the features are not those that the splits were made from.
    """
    arrays = load_features(plan.features)
    splits = read_splits(plan.out)
    rows = {name: rows_of(arrays.table, splits[name], plan.features) for name in ("train", "inner_val")}
    index = {name: i for i, name in enumerate(plan.labels)}
    classes = np.array([index[name] for name in arrays.table["label"]], dtype=np.int64)
    return from_arrays(arrays, classes, len(plan.labels), rows["train"], rows["inner_val"])


def rows_of(table: pd.DataFrame, part: pd.DataFrame, folders: Sequence[Path]) -> np.ndarray:
    """Positions (n,) in `table` of the recordings of a split, by `row_id`.

    Raises:
        SerError: the table lacks one of them, or has another file or another label there.
    """
    folder = ", ".join(map(str, folders))
    position = {str(row_id): i for i, row_id in enumerate(table["row_id"])}
    try:
        rows = np.array([position[str(row_id)] for row_id in part["row_id"]], dtype=np.int64)
    except KeyError as error:
        raise SerError(
            f"row {error} of the splits is not in {folder}; give the features that the run was started with"
        ) from error
    for begun, found in zip(part["speech"], table["speech"].iloc[rows], strict=True):
        if _name(begun) != _name(found):  # folders may have moved
            raise SerError(
                f"the run was started with {begun}, but {folder} has {found} in its place; give the features that it "
                "was started with"
            )
    if "label" in part.columns and "label" in table.columns:
        for path, begun, found in zip(part["speech"], part["label"], table["label"].iloc[rows], strict=True):
            if str(begun) != str(found):
                raise SerError(
                    f"the run was started with {path} as {begun}, but in {folder} it is {found}; start a new run with "
                    "this label"
                )
    return rows


def refuse_changed(splits: Mapping[str, pd.DataFrame], table: pd.DataFrame) -> None:
    """Raise SerError if a recording in `table` has changed since the `splits` were made.

    A recording without a `content_hash` ("": the file is gone) is not checked.
    """
    now = dict(zip(table["row_id"].astype(str), table[HASH_COLUMN], strict=True))
    for part in (part for part in splits.values() if HASH_COLUMN in part.columns):
        for row, path, begun in zip(part["row_id"], part["speech"], part[HASH_COLUMN], strict=True):
            if begun and now.get(row) not in (None, "", begun):
                raise SerError(f"{path} has changed since the run was started; start a new run")


def _name(path: str) -> str:
    return path.replace("\\", "/").rpartition("/")[2]


def check(plan: Plan, num_workers: int = 1) -> None:
    """Raise SerError, before any worker is started, if the settings do not fit the data, the model or the workers."""
    check_crops(plan.crops)
    data = training_data(plan)
    if plan.crops > 1 and data.mel_power is None:
        raise SerError(NO_CROPS)
    examples = batches_of(data, plan.fit).sampler.part(num_workers)
    model = build_model(plan.model_name, plan.model_options, len(plan.labels), data.config.input_shape)
    if examples == 1:
        _check_single(model, data.config.input_shape)
    load_teachers(plan.teachers, plan.distill, plan.labels, data.config)
    if plan.init is not None:
        start_from(plan.init, model, plan.model_name, plan.labels, data.config)
    if plan.checkpoint.is_file():
        load_checkpoint(plan.checkpoint)


def _check_single(model: nn.Module, input_shape: Sequence[int]) -> None:
    """Raise SerError if single examples have only one value per channel in a batch norm, which needs two or more."""
    try:
        model.train()(torch.zeros(1, *input_shape))
    except ValueError as error:
        raise SerError(
            "a batch of one example for each worker is too small for batch normalisation with features of this size; "
            "give a larger --batch_size"
        ) from error


def train_here(
    plan: Plan,
    *,
    device: str = "cpu",
    on_epoch: EpochCallback | None = None,
    on_batch: BatchCallback | None = None,
    lock_wait_s: float = LOCK_WAIT_S,
) -> FitResult:
    """Train in this process, which is the only worker or one of several; continues from the run's checkpoint if any.

    The first worker saves the state and the history before `on_epoch` is called. It waits `lock_wait_s` for the run's
    lock, as the workers of a killed driver may live on for some seconds.

    Raises:
        SerError: as in `loop.fit`; or another process trains the same run.
    """
    first = Workers.current().rank == 0
    lock = locked(plan.out / ".lock", f"training the run in {plan.out}", wait_s=lock_wait_s)
    with lock if first else nullcontext():
        if first:
            remove_temporaries(plan.out)
        Workers.current().wait_for_all()  # before the lock is held, a killed worker group may still save an epoch
        data = training_data(plan)
        torch.manual_seed(plan.fit.seed)
        model = build_model(plan.model_name, plan.model_options, len(plan.labels), data.config.input_shape)
        if plan.init is not None:
            start_from(plan.init, model, plan.model_name, plan.labels, data.config)
        teachers = load_teachers(plan.teachers, plan.distill, plan.labels, data.config, device)
        state = load_checkpoint(plan.checkpoint) if plan.checkpoint.is_file() else None
        done = state["history"] if state else []
        with EventLog(plan.out / "tensorboard", len(done)) if first else nullcontext() as events:
            if first:
                write_history(plan.out, done)

            def save_then_report(record: Record, run: Run) -> None:
                if events is not None:
                    save_checkpoint(plan.checkpoint, run.state())
                    write_history(plan.out, run.history)
                    events.add(record)
                if on_epoch is not None:
                    on_epoch(record, run)

            return fit(
                model,
                data,
                plan.fit,
                device=device,
                teachers=teachers,
                state=state,
                on_epoch=save_then_report,
                on_batch=on_batch,
            )
