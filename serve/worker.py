"""A model that decodes recordings (bytes) in a few threads and classifies them in batches. No HTTP, no Ray.

Decoding (milliseconds in C code) overlaps with the network, which has its own thread. Long requests (windows over a
whole recording, and explanations) run in steps: a minute is decoded, then its windows share the network's batches with
all other requests (``batching``). Work ends when its caller goes away.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.audio import load as audio
from pipeline.audio.windows import LONG_S, GivenWindows, SlidingWindow
from pipeline.features.features import extract
from pipeline.inference.excerpts import channels_differ, describe, failed
from pipeline.inference.explain import Overview, Picture, draw, occlusion_steps, outline_part
from pipeline.inference.predictor import Prediction, Predictor
from pipeline.inference.timeline import Floats, Timeline
from pipeline.models.backends import ensure_onnx
from pipeline.models.bundle import Bundle, load_bundle
from pipeline.storage.errors import SerError
from serve.batching import Batcher, FairThreads, Share
from serve.metrics import WorkMeter
from serve.service import Card, Explained, PredictRequest, Timing, WorkerResult
from serve.settings import Settings

Array = NDArray[np.float32]
Result = TypeVar("Result")
_DECODERS = 2
_BYTES_A_SECOND = 4 * 2**20  # analysed in windows by one thread: an estimate, only for the order of steps
_LONG_THREADS = 2  # one of them is reserved for requests that have used little time
_DRAWN_AT_ONCE_S = 60.0
_STUCK_S = 120.0  # far longer than any accepted recording takes
_VERSION_DIGITS = 12
_CARD_NAME = "README.md"


class TooManyWindows(audio.AudioError):
    """A recording that needs more windows than the service allows."""

    code = "too_many_windows"


class WindowTooLong(audio.AudioError):
    """The requested windows are longer than the model's input window."""

    code = "invalid_request"


class NotExplainable(audio.AudioError):
    """The model's features are not a spectrogram, so its predictions cannot be explained."""

    code = "not_explainable"


class Worker:
    """One model with its threads; use it from one event loop.

    ``max_windows`` counts over all channels of a recording.
    """

    def __init__(
        self,
        predictor: Predictor,
        *,
        max_windows: int = 1800,
        decode_timeout_s: float = 20.0,
        meter: WorkMeter | None = None,
    ) -> None:
        self.predictor, self._meter = predictor, meter
        self._max_windows, self._decode_timeout_s = max_windows, decode_timeout_s
        self._decoders = ThreadPoolExecutor(_DECODERS, thread_name_prefix="decode")
        self._threads = FairThreads(_LONG_THREADS, "long")
        self._batcher: Batcher[Array, Floats] = Batcher(self._classify, predictor.batch_size)
        self._running: dict[int, float] = {}  # start times of the work in threads
        self._numbers = itertools.count()
        self.waiting = 0  # short recordings in progress: being decoded, in the network, or waiting for either
        self.long = 0  # recordings analysed in windows, and explanations, in progress

    def warm_up(self) -> None:
        """Run features and network once, because first calls are slow."""
        size = self.predictor.batch_size
        shape = self.predictor.bundle.features.input_shape
        for count in {1, size}:
            self.predictor.log_probabilities(np.zeros((count, *shape), np.float32))
        extract(np.zeros(self.predictor.bundle.features.window_samples, np.float32), self.predictor.bundle.features)

    @property
    def busy(self) -> bool:
        """Whether a thread is running work."""
        return bool(self._running)

    def check(self) -> None:
        """Raise RuntimeError where a thread has been busy for over 120 s with one step: the worker must be replaced."""
        oldest_s = time.monotonic() - min(self._running.values(), default=math.inf)
        if oldest_s > _STUCK_S:
            raise RuntimeError(f"a thread has not finished a recording for {oldest_s:.0f} s; the worker is replaced")

    def card(self) -> Card:
        """The description of the model."""
        bundle = self.predictor.bundle
        text = bundle.folder / _CARD_NAME
        return Card(
            name=bundle.name,
            version=version_of(bundle),
            labels=bundle.labels,
            features=bundle.features,
            crops=self.predictor.crops,
            backend=self.predictor.backend.name,
            metrics=bundle.metrics,
            text=text.read_text(encoding="utf-8") if text.is_file() else "",
        )

    async def predict(self, data: bytes, request: PredictRequest, *, isolated: bool = False) -> WorkerResult:
        """Predict the emotion of a recording. One that cannot be used gives a prediction with an error, no exception.

        ``isolated``: decode in a separate process, for a recording that may have crashed a worker.
        """
        with self._metered():
            result = await self._predict(data, request, isolated)
        if self._meter:
            self._meter.work(result.model, result.timing)
        return result

    async def explain(self, data: bytes, request: PredictRequest, *, isolated: bool = False) -> Explained:
        """Explain the prediction for the model's one window of a recording by occlusion."""
        with self._metered():
            return (await self._follow(self._explain(data, request, isolated), Share()))[0]

    @contextmanager
    def _metered(self) -> Iterator[None]:
        """Update the metrics of the load when a recording starts and ends."""
        if not (meter := self._meter):
            yield
            return
        name = self.predictor.bundle.name
        asyncio.get_running_loop().call_soon(lambda: meter.load(name, self.waiting, self.long))
        try:
            yield
        finally:
            meter.load(name, self.waiting, self.long)

    async def _predict(self, data: bytes, request: PredictRequest, isolated: bool) -> WorkerResult:
        timeline, share = None, Share(expected_s=len(data) / _BYTES_A_SECOND)
        if request.windowed:
            (prediction, timeline), timing = await self._follow(self._windows(data, request, isolated), share)
        else:
            prediction, timing = await self._excerpt(data, request, isolated)
            if request.by_length and await self._is_long(prediction, data, isolated):
                (whole, parts), spent = await self._follow(self._windows(data, request, isolated), share)
                if whole.ok or not prediction.ok:
                    prediction, timeline, timing = whole, parts, spent
                else:
                    prediction = replace(prediction, notice=f"only one window of it was analysed. {whole.error}")
        picture = None
        if request.picture and prediction.ok:
            try:
                picture = await self._picture(data, request, isolated)
            except audio.AudioError as error:
                prediction = _refused(self.predictor, error)
        bundle = self.predictor.bundle
        return WorkerResult(bundle.name, version_of(bundle), bundle.labels, prediction, timeline, picture, timing)

    async def _excerpt(self, data: bytes, request: PredictRequest, isolated: bool) -> tuple[Prediction, Timing]:
        """Predict from the bundle's one window, or its crops."""
        predictor, started_s = self.predictor, time.monotonic()
        self.waiting += 1
        try:
            listening = partial(predictor.listen, data, channel=request.channel, isolated=isolated)
            try:
                excerpt = await self._decode(listening)
            except audio.AudioError as error:
                excerpt = failed(predictor.bundle.features, error)
            decoded_s = time.monotonic()
            if excerpt.status != "ok":
                return predictor.classify([excerpt])[0], Timing(decoded_s - started_s)
            found = await self._batcher.submit(_rows(excerpt.features))
        finally:
            self.waiting -= 1
        log_p = np.concatenate([row.result for row in found])
        wait_s = max(found[0].begun_s - decoded_s, 0.0)
        network_s = found[-1].ended_s - found[0].begun_s
        largest = max(row.size for row in found)
        return predictor.prediction(excerpt, log_p), Timing(decoded_s - started_s, wait_s, network_s, largest)

    async def _is_long(self, middle: Prediction, data: bytes, isolated: bool) -> bool:
        if middle.status != "too_short":  # the window may be too short, but not the recording
            return middle.duration_s > LONG_S
        try:
            info = await self._decode(partial(describe, data, isolated=isolated, limits=self.predictor.limits))
        except audio.AudioError:
            return False
        return info.duration_s > LONG_S

    async def _follow(self, work: Generator[Array, Floats, Result], share: Share) -> tuple[Result, Timing]:
        """Run long work step by step, its features in the shared batches; cancelling the caller ends it.

        ``work`` yields features ``(n, *input_shape)``, and is sent ``Predictor.answers``, ``(n, classes + 1)``.
        """
        log_p, started_s, network_s, size = None, time.monotonic(), 0.0, 0
        self.long += 1
        try:
            while True:
                features, found = await self._threads.run(share, self._watched(partial(_advance, work, log_p)))
                if features is None:
                    assert found is not None
                    wait_s = max(time.monotonic() - started_s - share.used_s - network_s, 0.0)
                    return found[0], Timing(share.used_s, wait_s, network_s, size)
                rows = await self._batcher.submit(_rows(features), share)
                log_p = np.concatenate([row.result for row in rows])
                size = max(size, *(row.size for row in rows))
                network_s += sum(ended_s - begun_s for begun_s, ended_s in {(r.begun_s, r.ended_s) for r in rows})
        finally:
            self.long -= 1

    async def _decode(self, work: Callable[[], Result]) -> Result:
        """Run ``work`` in a decoder thread; raise ``DecodeTimeout`` where it takes too long.

        The time counts from when a thread is free.
        """
        loop, limit = asyncio.get_running_loop(), asyncio.timeout(None)

        def begin() -> None:
            with suppress(RuntimeError):  # the caller has gone
                limit.reschedule(loop.time() + self._decode_timeout_s)

        def limited() -> Result:
            loop.call_soon_threadsafe(begin)
            return work()

        running = loop.run_in_executor(self._decoders, self._watched(limited))
        try:
            async with limit:
                return await running
        except TimeoutError as error:
            detail = f"not decoded within {self._decode_timeout_s:g} s. Leave it out, or export it again."
            raise audio.ERRORS["decode_timeout"](f"recording: {detail}") from error

    def _watched(self, work: Callable[[], Result]) -> Callable[[], Result]:
        """``work``, with its start time recorded for ``check``."""
        number = next(self._numbers)

        def watched() -> Result:
            self._running[number] = time.monotonic()
            try:
                return work()
            finally:
                del self._running[number]

        return watched

    def _classify(self, items: Sequence[Array]) -> list[Floats]:
        """Features ``(1, *input_shape)`` of each item -> its ``Predictor.answers`` ``(1, classes + 1)``."""
        return list(self.predictor.answers(np.concatenate(items))[:, np.newaxis])

    def _windows(
        self, data: bytes, request: PredictRequest, isolated: bool
    ) -> Generator[Array, Floats, tuple[Prediction, Timeline | None]]:
        predictor, channels = self.predictor, request.channels or "mix"
        config = predictor.bundle.features
        if request.at:
            given = GivenWindows(config.window_s, request.at)
            return (yield from predictor.follow_steps(data, given, isolated=isolated))
        window_s = request.window_s if isinstance(request.window_s, float) else config.window_s
        hop_s = window_s if request.hop_s is None else request.hop_s
        try:
            if window_s > config.window_s:
                raise WindowTooLong(
                    f"window_s {window_s:g} is longer than the model's input window; give at most {config.window_s:g}."
                )
            info = describe(data, isolated=isolated, limits=predictor.limits)
            if request.by_length:  # too many windows are not refused here: mix the channels, or use longer hops
                hop_s = max(hop_s, (info.duration_s - window_s) / max(self._max_windows - 2, 1))
                most = info.channels * (2 + (info.duration_s - window_s) / hop_s)
                room = request.channels is None and most <= self._max_windows
                if room and channels_differ(data, info, isolated=isolated, limits=predictor.limits):
                    channels = "each"
            tracks = info.channels if channels == "each" else 1
            windows = tracks * (1 + max(info.duration_s - window_s, 0) / hop_s)
            if windows > self._max_windows:
                raise TooManyWindows(
                    f"{windows:.0f} windows; the limit is {self._max_windows}. Use a longer hop_s, or a shorter part."
                )
        except audio.AudioError as error:
            return _refused(predictor, error), None
        steps = SlidingWindow(window_s, hop_s)
        return (yield from predictor.follow_steps(data, steps, channels=channels, isolated=isolated))

    async def _picture(self, data: bytes, request: PredictRequest, isolated: bool) -> Picture:
        """The spectrogram of the model's one window, and an overview of the whole recording."""
        predictor = self.predictor
        window = await self._decode(partial(_window, predictor, data, request, isolated))
        overview = Overview(0.0, window.info.duration_s, predictor.bundle.features)
        share = Share(expected_s=len(data) / _BYTES_A_SECOND)
        for start_s in np.arange(0.0, overview.length_s, _DRAWN_AT_ONCE_S):
            adding = partial(_add, overview, predictor, data, isolated, float(start_s), _DRAWN_AT_ONCE_S)
            if not await self._threads.run(share, self._watched(adding)):
                overview.add(window)
        return draw(window, overview, predictor.bundle.features)

    def _explain(self, data: bytes, request: PredictRequest, isolated: bool) -> Generator[Array, Floats, Explained]:
        predictor, bundle = self.predictor, self.predictor.bundle
        answer = partial(Explained, bundle.name, version_of(bundle), bundle.labels, features=bundle.features)
        excerpt = predictor.listen(data, channel=request.channel, isolated=isolated)
        if excerpt.status != "ok":
            return answer(prediction=predictor.classify([excerpt])[0])
        prediction = predictor.prediction(excerpt, (yield excerpt.features))
        if bundle.features.kind != "log_mel":
            unseen = NotExplainable(f"the input of {bundle.name} is not log-mel; only log-mel models can be explained.")
            return answer(prediction=_refused(predictor, unseen))
        try:
            window = _window(predictor, data, request, isolated)
        except audio.AudioError as error:
            return answer(prediction=_refused(predictor, error))
        part = outline_part(window.info.duration_s, window.start_s + window.scored_s / 2)
        overview = Overview(*part, bundle.features)
        if not _add(overview, predictor, data, isolated, overview.start_s, overview.length_s):
            overview.add(window)
        picture = draw(window, overview, bundle.features)
        features = extract(window.samples, bundle.features)
        steps = occlusion_steps(features, target=int(prediction.probabilities.argmax()))
        occlusion = yield from _without_familiarity(steps)
        return answer(prediction=prediction, occlusion=occlusion, picture=picture)


def _window(predictor: Predictor, data: bytes, request: PredictRequest, isolated: bool) -> audio.Clip:
    config = predictor.bundle.features
    part = {"window_s": config.window_s, "window": config.window, "sample_rate_hz": config.sample_rate_hz}
    return _load(audio.load_middle, data, isolated, channel=request.channel, limits=predictor.limits, **part)


def _without_familiarity(work: Generator[Array, Floats, Result]) -> Generator[Array, Floats, Result]:
    """Adapt ``work``, which is sent log-probabilities ``(n, classes)``, to be sent ``Predictor.answers``."""
    try:
        features = next(work)
        while True:
            features = work.send((yield features)[:, :-1])
    except StopIteration as end:
        found: Result = end.value
        return found


def _add(
    overview: Overview, predictor: Predictor, data: bytes, isolated: bool, start_s: float, length_s: float
) -> bool:
    """Add a part of a recording to the overview, all channels mixed; False where it cannot be decoded."""
    part = {"start_s": start_s, "duration_s": length_s, "limits": predictor.limits}
    try:
        overview.add(_load(audio.load, data, isolated, sample_rate_hz=predictor.bundle.features.sample_rate_hz, **part))
    except audio.AudioError:
        return False
    return True


def _rows(features: Array) -> list[Array]:
    """Split features ``(n, *input_shape)`` into n arrays ``(1, *input_shape)``."""
    return np.split(features, len(features))


def _advance(
    work: Generator[Array, Floats, Result], log_p: Floats | None
) -> tuple[Array, None] | tuple[None, tuple[Result]]:
    """The next features that ``work`` yields, or its result; a future cannot carry the StopIteration itself."""
    try:
        return (next(work) if log_p is None else work.send(log_p)), None
    except StopIteration as end:
        return None, (end.value,)


def open_worker(folder: str, settings: Settings, meter: WorkMeter) -> Worker:
    """A worker for the bundle in ``folder``, warmed up, with the limits of ``settings``; SerError if unusable."""
    limits = settings.audio_limits
    predictor = Predictor.from_bundle(folder, threads=settings.threads, batch_size=settings.batch_size, limits=limits)
    worker = Worker(predictor, max_windows=settings.max_windows, meter=meter)
    worker.warm_up()
    return worker


def open_bundles(paths: Sequence[str]) -> list[Bundle]:
    """The bundles at ``paths`` in order, checked (no paths: the shipped bundle).

    Raises:
        SerError: a bundle is missing or cannot be used, or two have the same name.
    """
    bundles = [load_bundle(path) for path in paths or (None,)]
    names = [bundle.name for bundle in bundles]
    if len(set(names)) < len(names):
        raise SerError(f"each bundle needs a different name, got {', '.join(names)}; leave one out")
    for bundle in bundles:
        if not ensure_onnx(bundle):
            bundle.build_model()  # PyTorch will run it: check that the weights fit
    return bundles


def version_of(bundle: Bundle) -> str:
    """The version of a model: the first 12 digits of its weights' sha256."""
    return bundle.weights_sha256[:_VERSION_DIGITS]


def _refused(predictor: Predictor, error: audio.AudioError) -> Prediction:
    """The prediction for a recording that cannot be used."""
    return predictor.classify([failed(predictor.bundle.features, error)])[0]


def _load(decode: Callable[..., audio.Clip], data: bytes, isolated: bool, **options: Any) -> audio.Clip:
    if not isolated:
        return decode(data, **options)
    from pipeline.audio.isolated import decode_in_subprocess

    return decode_in_subprocess(data, decode=decode, **options)
