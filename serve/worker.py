"""A model at work: recordings, as bytes, are decoded in a few threads and classified in batches. No HTTP, no Ray.

Decoding (milliseconds in C code) overlaps with the network, which has a thread of its own (``batching``). What takes
long, windows over a whole recording and explanations, is done one at a time in another thread, so that it never stands
in the way of the short ones.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import numpy as np

from pipeline.audio import load as audio
from pipeline.audio.windows import Walk
from pipeline.features.features import extract
from pipeline.inference.excerpts import Excerpt, describe, failed
from pipeline.inference.explain import occlusion_map
from pipeline.inference.picture import Picture, draw, outline_part
from pipeline.inference.predictor import Prediction, Predictor
from pipeline.inference.timeline import Timeline
from pipeline.models.bundle import Bundle, load_bundle
from pipeline.models.onnx_export import ensure_onnx
from pipeline.storage.errors import SerError
from serve.batching import Batcher
from serve.service import Card, Explained, PredictRequest, Timing, WorkerResult

Result = TypeVar("Result")
_DECODERS = 2
_STUCK_S = 120.0  # far beyond what any accepted recording takes
_VERSION_DIGITS = 12
_CARD_NAME = "README.md"


class TooManyWindows(audio.AudioError):
    """A recording that would be heard in more windows than the service grants."""

    code = "too_many_windows"


class WindowTooLong(audio.AudioError):
    """Windows longer than the model's."""

    code = "invalid_request"


class NotExplainable(audio.AudioError):
    """A model whose features are no picture."""

    code = "not_explainable"


class Worker:
    """One model; to be used from one event loop.

    Args:
        predictor: the model, with the limits that recordings must keep.
        max_windows: windows of a recording, over all channels, that are granted.
        decode_timeout_s: until a recording counts as one that its decoder hangs on.
    """

    def __init__(self, predictor: Predictor, *, max_windows: int = 1800, decode_timeout_s: float = 20.0) -> None:
        self.predictor = predictor
        self._max_windows, self._decode_timeout_s = max_windows, decode_timeout_s
        self._decoders = ThreadPoolExecutor(_DECODERS, thread_name_prefix="decode")
        self._long = ThreadPoolExecutor(1, thread_name_prefix="long")
        self._batcher: Batcher[Excerpt, tuple[Prediction, float, float]] = Batcher(self._classify, predictor.batch_size)
        self._running: dict[int, float] = {}  # when each piece of work in a thread began
        self._numbers = itertools.count()

    @property
    def waiting(self) -> int:
        """Recordings that are decoded and wait for the network."""
        return self._batcher.waiting

    def warm_up(self) -> None:
        """Run everything once, so that the first caller does not pay for first calls."""
        size = self.predictor.batch_size
        shape = self.predictor.bundle.features.input_shape
        for count in {1, size}:
            self.predictor.log_probabilities(np.zeros((count, *shape), np.float32))
        extract(np.zeros(self.predictor.bundle.features.window_samples, np.float32), self.predictor.bundle.features)

    def check(self) -> None:
        """Raise RuntimeError when a thread has hung for far too long: it is lost, and so is the worker."""
        oldest_s = time.monotonic() - min(self._running.values(), default=math.inf)
        if oldest_s > _STUCK_S:
            raise RuntimeError(f"a recording has not been decoded for {oldest_s:.0f} s")

    def card(self) -> Card:
        """What is known of the model."""
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

    async def predict(self, data: bytes, request: PredictRequest, *, apart: bool = False) -> WorkerResult:
        """What a recording sounds like; one that cannot be used is told in the prediction, not raised.

        Args:
            data: a file's content.
            apart: decode in a process of its own, for a recording under suspicion.
        """
        predictor = self.predictor
        started_s = time.monotonic()
        if request.windowed:
            following = partial(self._follow, predictor, data, request, apart)
            prediction, timeline = await self._in(self._long, following, limited=False)
            timing = Timing(network_s=time.monotonic() - started_s, batch=1)
        else:
            timeline = None
            listening = partial(predictor.listen, data, channel=request.channel, apart=apart)
            excerpt = await self._decode(listening, predictor)
            decoded_s = time.monotonic()
            (prediction, begun_s, ended_s), batch = await self._batcher.submit(excerpt)
            timing = Timing(decoded_s - started_s, max(begun_s - decoded_s, 0.0), ended_s - begun_s, batch)
        picture = None
        if request.picture and prediction.ok:
            try:
                picture = (await self._in(self._decoders, partial(self._look, predictor, data, request, apart)))[0]
            except audio.AudioError as error:
                prediction = _refused(predictor, error)
        bundle = predictor.bundle
        return WorkerResult(bundle.name, version_of(bundle), bundle.labels, prediction, timeline, picture, timing)

    async def explain(self, data: bytes, request: PredictRequest, *, apart: bool = False) -> Explained:
        """Why the middle of a recording sounds as it does."""
        predictor = self.predictor
        return await self._in(self._long, partial(self._explain, predictor, data, request, apart), limited=False)

    async def _decode(self, listening: Callable[[], Excerpt], predictor: Predictor) -> Excerpt:
        try:
            return await self._in(self._decoders, listening)
        except audio.AudioError as error:
            return failed(predictor.bundle.features, error)

    async def _in(self, pool: ThreadPoolExecutor, work: Callable[[], Result], *, limited: bool = True) -> Result:
        """Run ``work`` in a thread; ``limited``: give up on it (``DecodeTimeout``) when it takes too long.

        Its time begins when a thread is free for it.
        """
        number, loop, limit = next(self._numbers), asyncio.get_running_loop(), asyncio.timeout(None)

        def begin() -> None:
            with suppress(RuntimeError):  # nobody waits for it any more
                limit.reschedule(loop.time() + self._decode_timeout_s)

        def watched() -> Result:
            self._running[number] = time.monotonic()
            if limited:
                loop.call_soon_threadsafe(begin)
            try:
                return work()
            finally:
                del self._running[number]

        running = loop.run_in_executor(pool, watched)
        if not limited:
            return await running
        try:
            async with limit:
                return await running
        except TimeoutError as error:
            detail = f"not decoded within {self._decode_timeout_s:g} s. Leave it out, or export it again."
            raise audio.ERRORS["decode_timeout"](f"recording: {detail}") from error

    def _classify(self, excerpts: Sequence[Excerpt]) -> list[tuple[Prediction, float, float]]:
        begun_s = time.monotonic()
        predictions = self.predictor.classify(excerpts)
        ended_s = time.monotonic()
        return [(prediction, begun_s, ended_s) for prediction in predictions]

    def _follow(
        self, predictor: Predictor, data: bytes, request: PredictRequest, apart: bool
    ) -> tuple[Prediction, Timeline | None]:
        config = predictor.bundle.features
        window_s = config.window_s if request.window_s is None else request.window_s
        steps = Walk(window_s, window_s if request.hop_s is None else request.hop_s)
        try:
            if window_s > config.window_s:
                raise WindowTooLong(f"window_s {window_s:g} is more than the {config.window_s:g} s the model hears.")
            info = describe(data, apart=apart, limits=predictor.limits)
            tracks = info.channels if request.channels == "each" else 1
            windows = tracks * (1 + max(info.duration_s - window_s, 0) / steps.hop_s)
            if windows > self._max_windows:
                raise TooManyWindows(
                    f"{windows:.0f} windows; the limit is {self._max_windows}. Take a longer hop_s, or a shorter part."
                )
        except audio.AudioError as error:
            return _refused(predictor, error), None
        return predictor.follow(data, steps, channels=request.channels, apart=apart)

    def _look(
        self, predictor: Predictor, data: bytes, request: PredictRequest, apart: bool
    ) -> tuple[Picture, audio.Clip]:
        """What the model sees of a recording's middle, and that middle."""
        config = predictor.bundle.features
        window = _load(
            audio.load_middle,
            data,
            apart,
            window_s=config.window_s,
            sample_rate_hz=config.sample_rate_hz,
            channel=request.channel,
            limits=predictor.limits,
        )
        start_s, length_s = outline_part(window.info.duration_s)
        part = {"start_s": start_s, "duration_s": length_s, "sample_rate_hz": 8000, "limits": predictor.limits}
        try:
            outline = _load(audio.load, data, apart, **part)
        except audio.AudioError:  # damaged where the model does not listen
            outline = window
        return draw(window, outline, config), window

    def _explain(self, predictor: Predictor, data: bytes, request: PredictRequest, apart: bool) -> Explained:
        bundle = predictor.bundle
        answer = partial(Explained, bundle.name, version_of(bundle), bundle.labels, features=bundle.features)
        heard = predictor.listen(data, channel=request.channel, apart=apart)
        (prediction,) = predictor.classify([heard])
        if not prediction.ok:
            return answer(prediction=prediction)
        if bundle.features.kind != "log_mel":
            unseen = NotExplainable(f"{bundle.name} sees no picture; only log-mel models can be explained.")
            return answer(prediction=_refused(predictor, unseen))
        try:
            picture, window = self._look(predictor, data, request, apart)
        except audio.AudioError as error:
            return answer(prediction=_refused(predictor, error))
        features = extract(window.samples, bundle.features)
        target = int(prediction.probabilities.argmax())
        occlusion = occlusion_map(features, predictor.log_probabilities, target=target)
        return answer(prediction=prediction, occlusion=occlusion, picture=picture)


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


def version_of(bundle: Bundle) -> str:
    """What tells one training of a model from another: the first digits of its weights' sha256."""
    return bundle.weights_sha256[:_VERSION_DIGITS]


def _refused(predictor: Predictor, error: audio.AudioError) -> Prediction:
    """The prediction of a recording that cannot be used."""
    return predictor.classify([failed(predictor.bundle.features, error)])[0]


def _load(decode: Callable[..., audio.Clip], data: bytes, apart: bool, **options: Any) -> audio.Clip:
    if not apart:
        return decode(data, **options)
    from pipeline.audio.isolated import decode_in_subprocess

    return decode_in_subprocess(data, decode=decode, **options)
