"""A model worker without HTTP and Ray: the predictor's answers, batches, decoders that hang or crash, health."""

from __future__ import annotations

import asyncio
import io
import threading
import time
from collections.abc import Coroutine
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import speech_like
from serving import run, wav

from pipeline.audio.windows import SlidingWindow
from pipeline.inference.predictor import Predictor
from pipeline.models.bundle import Bundle
from pipeline.storage.errors import DecoderCrashed
from serve import worker as worker_module
from serve.local import LocalModels
from serve.problems import ServiceError
from serve.service import PredictRequest
from serve.settings import Settings
from serve.worker import Worker, version_of


@pytest.fixture(scope="module")
def predictor(tiny_bundle: Bundle) -> Predictor:
    return Predictor.from_bundle(tiny_bundle.folder, threads=1)


def test_many_at_once_get_the_predictor_s_answers(predictor: Predictor) -> None:
    voices = [wav(0.3 + 0.1 * number, f0_hz=80 + 20 * number) for number in range(20)] + [b"words", b""]

    async def scenario() -> list[Any]:
        worker = Worker(predictor)
        worker.warm_up()
        return await asyncio.gather(*(worker.predict(data, PredictRequest()) for data in voices))

    answers = run(scenario())
    for heard, expected in zip(answers, predictor.predict(voices), strict=True):
        assert heard.prediction.status == expected.status
        np.testing.assert_allclose(heard.prediction.probabilities, expected.probabilities, atol=1e-6)
        assert (heard.model, heard.version) == ("tiny", version_of(predictor.bundle))
        assert bool(heard.timing.batch) is expected.ok  # what cannot be used is in no batch
        assert heard.timing.batch <= predictor.batch_size
        assert min(heard.timing.decode_s, heard.timing.wait_s, heard.timing.network_s) >= 0


def test_the_bundle_s_crops_are_pooled(tiny_bundle: Bundle) -> None:
    several = Predictor.from_bundle(tiny_bundle.folder, threads=1, crops=3)
    data = wav(6.0)
    heard = run(Worker(several).predict(data, PredictRequest()))
    (expected,) = several.predict([data])
    np.testing.assert_allclose(heard.prediction.probabilities, expected.probabilities, atol=1e-6)
    assert heard.prediction.scored_s == expected.scored_s == pytest.approx(14 / 3, abs=0.01)


def test_answer_picture_and_reason_are_of_the_window_that_the_bundle_hears(speech_bundle: Bundle) -> None:
    samples = np.zeros(40 * 16_000, np.float32)
    samples[36 * 16_000 : 37 * 16_000] = speech_like(duration_s=1.0)
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, 16_000, format="WAV")
    data, ours = buffer.getvalue(), Predictor.from_bundle(speech_bundle.folder, threads=1)
    (expected,) = ours.predict([data])
    heard = run(Worker(ours).predict(data, PredictRequest("middle", picture=True)))
    explained = run(Worker(ours).explain(data, PredictRequest()))
    for found in (heard, explained):
        assert found.prediction.label() == expected.label() == expected.predicted
        np.testing.assert_allclose(found.prediction.probabilities, expected.probabilities, atol=1e-6)
        assert found.picture is not None
        assert found.picture.window_start_s == pytest.approx(35.5, abs=0.1)
        assert found.picture.outline_start_s <= found.picture.window_start_s
        assert found.picture.outline_end_s >= found.picture.window_start_s + 2
    assert explained.occlusion is not None
    np.testing.assert_allclose(np.exp(explained.occlusion.log_p), expected.probabilities, atol=1e-5)


def test_windows_are_those_of_follow(predictor: Predictor) -> None:
    data = wav(5.0, channels=2)
    heard = run(Worker(predictor).predict(data, PredictRequest(1.5, 0.5, "each")))
    prediction, timeline = predictor.follow(data, SlidingWindow(1.5, 0.5), channels="each")
    assert heard.timeline is not None
    np.testing.assert_array_equal(heard.timeline.start_s, timeline.start_s)
    np.testing.assert_allclose(heard.timeline.log_p, timeline.log_p, atol=1e-6)
    np.testing.assert_allclose(heard.prediction.probabilities, prediction.probabilities, atol=1e-6)


@pytest.mark.parametrize(
    ("ask", "status"),
    [
        (PredictRequest(channels=1), "no_such_channel"),
        (PredictRequest(channels=1, hop_s=1.0), "no_such_channel"),
    ],
)
def test_what_is_not_granted_is_a_status(predictor: Predictor, ask: PredictRequest, status: str) -> None:
    heard = run(Worker(predictor, max_windows=100).predict(wav(4.0), ask))
    assert heard.prediction.status == status
    assert not heard.prediction.ok
    assert heard.picture is None


def test_explanations_are_of_the_label_that_was_predicted(predictor: Predictor) -> None:
    data = wav(4.0, f0_hz=200)
    explained = run(Worker(predictor).explain(data, PredictRequest()))
    (expected,) = predictor.predict([data])
    assert explained.occlusion is not None
    assert explained.labels[explained.occlusion.target] == expected.predicted
    np.testing.assert_allclose(np.exp(explained.occlusion.log_p), expected.probabilities, atol=1e-5)
    assert run(Worker(predictor).explain(b"words", PredictRequest())).prediction.status == "not_audio"


@pytest.mark.parametrize("isolated", [False, True])
def test_a_defect_beside_the_model_s_window_costs_the_rest_only(predictor: Predictor, isolated: bool) -> None:
    samples = speech_like(duration_s=10.0)
    samples[16_000] = np.nan
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, 16_000, format="WAV", subtype="FLOAT")
    data = buffer.getvalue()
    (expected,) = predictor.predict([data])
    heard = run(Worker(predictor).predict(data, PredictRequest(picture=True), isolated=isolated))
    explained = run(Worker(predictor).explain(data, PredictRequest(), isolated=isolated))
    assert heard.prediction.predicted == explained.prediction.predicted == expected.predicted
    assert "one window of it was analysed" in heard.prediction.notice
    for picture in (heard.picture, explained.picture):
        assert picture is not None
        assert (picture.outline_start_s, picture.outline_end_s) == (0.0, 10.0)
        sounds = np.flatnonzero(picture.high) * 10.0 / len(picture.high)
        assert 4.0 <= sounds.min() < sounds.max() <= 6.0
        assert np.isfinite(picture.overview_db).all()


def test_what_cannot_be_drawn_is_a_status(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    def look(*_: object) -> None:
        raise DecoderCrashed("recording: its decoder ended the process with SIGSEGV.")

    monkeypatch.setattr("serve.worker._window", look)
    worker = Worker(predictor)
    assert run(worker.predict(wav(), PredictRequest(picture=True))).prediction.status == "decoder_crashed"
    assert run(worker.explain(wav(), PredictRequest())).prediction.status == "decoder_crashed"


def test_a_recording_under_suspicion_is_decoded_apart(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = []

    def crash(source: bytes, **options: object) -> None:
        sources.append(source)
        raise DecoderCrashed("recording: its decoder ended the process with SIGSEGV.")

    monkeypatch.setattr("pipeline.audio.isolated.decode_in_subprocess", crash)
    worker = Worker(predictor)
    for request in (PredictRequest(), PredictRequest(window_s=1.0)):
        assert run(worker.predict(b"evil", request, isolated=True)).prediction.status == "decoder_crashed"
    assert run(worker.explain(b"evil", PredictRequest(), isolated=True)).prediction.status == "decoder_crashed"
    assert len(sources) == 3


def test_apart_gives_the_same(predictor: Predictor) -> None:
    data = wav(3.0)
    here = run(Worker(predictor).predict(data, PredictRequest(picture=True)))
    there = run(Worker(predictor).predict(data, PredictRequest(picture=True), isolated=True))
    np.testing.assert_allclose(there.prediction.probabilities, here.prediction.probabilities, atol=1e-6)
    assert here.picture is not None
    assert there.picture is not None
    np.testing.assert_array_equal(there.picture.level_db, here.picture.level_db)


def test_a_decoder_that_hangs_is_given_up_and_told_by_the_health_check(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    monkeypatch.setattr(Predictor, "listen", lambda *_, **__: release.wait(30))

    async def scenario() -> None:
        worker = Worker(predictor, decode_timeout_s=0.05)
        worker.check()
        heard = await worker.predict(b"data", PredictRequest())
        assert heard.prediction.status == "decode_timeout"
        worker.check()  # not for so long that the worker should go
        later_s = time.monotonic() + 1000
        monkeypatch.setattr(worker_module.time, "monotonic", lambda: later_s)
        with pytest.raises(RuntimeError, match="not finished a recording"):
            worker.check()
        release.set()
        while worker._running:
            await asyncio.sleep(0)
        worker.check()

    run(scenario())


def test_without_ray_a_worker_that_hangs_is_replaced_and_a_full_one_refuses(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, listen = threading.Event(), Predictor.listen
    monkeypatch.setattr(Predictor, "listen", lambda *_, **__: release.wait(30))
    renewed: list[Worker] = []

    def renew(old: Worker) -> Worker:
        renewed.append(Worker(old.predictor))
        return renewed[-1]

    async def scenario() -> None:
        models = LocalModels(
            {"m": Worker(predictor, decode_timeout_s=0.05)}, Settings(max_ongoing=1, max_queued=1), renew
        )
        held = [asyncio.create_task(models.predict("m", b"data", PredictRequest())) for _ in range(2)]
        await asyncio.sleep(0)
        for refused in (models.check_room, lambda name: run_soon(models.predict(name, b"data", PredictRequest()))):
            with pytest.raises(ServiceError) as full:
                refused("m")
            assert full.value.code == "overloaded"
        assert {(await one).prediction.status for one in held} == {"decode_timeout"}
        await models.look()
        assert not renewed
        later_s = time.monotonic() + 1000
        with monkeypatch.context() as clock:
            clock.setattr(worker_module.time, "monotonic", lambda: later_s)
            assert not await models.ready("m")
            await models.look()
            assert len(renewed) == 1
            assert await models.ready("m")
        release.set()
        monkeypatch.setattr(Predictor, "listen", listen)
        assert (await models.predict("m", wav(), PredictRequest())).prediction.ok
        while models.busy:
            await asyncio.sleep(0)

    run(scenario())


def run_soon(coroutine: Coroutine[Any, Any, Any]) -> None:
    """Its first step, in which it must raise."""
    try:
        coroutine.send(None)
    finally:
        coroutine.close()


def test_waiting_for_a_thread_is_not_hanging(predictor: Predictor) -> None:
    release = threading.Event()

    async def scenario() -> None:
        worker = Worker(predictor, decode_timeout_s=1.0)
        busy = [worker._decoders.submit(release.wait, 60) for _ in range(2)]
        waiting = asyncio.create_task(worker._decode(lambda: "done"))
        gone = asyncio.create_task(worker._decode(lambda: pytest.fail("nobody waits for it")))
        await asyncio.wait([waiting], timeout=1.5)  # longer than the limit
        gone.cancel()
        await asyncio.wait([gone])
        release.set()
        assert await waiting == "done"
        assert all(future.result() for future in busy)

    run(scenario())


class Paced(Predictor):
    """The predictor, whose network waits for ``leave`` at each batch and counts the pictures."""

    def __init__(self, given: Predictor) -> None:
        super().__init__(given.bundle, given.backend, batch_size=8)
        self.seen: list[int] = []
        self.leave = threading.Semaphore(0)

    def answers(self, features: Any) -> Any:
        self.seen.append(len(features))
        assert self.leave.acquire(timeout=120)
        return super().answers(features)


async def network_at_work(paced: Paced, batches: int = 1) -> None:
    while len(paced.seen) < batches:
        await asyncio.sleep(0)


def test_short_work_and_new_work_share_the_batches_of_what_is_long(predictor: Predictor) -> None:
    async def scenario() -> None:
        paced = Paced(predictor)
        worker = Worker(paced)
        recordings = [wav(20.0, f0_hz=f0_hz) for f0_hz in (100.0, 200.0)]
        long = [asyncio.create_task(worker.predict(data, PredictRequest(hop_s=0.1))) for data in recordings]
        await network_at_work(paced)
        short = [asyncio.create_task(worker.predict(wav(4.0), PredictRequest(hop_s=2.0))) for _ in range(2)]
        short += [asyncio.create_task(worker.predict(wav(4.0), PredictRequest()))]
        explained = asyncio.create_task(worker.explain(wav(4.0), PredictRequest()))
        while worker._batcher.waiting < 5:  # all but the first, whose pictures are in the network
            await asyncio.sleep(0)
        assert (worker.long, worker.waiting) == (5, 1)
        paced.leave.release(2)  # the batch that was begun, and the next one
        await asyncio.wait_for(asyncio.gather(*short), 60)
        assert not any(task.done() for task in (*long, explained))
        paced.leave.release(1000)
        for data, heard in zip(recordings, await asyncio.gather(*long), strict=True):
            expected, timeline = predictor.follow(data, SlidingWindow(2.0, 0.1))
            np.testing.assert_allclose(heard.prediction.probabilities, expected.probabilities, atol=1e-5)
            assert len(heard.timeline) == len(timeline) == 181
        assert (await explained).occlusion is not None
        assert (worker.long, worker.waiting) == (0, 0)

    run(scenario())


@pytest.mark.parametrize("what", ["windows", "explain"])
def test_work_ends_when_its_caller_has_gone(predictor: Predictor, what: str) -> None:
    async def scenario() -> None:
        paced = Paced(predictor)
        worker = Worker(paced)
        data = wav(60.0)
        asked = worker.explain(data, PredictRequest()) if what == "explain" else None
        task = asyncio.create_task(asked or worker.predict(data, PredictRequest(hop_s=0.1)))
        await network_at_work(paced)
        task.cancel()
        await asyncio.wait([task])
        paced.leave.release(1000)
        assert (await worker.predict(wav(), PredictRequest())).prediction.ok
        assert sum(paced.seen) <= 2 * 8 + 1
        assert (worker.long, worker.waiting) == (0, 0)

    run(scenario())


def test_card(predictor: Predictor) -> None:
    card = Worker(predictor).card()
    assert (card.name, card.labels, card.crops, card.backend) == ("tiny", predictor.labels, 1, "onnx")
    assert card.text == ""
