"""A model worker without HTTP and Ray: the predictor's answers, batches, decoders that hang or crash, health."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import numpy as np
import pytest
from conftest import speech_like
from serving import awaited, run, wav, wav_of

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

ASK = PredictRequest()


@pytest.fixture(scope="module")
def predictor(tiny_bundle: Bundle) -> Predictor:
    return Predictor.from_bundle(tiny_bundle.folder, threads=1)


@awaited
async def test_many_at_once_get_the_predictor_s_answers(predictor: Predictor) -> None:
    voices = [wav(0.3 + 0.1 * number, f0_hz=80 + 20 * number) for number in range(20)] + [b"words", b""]
    worker = Worker(predictor)
    worker.warm_up()
    answers = await asyncio.gather(*(worker.predict(data, ASK) for data in voices))
    for heard, expected in zip(answers, predictor.predict(voices), strict=True):
        assert heard.prediction.status == expected.status
        np.testing.assert_allclose(heard.prediction.probabilities, expected.probabilities, atol=1e-6)
        assert (heard.model, heard.version) == ("tiny", version_of(predictor.bundle))
        assert bool(heard.timing.batch) is expected.ok  # what cannot be used is in no batch
        assert heard.timing.batch <= predictor.batch_size
        assert min(heard.timing.decode_s, heard.timing.wait_s, heard.timing.network_s) >= 0
    card = worker.card()
    assert (card.name, card.labels, card.crops, card.backend, card.text) == ("tiny", predictor.labels, 1, "onnx", "")


def test_the_bundle_s_crops_are_pooled(tiny_bundle: Bundle) -> None:
    several = Predictor.from_bundle(tiny_bundle.folder, threads=1, crops=3)
    heard = run(Worker(several).predict(wav(6.0), ASK))
    (expected,) = several.predict([wav(6.0)])
    np.testing.assert_allclose(heard.prediction.probabilities, expected.probabilities, atol=1e-6)
    assert heard.prediction.scored_s == expected.scored_s == pytest.approx(14 / 3, abs=0.01)


def test_answer_picture_and_reason_are_of_the_window_that_the_bundle_hears(speech_bundle: Bundle) -> None:
    samples = np.zeros(40 * 16_000, np.float32)
    samples[36 * 16_000 : 37 * 16_000] = speech_like(duration_s=1.0)
    data, ours = wav_of(samples), Predictor.from_bundle(speech_bundle.folder, threads=1)
    (expected,) = ours.predict([data])
    heard = run(Worker(ours).predict(data, PredictRequest("middle", picture=True)))
    explained = run(Worker(ours).explain(data, ASK))
    for found in (heard, explained):
        assert found.prediction.label() == expected.label() == expected.predicted
        np.testing.assert_allclose(found.prediction.probabilities, expected.probabilities, atol=1e-6)
        assert found.picture is not None
        assert found.picture.window_start_s == pytest.approx(35.5, abs=0.1)
        assert found.picture.outline_start_s <= found.picture.window_start_s
        assert found.picture.outline_end_s >= found.picture.window_start_s + 2
    assert explained.occlusion is not None
    assert explained.labels[explained.occlusion.target] == expected.predicted
    np.testing.assert_allclose(np.exp(explained.occlusion.log_p), expected.probabilities, atol=1e-5)


@pytest.mark.parametrize("isolated", [False, True])
def test_a_defect_beside_the_model_s_window_costs_the_rest_only(predictor: Predictor, isolated: bool) -> None:
    samples = speech_like(duration_s=10.0)
    samples[16_000] = np.nan
    data = wav_of(samples, subtype="FLOAT")
    (expected,) = predictor.predict([data])
    heard = run(Worker(predictor).predict(data, PredictRequest(picture=True), isolated=isolated))
    explained = run(Worker(predictor).explain(data, ASK, isolated=isolated))
    np.testing.assert_allclose(heard.prediction.probabilities, expected.probabilities, atol=1e-6)
    assert heard.prediction.predicted == explained.prediction.predicted == expected.predicted
    assert "one window" in heard.prediction.notice
    for picture in (heard.picture, explained.picture):
        assert picture is not None
        assert (picture.outline_start_s, picture.outline_end_s) == (0.0, 10.0)
        sounds = np.flatnonzero(picture.high) * 10.0 / len(picture.high)
        assert 4.0 <= sounds.min() < sounds.max() <= 6.0
        assert np.isfinite(picture.overview_db).all()


@pytest.mark.parametrize(
    ("breaks", "data", "isolated"),
    [
        ("serve.worker._window", wav(), False),  # while it is drawn
        ("pipeline.audio.isolated.decode_in_subprocess", b"evil", True),  # one under suspicion is decoded apart
    ],
)
def test_a_decoder_that_crashes_is_a_status(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch, breaks: str, data: bytes, isolated: bool
) -> None:
    asked = []

    def crash(*_: object, **__: object) -> None:
        asked.append(1)
        raise DecoderCrashed("recording: its decoder ended the process with SIGSEGV.")

    monkeypatch.setattr(breaks, crash)
    worker = Worker(predictor)
    given = [PredictRequest(picture=True), PredictRequest(window_s=0.5, picture=True)]
    heard = [run(worker.predict(data, request, isolated=isolated)) for request in given]
    heard += [run(worker.explain(data, ASK, isolated=isolated))]
    assert [found.prediction.status for found in heard] == ["decoder_crashed"] * 3
    assert len(asked) == 3


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Decoders hang until it is set."""
    event = threading.Event()
    monkeypatch.setattr(Predictor, "listen", lambda *_, **__: event.wait(30))
    return event


@awaited
async def test_a_decoder_that_hangs_is_given_up_and_told(
    predictor: Predictor, release: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(predictor, decode_timeout_s=0.05)
    worker.check()
    heard = await worker.predict(b"data", ASK)
    assert heard.prediction.status == "decode_timeout"
    worker.check()  # not for so long that the worker should go
    later_s = time.monotonic() + 1000
    monkeypatch.setattr(worker_module.time, "monotonic", lambda: later_s)
    with pytest.raises(RuntimeError, match="not finished"):
        worker.check()
    release.set()
    while worker.busy:
        await asyncio.sleep(0)
    worker.check()


@awaited
async def test_without_ray_a_worker_that_hangs_is_replaced_and_a_full_one_refuses(
    predictor: Predictor, release: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    renewed: list[Worker] = []

    def renew(old: Worker) -> Worker:
        renewed.append(Worker(old.predictor))
        return renewed[-1]

    workers = {"m": Worker(predictor, decode_timeout_s=0.05)}
    models = LocalModels(workers, Settings(max_ongoing=1, max_queued=1), renew)
    held = [asyncio.create_task(models.predict("m", b"data", ASK)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(ServiceError) as full:
        models.check_room("m")
    with pytest.raises(ServiceError) as refused:
        await models.predict("m", b"data", ASK)
    assert full.value.code == refused.value.code == "overloaded"
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
    monkeypatch.undo()
    assert (await models.predict("m", wav(), ASK)).prediction.ok
    while models.busy:
        await asyncio.sleep(0)


@awaited
async def test_waiting_for_a_thread_is_not_hanging(predictor: Predictor) -> None:
    release, worker = threading.Event(), Worker(predictor, decode_timeout_s=1.0)
    busy = [worker._decoders.submit(release.wait, 60) for _ in range(2)]
    waiting = asyncio.create_task(worker._decode(lambda: "done"))
    gone = asyncio.create_task(worker._decode(lambda: pytest.fail("nobody waits for it")))
    await asyncio.wait([waiting], timeout=1.5)  # longer than the limit
    gone.cancel()
    await asyncio.wait([gone])
    release.set()
    assert await waiting == "done"
    assert all(future.result() for future in busy)


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

    async def at_work(self) -> None:
        while not self.seen:
            await asyncio.sleep(0)


@awaited
async def test_short_work_and_new_work_share_the_batches_of_what_is_long(predictor: Predictor) -> None:
    paced = Paced(predictor)
    worker = Worker(paced)
    recordings = [wav(20.0, f0_hz=f0_hz) for f0_hz in (100.0, 200.0)]
    long = []
    for data in recordings:
        long.append(asyncio.create_task(worker.predict(data, PredictRequest(hop_s=0.1))))
        await paced.at_work()  # the first fills the first batch alone
    asked = (PredictRequest(hop_s=2.0), PredictRequest(hop_s=2.0), ASK)
    short = [asyncio.create_task(worker.predict(wav(4.0), ask)) for ask in asked]
    explained = asyncio.create_task(worker.explain(wav(4.0), ASK))
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
        assert len(heard.timeline or []) == len(timeline) == 181
    assert (await explained).occlusion is not None
    assert (worker.long, worker.waiting) == (0, 0)


@pytest.mark.parametrize("what", ["windows", "explain"])
@awaited
async def test_work_ends_when_its_caller_has_gone(predictor: Predictor, what: str) -> None:
    paced, data = Paced(predictor), wav(60.0)
    worker = Worker(paced)
    asked = worker.explain(data, ASK) if what == "explain" else worker.predict(data, PredictRequest(hop_s=0.1))
    task = asyncio.create_task(asked)  # type: ignore[arg-type]
    await paced.at_work()
    task.cancel()
    await asyncio.wait([task])
    paced.leave.release(1000)
    assert (await worker.predict(wav(), ASK)).prediction.ok
    assert sum(paced.seen) <= 2 * 8 + 1
    assert (worker.long, worker.waiting) == (0, 0)
