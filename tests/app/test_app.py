"""The page's logic, driven by Streamlit's AppTest against a service that answers without a model."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from app_service import FakeService, refused, spoken
from serving import Bridge, LocalService
from streamlit import deprecation_util
from streamlit.testing.v1 import AppTest

from app_pages import own_service, service, words
from app_pages.recordings import examples
from jobs import infer
from pipeline.models.bundle import Bundle
from serve.client import Client
from serve.schema import STREAM_PROTOCOL, is_stream_ticket, key_digest

pytestmark = pytest.mark.filterwarnings("error::DeprecationWarning", "error::FutureWarning")
APP = Path(__file__).resolve().parents[2] / "app.py"
MODEL_FIGURES = {
    "test": {
        "accuracy": 0.86,
        "weighted_f1": 0.85,
        "class_recall": {"angry": 0.9, "fearful": 0.7, "calm": None},
        "n": 239,
        "confusion": {"counts": [[3 if i == j else 0 for j in range(8)] for i in range(8)]},
    }
}


@pytest.fixture(autouse=True)
def nothing_deprecated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a test draws: Streamlit warns of no call that it will drop."""
    warned: list[object] = []
    monkeypatch.setattr(deprecation_util._LOGGER, "warning", lambda *message: warned.append(message))
    yield
    assert warned == []


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeService]:
    """The service that the page talks to."""
    made = FakeService()
    monkeypatch.setattr(service, "Client", functools.partial(Client, transport=made.transport, retries=0))
    monkeypatch.setenv("SER_API_URL", "http://127.0.0.1:8000/")
    monkeypatch.delenv("SER_API_SINCE", raising=False)
    service._client.clear()
    yield made
    service._client.clear()


def listen() -> AppTest:
    return AppTest.from_file(APP, default_timeout=60).run()


def page_of(name: str) -> AppTest:
    return AppTest.from_string(f"from app_pages import {name}\n{name}.page()", default_timeout=60).run()


def many(*recordings: tuple[str, bytes]) -> AppTest:
    return upload(page_of("many"), *recordings)


def heard(data: bytes, name: str = "a.wav") -> AppTest:
    """The first page with the answer to one recording."""
    return upload(listen(), (name, data))


def upload(page: AppTest, *recordings: tuple[str, bytes]) -> AppTest:
    page = page.file_uploader[0].set_value([(name, data, "audio/wav") for name, data in recordings]).run()
    assert not page.exception
    return page


def html(page: AppTest) -> str:
    return "\n".join(element.proto.body for element in page.html).replace("\u00a0", " ")


def charts(page: AppTest) -> list[Any]:
    return list(page.get("arrow_vega_lite_chart")) + list(page.get("vega_lite_chart"))


def press(page: AppTest, label: str) -> AppTest:
    (button,) = [button for button in page.button if button.label == label]
    return button.click().run()


def is_first_view(page: AppTest) -> bool:
    return [header.value for header in page.header] == ["Record", "Drop audio", "Live"]


def test_the_first_view_is_three_choices_and_no_answer(fake: FakeService) -> None:
    page = listen()
    assert not page.exception
    assert page.title[0].value.endswith("?")
    assert is_first_view(page)
    assert 'class="ser-answer"' not in html(page)
    assert not charts(page)
    assert fake.received == []
    assert "Do not use it to judge people" in html(page)
    page.pills[0].set_value("Anna, happy").run()
    assert "This voice sounds calm" in html(page)
    assert fake.received == ["anna_happy_train.ogg"]
    assert page.expander[0].label == "Another recording"


@pytest.mark.parametrize("key", ["", "correct horse battery staple"])
def test_the_browser_gets_a_ticket_never_the_key(fake: FakeService, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("SER_API_KEY", key)
    page = press(listen(), "Start live")
    assert not page.exception
    (band,) = page.get("bidi_component")
    assert "correct" not in str(band.proto)
    told = json.loads(band.proto.json)
    assert (told["service"], told["protocols"][0]) == ("http://127.0.0.1:8000", STREAM_PROTOCOL)
    tickets = [is_stream_ticket(one, key_digest(key), time.time() + 3000) for one in told["protocols"][1:]]
    assert tickets == ([True] if key else [])
    press(page, "Back")
    assert is_first_view(page)
    upload(page, ("a.wav", spoken("sad")))
    assert fake.keys == {f"Bearer {key}" if key else None}


@pytest.mark.parametrize(
    ("said", "told", "caption"),
    [
        ({"label": "disgust", "confidence": 0.93, "duration_s": 2.0}, "This voice sounds disgusted", "all of it"),
        ({"label": "sad", "confidence": 0.4, "duration_s": 3.5}, "Closest: sad (40 %)", "the shaded 2 s"),
        ({"label": "sad", "duration_s": 6.5}, "Sounds sad for 100 % of the time", "in parts of 2 s"),
    ],
)
def test_an_upload_is_answered_in_words(fake: FakeService, said: Any, told: str, caption: str) -> None:
    page = heard(spoken(**said))
    assert told in html(page)
    assert "<strong>a.wav</strong>" in html(page)
    assert [one.value for one in page.caption if caption in one.value]
    if said["duration_s"] == 2.0:
        assert "Almost certain: 93 %" in html(page)
        for word in ("angry", "calm", "disgusted", "fearful", "happy", "neutral", "sad", "surprised"):
            assert f'<th scope="row">{word}</th>' in html(page)


def test_file_names_are_text_and_nothing_else(fake: FakeService) -> None:
    page = heard(spoken("sad"), "<img src=x onerror=alert(1)>.wav")
    assert "<img" not in html(page)
    assert "&lt;img" in html(page)
    page = many(("![x](http://evil/x.png).wav", refused("empty_file")))
    assert page.table[0].value["File"][0] == r"\!\[x\](http\://evil/x.png).wav"


@pytest.mark.parametrize("code", ["not_audio", "something_new"])
def test_what_cannot_be_used_is_one_sentence_in_place_of_the_last_answer(fake: FakeService, code: str) -> None:
    page = upload(heard(spoken("angry")), ("a.wav", refused(code)))
    (error,) = page.error
    assert error.value.startswith("a.wav: ")
    assert error.value.count(".") == 2  # one of them in the name
    assert "<table" not in html(page)
    assert not charts(page)
    page = upload(page, ("b.wav", spoken("sad")))
    assert "sounds sad" in html(page)
    assert not page.error


def test_the_same_recording_is_asked_for_once_and_there_is_room_for_the_next(fake: FakeService) -> None:
    page = heard(spoken("sad"))
    assert not page.file_uploader[0].value
    assert "sounds sad" in html(page.run())
    upload(page, ("again.wav", spoken("sad")))
    assert fake.received == ["a.wav"]


def test_the_microphone_records_what_the_model_needs_and_a_voice_taken_back_is_gone(fake: FakeService) -> None:
    page = listen()
    assert page.audio_input[0].proto.sample_rate == 48_000
    assert "localhost" in " ".join(caption.value for caption in page.caption)
    page.audio_input[0].set_value(("audio.wav", spoken("happy"), "audio/wav")).run()
    assert "sounds happy" in html(page)
    assert fake.received == ["Your voice.wav"]
    page.audio_input[0].set_value(None).run()
    assert "sounds happy" not in html(page)
    assert is_first_view(page)


def test_several_recordings_become_a_table(fake: FakeService) -> None:
    page = upload(listen(), ("a.wav", spoken("sad")), ("b.wav", spoken("angry")), ("l.csv", b"file,label\na.wav,sad\n"))
    assert page.title[0].value == "Many recordings"
    assert list(page.dataframe[0].value["sounds"]) == ["sad", "angry"]
    assert "How many are right?" in [header.value for header in page.header]


def test_what_mattered_is_shown_on_request(fake: FakeService) -> None:
    page = heard(spoken("sad"))
    assert "/v1/explain" not in fake.asked
    page = press(page, "Show what mattered")
    assert "/v1/explain" in fake.asked
    assert any("amber" in text.value for text in page.markdown)
    page = upload(page, ("b.wav", spoken("angry")))
    assert not any("amber" in text.value for text in page.markdown)


def test_only_long_recordings_have_a_time_line(fake: FakeService) -> None:
    page = heard(spoken("sad", duration_s=6.0, channels=2), "short.wav")
    assert not page.dataframe
    assert len(charts(page)) == 3  # waveform and spectrogram of all of it, and the window enlarged
    page = upload(page, ("long.wav", spoken("sad", duration_s=10.0, channels=2)))
    assert len(charts(page)) == 2
    assert fake.received == ["short.wav", "long.wav"]
    table = page.dataframe[0].value
    assert list(table["lane"]) == ["Left"] * 5 + ["Right"] * 5
    assert list(table["from"])[:2] == ["0:00.0", "0:02.0"]


def test_a_service_that_is_away_is_told_with_its_address_and_waited_for(fake: FakeService) -> None:
    fake.up = False
    page = upload(heard(spoken("happy")), ("a.wav", spoken("sad")))
    assert "http://127.0.0.1:8000" in page.warning[0].value
    fake.up = True
    page.run()  # as the page does itself as soon as the service is ready
    assert "sounds sad" in html(page)
    assert not page.warning


def test_a_service_that_starts_is_waited_for(fake: FakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SER_API_SINCE", str(time.time() - 9.2))
    fake.up = False
    page = listen()
    assert not page.info  # nobody has to wait yet
    page.pills[0].set_value("Anna, calm").run()
    (told,) = page.info
    assert 9 <= int(re.findall(r"\d+", told.value)[0]) < 60
    assert not page.warning
    fake.up = True
    assert "sounds calm" in html(page.run())
    fake.up = False
    monkeypatch.setenv("SER_API_SINCE", str(time.time() - 3600))  # it ran, and has gone
    assert "does not answer" in upload(page, ("a.wav", spoken("sad"))).warning[0].value


def test_without_an_address_the_page_starts_the_service(fake: FakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    ends = [sys.executable, "-c", "import sys; sys.exit(sys.stdin.read() != '')"]

    class Noted(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, words: list[str], **options: Any) -> None:
            assert words[1:5] == ["-m", "jobs.serve", "--engine", "local"]
            super().__init__(ends, **options)
            started.append(self)

    monkeypatch.delenv("SER_API_URL")
    monkeypatch.setattr(own_service, "_found", None)
    monkeypatch.setattr(own_service.subprocess, "Popen", Noted)
    monkeypatch.setattr(own_service, "DEFAULT_URL", "http://127.0.0.1:1")  # nobody listens there
    fake.up = False
    page = heard(spoken("sad"))
    heard(spoken("sad"), "b.wav")
    (child,) = started
    assert "starting" in page.info[0].value
    assert service.address().startswith("http://127.0.0.1:")
    assert child.poll() is None
    child.stdin.close()  # type: ignore[union-attr]  # as when the page ends
    assert child.wait(60) == 0
    page.run()
    assert "could not be started" in page.error[0].value
    page = press(page, "Start it again")
    assert len(started) == 2
    assert "starting" in page.info[0].value
    started[1].communicate(timeout=60)


def test_a_service_that_is_ready_redraws_the_page(fake: FakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    monkeypatch.setattr(service.st, "rerun", lambda scope: drawn.append(scope))
    look = service._look_again.__wrapped__
    monkeypatch.setattr(service.st, "session_state", {"waiting_since_s": -1e9})
    fake.up = False
    look()
    assert drawn == []
    fake.up = True
    look()
    assert drawn == ["app"]
    service.st.session_state["waiting_since_s"] = service.time.monotonic()
    look()  # at once after the page was drawn: that would spin
    assert drawn == ["app"]


def test_the_headline_of_up_to_six_seconds_is_what_infer_says(
    fake: FakeService,
    monkeypatch: pytest.MonkeyPatch,
    tiny_bundle: Bundle,
    write_audio: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = Bridge(LocalService(tiny_bundle))
    monkeypatch.setattr(service, "Client", functools.partial(Client, transport=real, retries=0))
    service._client.clear()
    page, sure = listen(), []
    for number, (f0_hz, duration_s) in enumerate(((90.0, 1.0), (150.0, 3.5), (240.0, 5.9), (320.0, 6.0), (400.0, 2.0))):
        clip = write_audio(f"{number}.wav", f0_hz=f0_hz, duration_s=duration_s, channels=2)
        assert infer.main(["--json", "--model_weights", str(tiny_bundle.folder), "--file", str(clip)]) == 0
        (expected,) = json.loads(capsys.readouterr().out)
        page = upload(page, (clip.name, clip.read_bytes()))
        word, share = words.spoken(expected["predicted"]), words.percent(expected["confidence"]).replace("\u00a0", " ")
        sure.append(expected["confidence"] >= words.NOT_SURE_BELOW)
        assert (f"sounds {word}" if sure[-1] else f"Closest: {word} ({share})") in html(page)
        assert share in html(page)
    assert any(sure)


@pytest.mark.parametrize(("status", "word"), [(429, "busy"), (401, "SER_API_KEY"), (500, "Told of overloaded.")])
def test_every_trouble_has_its_sentence(fake: FakeService, status: int, word: str) -> None:
    fake.status = status
    page = heard(spoken("sad"))
    assert word in " ".join(element.value for element in [*page.error, *page.warning])
    assert "Traceback" not in html(page)


def test_our_own_mistakes_show_no_traceback(fake: FakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app_pages.bars.scores_html", lambda answer: 1 / 0)
    page = heard(spoken("sad"))
    assert "Something went wrong" in page.error[0].value
    assert "Do not use it to judge people" in html(page)


def test_many_become_a_table_with_failures_and_reasons(fake: FakeService) -> None:
    unsure = ("b.wav", spoken("happy", confidence=0.3))
    page = many(("a.wav", spoken("sad")), unsure, ("c.wav", refused("empty_file")))
    assert page.header[0].value == "2 answered, 1 could not be used"
    table = page.dataframe[0].value
    assert list(table["file"]) == ["a.wav", "b.wav"]
    assert list(table["sounds"]) == ["sad", "not sure (happy?)"]
    assert list(table["confidence"]) == pytest.approx([80, 30])
    assert page.table[0].value.to_numpy().tolist() == [["c.wav", "This file is empty."]]
    assert not press(page, "Clear the list").dataframe
    page = press(page, "Use the examples")
    assert len(page.dataframe[0].value) == len(examples()) == 12


def listed(page: AppTest) -> list[str]:
    return list(page.dataframe[0].value["file"])


def test_many_can_be_found_filtered_and_sorted(fake: FakeService) -> None:
    files = [("cat.wav", "sad", 0.6), ("dog.wav", "happy", 0.9), ("cow.wav", "sad", 0.7)]
    page = many(*[(name, spoken(label, confidence=p)) for name, label, p in files])
    page.selectbox[0].set_value("Least sure first").run()
    assert listed(page) == ["cat.wav", "cow.wav", "dog.wav"]
    page.pills[0].set_value(["sad"]).run()
    assert listed(page) == ["cat.wav", "cow.wav"]
    page.text_input[0].set_value("OW").run()
    assert listed(page) == ["cow.wav"]


def test_the_same_file_twice_is_in_the_list_once(fake: FakeService) -> None:
    page = many(("a.wav", spoken("sad")), ("a.wav", spoken("sad")))
    assert "1 of these recordings" in page.info[0].value
    page = upload(page, ("a.wav", spoken("sad")), ("a.wav", spoken("sad", take=2)))
    assert listed(page) == ["a.wav", "a.wav"]
    assert len(fake.received) == 2


def test_what_was_answered_survives_a_service_that_goes_away(fake: FakeService) -> None:
    fake.after = 16  # the client sends 16 recordings a request
    names = [f"{i:02d}.wav" for i in range(20)]
    page = many(*[(name, spoken("sad", take=i)) for i, name in enumerate(names)])
    assert "does not answer" in page.warning[0].value
    fake.after = 10**9
    page.run()
    assert not page.warning
    assert listed(page) == fake.received == names


def test_labels_beside_the_recordings_give_a_verdict(fake: FakeService) -> None:
    labels = b"speech,label\nsome/folder/a.wav,sad\nb.wav,happiness\nc.wav,0\nd.wav,calm\n"
    said = [spoken("sad"), spoken("sad", take=2), spoken("angry"), refused("not_audio")]
    page = many(*zip(("a.wav", "b.wav", "c.wav", "d.wav"), said, strict=True), ("labels.csv", labels))
    assert "Right answers (accuracy)</th><td>67 %</td><td>21 to 94</td><td>80 %</td><td>missed" in html(page)
    assert "Weakest class: happy (recall)</th><td>0 %" in html(page)
    assert any("Not all targets are met" in text.value for text in page.markdown)
    assert any("1 more could not be used" in caption.value for caption in page.caption)
    assert list(page.dataframe[0].value["label"]) == ["sad", "happy", "angry"]
    page.toggle[0].set_value(True).run()  # only wrong ones
    assert listed(page) == ["b.wav"]


def test_wrong_labels_are_told_and_cost_nothing(fake: FakeService) -> None:
    page = many(("a.wav", spoken("sad")), ("labels.csv", b"file,label\na.wav,bored\n"))
    assert "“bored”" in page.error[0].value
    assert listed(page) == ["a.wav"]


def test_the_model_is_told_with_figures_limits_and_law(fake: FakeService) -> None:
    fake.metrics = MODEL_FIGURES
    page = page_of("model")
    told = html(page) + "\n".join(text.value for text in page.markdown)
    assert "accuracy)</th><td>86 %</td>" in told
    weakest = r"Weakest class: fearful \(recall\)</th><td>70 %</td><td>\d+ to \d+</td><td>75 %</td><td>missed"
    assert re.search(weakest, told)
    for part in ("Recall by emotion", "What it confuses", "Article 5(1)(f)"):
        assert part in told
    assert [expander.label for expander in page.expander] == ["Data", "Limits"]
    assert page.table[0].value.to_numpy().tolist()[:2] == [["Address", "http://127.0.0.1:8000"], ["Status", "running"]]
    fake.up = False  # the law is told all the same
    page = page_of("model")
    assert any("Article 5(1)(f)" in text.value for text in page.markdown)
    assert ["Status", "not answering"] in page.table[0].value.to_numpy().tolist()


def test_an_adapted_model_is_told_with_the_figures_of_its_folds(fake: FakeService) -> None:
    """Folds without a common speaker say how it does with new voices."""
    for by, title in (("speaker", "New voices"), ("recording", "Voices it knows")):
        fake.metrics = {"training": {"adapted": {"folds_by": by}}, "out_of_fold": MODEL_FIGURES["test"]}
        told = html(page_of("model"))
        assert re.search(title + r'</h3><p class="figure">86 %</p>', told)
        assert told.count("not measured") == 1
        assert "Weakest class: fearful" in told
