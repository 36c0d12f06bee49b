"""Shared fixtures: synthetic audio, a RAVDESS-like folder, a small untrained bundle, one Ray for the session.

Tests need no data beyond this repository: whatever they hear is synthesised here, from a seed. In CI (``CI=true``)
a skipped test is a failure, unless its reason names a missing GPU.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before the first import of numpy or torch
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # Ray reads it when a test module imports it

import hypothesis
import jinja2
import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from pipeline.data.labels import RAVDESS_EMOTIONS, RAVDESS_LABELS
from pipeline.features.features import FeatureConfig, extract
from pipeline.models.bundle import Bundle, load_bundle, save_bundle
from serve.ray_settings import prepare
from serve.settings import Settings

hypothesis.settings.register_profile("tests", deadline=None)  # a busy machine is no error
hypothesis.settings.load_profile("tests")

Samples = NDArray[np.float32]

SERVICE_LIMITS: dict[str, Any] = {  # low, so that tests of the service on Ray reach them quickly
    "max_ongoing": 4,
    "max_queued": 2,
    "max_body_mib": 6,  # more than gRPC takes by default
    "max_files": 8,
    "body_timeout_s": 4,
    "max_windows": 400,
}
prepare(Settings(**SERVICE_LIMITS))  # before the first import of ray.serve: Ray runs as jobs.serve runs it

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has Ctrl-C ignored, children too

# What an emotion sounds like here: fundamental in Hz, syllables a second, peak. Far apart: a model can learn them.
_VOICES = {
    "neutral": (120.0, 3.0, 0.30),
    "calm": (110.0, 2.0, 0.15),
    "happy": (240.0, 5.0, 0.60),
    "sad": (95.0, 1.5, 0.08),
    "angry": (200.0, 6.0, 0.90),
    "fearful": (320.0, 7.0, 0.40),
    "disgust": (80.0, 2.5, 0.50),
    "surprised": (400.0, 4.0, 0.70),
}


def speech_like(
    *,
    f0_hz: float = 150.0,
    syllables_hz: float = 4.0,
    peak: float = 0.5,
    duration_s: float = 1.0,
    sample_rate_hz: int = 16_000,
    seed: int = 0,
) -> Samples:
    """Voiced sound: harmonics of a gliding fundamental under a syllable envelope, and a little noise.

    Returns mono float32 ``(round(duration_s * sample_rate_hz),)`` whose largest magnitude is ``peak``.
    """
    rng = np.random.default_rng(seed)
    t = np.arange(round(duration_s * sample_rate_hz)) / sample_rate_hz
    glide = 1.0 + 0.1 * np.sin(2 * np.pi * (0.7 * t + rng.random()))
    phase = 2 * np.pi * np.cumsum(f0_hz * glide) / sample_rate_hz
    harmonics = range(1, max(2, int(min(4000.0, 0.45 * sample_rate_hz) / (1.1 * f0_hz)) + 1))
    voice = sum(np.sin(k * phase + 2 * np.pi * rng.random()) / k for k in harmonics)
    envelope = 0.1 + 0.9 * np.sin(np.pi * syllables_hz * t + rng.random()) ** 2
    samples = voice * envelope + 0.01 * rng.standard_normal(t.size)
    return np.asarray(samples * (peak / np.abs(samples).max()), dtype=np.float32)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """PyTorch has one thread here, whatever the code asks for: two that wait for a busy CPU take ten times as long."""
    import torch

    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "set_num_threads", lambda _: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def packages_scanned_once() -> Iterator[None]:
    """Streamlit reads the metadata of every installed package whenever a page opens, for a second each time."""
    if "streamlit" not in sys.modules:
        yield
        return
    from streamlit.components.v2 import manifest_scanner

    with pytest.MonkeyPatch.context() as patch:
        once = functools.cache(manifest_scanner.scan_component_manifests)
        patch.setattr(manifest_scanner, "scan_component_manifests", once)
        yield


@pytest.fixture(scope="session", name="speech_like")
def _speech_like() -> Callable[..., Samples]:
    """The function ``speech_like``: keywords ``f0_hz syllables_hz peak duration_s sample_rate_hz seed``."""
    return speech_like


@pytest.fixture
def write_audio(tmp_path: Path) -> Callable[..., Path]:
    """``write_audio("a/b.wav", **voice)`` -> path of a clip below ``tmp_path``.

    The keywords are those of ``speech_like``, and ``samples`` (an array (n,) or (n, channels) instead of a voice),
    ``channels``, ``subtype`` (``"PCM_16"``; soundfile's default for the extension when None).
    """

    def write(
        name: str = "clip.wav",
        *,
        samples: Samples | None = None,
        sample_rate_hz: int = 16_000,
        channels: int = 1,
        subtype: str | None = None,
        **voice: Any,
    ) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if samples is None:
            samples = speech_like(sample_rate_hz=sample_rate_hz, **voice)
        if channels > 1:
            samples = np.stack([samples] * channels, axis=1)
        soundfile.write(path, samples, sample_rate_hz, subtype=subtype)
        return path

    return write


@pytest.fixture(scope="session")
def ravdess_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``Actor_01 .. Actor_04`` with 16 WAV clips each, 64 in all: 8 emotions x 2 statements, named as in RAVDESS.

    1.0 s at 16 kHz, mono; the emotions differ in pitch, rhythm and loudness. For the whole session: do not change it.
    """
    folder = tmp_path_factory.mktemp("ravdess_like")
    for actor in range(1, 5):
        (folder / f"Actor_{actor:02d}").mkdir()
        for code, emotion in RAVDESS_EMOTIONS.items():
            f0_hz, syllables_hz, peak = _VOICES[emotion]
            for statement in (1, 2):
                samples = speech_like(
                    f0_hz=f0_hz * (1.2 if actor % 2 == 0 else 1.0),
                    syllables_hz=syllables_hz,
                    peak=peak,
                    seed=1000 * actor + 10 * int(code) + statement,
                )
                name = f"03-01-{code}-01-{statement:02d}-01-{actor:02d}.wav"
                soundfile.write(folder / f"Actor_{actor:02d}" / name, samples, 16_000, subtype="PCM_16")
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of a narrow Inception with seeded random weights, untrained: RAVDESS' eight classes. Do not change it.

    Batch norms and last layer are set on one clip an emotion, so that answers differ between recordings and none is
    certain: a test that mixes rows up shall see it.
    """
    import torch

    from pipeline.models.networks import build_model

    config, options = FeatureConfig(), {"width": 0.25}
    voices = [dict(zip(("f0_hz", "syllables_hz", "peak"), voice, strict=True)) for voice in _VOICES.values()]
    clips = [speech_like(**voice, duration_s=config.window_s, sample_rate_hz=config.sample_rate_hz) for voice in voices]
    heard = torch.from_numpy(np.stack([extract(clip, config) for clip in clips]))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = build_model("inception", options, len(RAVDESS_LABELS), config.input_shape)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0  # running statistics are those of the one batch that follows
        model.train()(heard)
        logits = model.eval()(heard)
        last = next(module for module in reversed(list(model.modules())) if isinstance(module, torch.nn.Linear))
        gain = 2.0 / (logits - logits.mean(dim=0)).std()
        last.weight.mul_(gain)
        last.bias.sub_(logits.mean(dim=0)).mul_(gain)
    return save_bundle(
        tmp_path_factory.mktemp("bundles") / "tiny",
        name="tiny",
        state_dict=model.state_dict(),
        model_name="inception",
        model_options=options,
        labels=RAVDESS_LABELS,
        features=config,
        metrics={},
    )


@pytest.fixture(scope="session")
def speech_bundle(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """``tiny_bundle``, which hears the window with most speech. Do not change it."""
    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    shutil.copytree(tiny_bundle.folder, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["features"]["window"] = "speech"
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return load_bundle(folder)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """Ray with two CPUs, started at the first use in the session and stopped at its end.

    Jobs called in the same process join it (``start_ray`` does nothing where Ray runs); whoever calls ``ray.shutdown``
    breaks the tests that come later.
    """
    import ray

    from pipeline.cluster.runtime import start_ray

    start_ray(num_cpus=2)
    yield
    ray.shutdown()


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The local engine's work is done here, without its child processes, whose start takes seconds."""
    for module in ("scoring.scoring", "features.extract", "training.cross_validation"):
        monkeypatch.setattr(f"pipeline.{module}.in_processes", lambda items, work, _, **__: map(work, items))


_compile, _compiled = jinja2.Environment.compile, {}


def _compile_once(environment: jinja2.Environment, source: str, name: str, filename: str) -> Any:
    if source not in _compiled:
        _compiled[source] = _compile(environment, source, name, filename)
    return _compiled[source]


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports and runs without their pictures, which take three seconds a report; tests/reporting draws them.

    Templates are compiled once, not at every report.
    """
    monkeypatch.setattr(jinja2.Environment, "compile", _compile_once)
    monkeypatch.setattr("pipeline.reporting.figures.drawings", lambda _: [])
    monkeypatch.setattr("pipeline.training.results.plot_curves", lambda _, path: path.touch())


def _on_ray(item: pytest.Item) -> bool:
    """Whether a test has the fixture ``ray_session``, or a parameter that says "ray"."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return "ray_session" in item.fixturenames or any(
        isinstance(value, str) and value == "ray" for value in parameters.values()
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where processes share the tests (``pytest -n``), those on Ray come first: together they take longest."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: not _on_ray(item))
        config.option.loadgroup = True  # xdist appends the group to the test's name
        for item in filter(_on_ray, items):
            item.add_marker(pytest.mark.xdist_group("ray"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """All tests on Ray to one process, so that Ray starts once; of the others, each file's to one."""
    from xdist.scheduler import LoadScopeScheduling

    class OneRay(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "ray" if nodeid.endswith("@ray") else nodeid.split("::")[0]

    config.option.loadscopereorder = False  # the order of the tests is that of above
    return OneRay(config, log)


def _is_ci() -> bool:
    return os.environ.get("CI", "").lower() in ("1", "true", "yes")


def _forbid_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turn a skip into a failure, unless its reason names a missing GPU; expected failures are left alone."""
    if not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if "GPU" not in reason:
        report.outcome = "failed"
        report.longrepr = f"skipped in CI, where everything must run: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI, a test that skips fails."""
    report = yield
    if _is_ci():
        _forbid_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """In CI, a module that skips itself fails."""
    report = yield
    if _is_ci():
        _forbid_skip(report)
    return report
