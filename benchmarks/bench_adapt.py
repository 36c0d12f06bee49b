r"""Measure ``ser adapt``: gain with a few labelled recordings, behaviour on shuffled labels, and time.

    python -m benchmarks.bench_adapt --case models/inception_ser_final features/emodb \
        --case models/inception_ravdess features/crema [--seeds 10] [--limit 1500] [--draws 100] [--clock 200]

A case is a parent and the features (``ser extract``) of a corpus outside its training. For each seed, seven tenths of
the speakers are drawn. 10 or 40 of their recordings of each class (or all, if there are fewer) are trained on. All
recordings of the other speakers are tested. UAR is over the corpus' classes. "Before" is the parent, which may also
answer classes that the corpus does not have. "Restricted" is the parent with the corpus' classes only. "After" keeps
all the parent's classes (``--classes auto``). Intervals: 95 %, Student's t over seeds, whose draws overlap. Harm: how
often the verdict on 24 recordings with shuffled labels is "keep". Time: folds, choice and fit of 200 recordings
(`--clock`), with cached embeddings.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import t as student

from pipeline.evaluation.outcomes import Floats, Ints
from pipeline.features.store import load_features
from pipeline.models.bundle import Bundle, load_bundle
from pipeline.storage.files import usable_cpus
from pipeline.training.adapt import judge, labels_for
from pipeline.training.embeddings import last_layer, of_arrays
from pipeline.training.last_layer import Parent, Recordings, adapt, choose, fit_head, parent_of

SIZES = (10, 40)
SHARE = 0.7  # share of the speakers that are trained on


class Case:
    """A parent, and a corpus outside its training."""

    def __init__(self, parent: Path, features: Path, limit: int, cache: Path) -> None:
        bundle = load_bundle(parent)
        arrays = load_features(features, bundle.features)
        rows = np.arange(len(arrays.table))
        if limit and limit < len(rows):
            rows = np.sort(np.random.default_rng(0).permutation(rows)[:limit])
        self.name = f"{features.name} from {parent.name}"
        self.table: pd.DataFrame = arrays.table.iloc[rows].reset_index(drop=True)
        self.labels = labels_for(sorted(set(self.table["label"])), bundle.labels, "auto")
        truth = np.array([self.labels.index(name) for name in self.table["label"]], np.int64)
        embeddings = self._cached(bundle, cache, rows, lambda: of_arrays(arrays, rows, bundle))
        self.all = Recordings(embeddings, truth, pd.factorize(self.table["speaker"])[0].astype(np.int64))
        self.parent: Parent = parent_of(*last_layer(bundle.build_model()), bundle.labels, self.labels)

    @staticmethod
    def _cached(bundle: Bundle, cache: Path, rows: Ints, make: Callable[[], Floats]) -> Floats:
        name = hashlib.sha256(bundle.weights_sha256.encode() + rows.tobytes()).hexdigest()[:16]
        path = cache / f"{name}.npy"
        if not path.is_file():
            cache.mkdir(parents=True, exist_ok=True)
            np.save(path, make())
        return np.asarray(np.load(path), np.float64)

    def drawn(self, seed: int, of_class: int) -> tuple[Recordings, Recordings]:
        """The training and the test recordings of a seed."""
        rng = np.random.default_rng(seed)
        speakers = rng.permutation(np.unique(self.all.groups))
        pool = np.isin(self.all.groups, speakers[: round(SHARE * len(speakers))])
        rows = [
            rng.permutation(np.flatnonzero(pool & (self.all.truth == index)))[:of_class]
            for index in np.unique(self.all.truth)
        ]
        return self.all.where(np.concatenate(rows)), self.all.where(~pool)


def uar(truth: Ints, logits: Floats) -> float:
    """Mean recall of the classes in ``truth``."""
    return float(np.mean([(logits[truth == index].argmax(axis=1) == index).mean() for index in np.unique(truth)]))


def gains(case: Case, seeds: int) -> None:
    """Print the rows of a case in the table of gains."""
    for of_class in SIZES:
        figures = []
        for seed in range(seeds):
            learnt, tested = case.drawn(seed, of_class)
            head = fit_head(learnt, case.parent, choose(learnt, case.parent))
            before = case.parent.answers(tested.embeddings)
            there = np.isin(np.arange(before.shape[1]), case.all.truth)
            restricted = np.where(there, before, -np.inf)
            after = head.logits(tested.embeddings)
            figures.append([uar(tested.truth, logits) for logits in (before, restricted, after)])
        values = np.array(figures) * 100
        opened, closed = values[:, 2] - values[:, 0], values[:, 2] - values[:, 1]
        print(
            f"| {case.name} | {of_class} | {values[:, 0].mean():.1f} | {values[:, 1].mean():.1f} | "
            f"{values[:, 2].mean():.1f} | {spread(opened)} | {spread(closed)} |",
            flush=True,
        )


def spread(values: Floats) -> str:
    """Mean and 95 % interval over seeds."""
    half = student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0
    return f"{values.mean():+.1f} [{values.mean() - half:+.1f}, {values.mean() + half:+.1f}]"


def harm(case: Case, draws: int) -> None:
    """Print how often the verdict on 24 recordings with shuffled labels is to keep the old model."""
    keeps = 0
    n_classes = len(np.unique(case.all.truth))
    for seed in range(draws):
        learnt, _ = case.drawn(seed, -(-24 // n_classes))
        rng = np.random.default_rng(seed)
        rows = rng.permutation(len(learnt))[:24]
        shuffled = Recordings(learnt.embeddings[rows], rng.permutation(learnt.truth[rows]), learnt.groups[rows])
        found = adapt(shuffled, case.parent, seed=seed)
        old, new = case.parent.answers(shuffled.embeddings), found.logits
        keeps += not judge(shuffled.truth, old.argmax(axis=1), new.argmax(axis=1), shuffled.groups).adapted
    print(f"| {case.name} | 24, labels shuffled, {draws} draws | keep in {keeps} |", flush=True)


def clock(case: Case, most: int) -> None:
    """Print how long choice, folds and fit take on at most ``most`` recordings."""
    rows = np.random.default_rng(0).permutation(len(case.all))[:most]
    started = time.monotonic()
    adapt(case.all.where(rows), case.parent)
    print(f"| {case.name} | {len(rows)} recordings, cached | {time.monotonic() - started:.0f} s |", flush=True)


def main() -> None:
    """Print the three tables."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs=2, type=Path, action="append", required=True, metavar=("PARENT", "FEATURES"))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--limit", type=int, default=1500, help="recordings of each corpus, drawn at random (0: all)")
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--clock", type=int, default=200, help="recordings to measure time (5000: use --limit 0)")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir(), "ser-bench-adapt"))
    arguments = parser.parse_args()
    torch.set_num_threads(usable_cpus())
    cases = [Case(parent, features, arguments.limit, arguments.cache) for parent, features in arguments.case]
    print("| corpus, parent | a class | before | restricted | after | gain | gain over restricted |")
    print("|---|---|---|---|---|---|---|")
    for case in cases:
        gains(case, arguments.seeds)
    for case in cases:
        harm(case, arguments.draws)
    for case in cases:
        clock(case, arguments.clock)


if __name__ == "__main__":
    main()
