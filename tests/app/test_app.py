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
    monkeypatch.setenv("SER_API_URL", "http://127.0.0.1:8000")
    monkeypatch.delenv("SER_API_SINCE", raising=False)
    service._client.clear()
    yield made
    service._client.clear()


def listen() -> AppTest:
    return AppTest.from_file(APP, default_timeout=60).run()


def many() -> AppTest:
    return AppTest.from_string("from app_pages import many\nmany.page()", default_timeout=60).run()


def model() -> AppTest:
    return AppTest.from_string("from app_pages import model\nmodel.page()", default_timeout=60).run()


def upload(page: AppTest, *recordings: tuple[str, bytes]) -> AppTest:
    return page.file_uploader[0].set_value([(name, data, "audio/wav") for name, data in recordings]).run()


def html(page: AppTest) -> str:
    return "\n".join(element.proto.body for element in page.html).replace("\u00a0", " ")


def charts(page: AppTest) -> list[Any]:
    return list(page.get("arrow_vega_lite_chart")) + list(page.get("vega_lite_chart"))


def press(page: AppTest, label: str) -> AppTest:
    (button,) = [button for button in page.button if button.label == label]
    return button.click().run()


def test_the_first_view_is_three_choices_and_no_answer(fake: FakeService) -> None:
    page = listen()
    assert not page.exception
    assert page.title[0].value == "What emotion does this voice convey?"
    assert [header.value for header in page.header] == ["Record", "Drop audio", "Live"]
    assert 'class="ser-answer"' not in html(page)
    assert not charts(page)
    assert fake.received == []
    assert "Do not use it to judge people" in html(page)
    page.pills[0].set_value("Anna, happy").run()
    assert "This voice sounds calm" in html(page)
    assert fake.received == ["anna_happy_train.ogg"]
    assert page.expander[0].label == "Another recording"


@pytest.mark.parametrize("key", ["", "correct horse battery staple"])
def test_live_gives_the_browser_a_ticket_and_never_the_key(
    fake: FakeService, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
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
    assert [header.value for header in page.header] == ["Record", "Drop audio", "Live"]


def test_an_upload_is_answered_in_words_with_all_classes(fake: FakeService) -> None:
    page = upload(listen(), ("a.wav", spoken("disgust", confidence=0.93)))
    told = html(page)
    assert "This voice sounds disgusted" in told
    assert "Almost certain: 93 %" in told
    for word in ("angry", "calm", "disgusted", "fearful", "happy", "neutral", "sad", "surprised"):
        assert f'<th scope="row">{word}</th>' in told
    assert "<strong>a.wav</strong>" in told


@pytest.mark.parametrize(
    ("duration_s", "told"),
    [
        (2.0, "all of it"),
        (3.5, "the shaded 2 s"),
        (6.5, "in parts of 2 s"),
    ],
)
def test_the_caption_says_how_much_is_heard(fake: FakeService, duration_s: float, told: str) -> None:
    page = upload(listen(), ("a.wav", spoken("sad", duration_s=duration_s)))
    assert [caption.value for caption in page.caption if told in caption.value]


def test_no_answer_is_made_up(fake: FakeService) -> None:
    page = upload(listen(), ("a.wav", spoken("sad", confidence=0.4)))
    assert "No clear answer. Closest: sad (40 %)" in html(page)


def test_file_names_are_text_and_nothing_else(fake: FakeService) -> None:
    page = upload(listen(), ("<img src=x onerror=alert(1)>.wav", spoken("sad")))
    assert "<img" not in html(page)
    assert "&lt;img" in html(page)
    page = upload(many(), ("![x](http://evil/x.png).wav", refused("empty_file")))
    assert page.table[0].value["File"][0] == r"\!\[x\](http\://evil/x.png).wav"


@pytest.mark.parametrize("code", ["not_audio", "something_new"])
def test_what_cannot_be_used_is_one_sentence(fake: FakeService, code: str) -> None:
    page = upload(listen(), ("a.wav", refused(code)))
    assert not page.exception
    assert len(page.error) == 1
    assert page.error[0].value.startswith("a.wav: ")
    assert page.error[0].value.count(".") == 2  # one of them in the name
    assert "<table" not in html(page)
    assert not charts(page)
    page = upload(page, ("b.wav", spoken("sad")))
    assert "sounds sad" in html(page)
    assert not page.error


def test_the_same_recording_is_asked_for_once(fake: FakeService) -> None:
    page = upload(listen(), ("a.wav", spoken("sad")))
    page.run()
    upload(page, ("again.wav", spoken("sad")))
    assert fake.received == ["a.wav"]


def test_a_voice_that_is_taken_back_is_gone(fake: FakeService) -> None:
    page = listen()
    page.audio_input[0].set_value(("audio.wav", spoken("happy"), "audio/wav")).run()
    assert "sounds happy" in html(page)
    page.audio_input[0].set_value(None).run()
    assert "sounds happy" not in html(page)
    assert [header.value for header in page.header] == ["Record", "Drop audio", "Live"]


def test_several_recordings_become_a_table(fake: FakeService) -> None:
    page = upload(listen(), ("a.wav", spoken("sad")), ("b.wav", spoken("angry")), ("l.csv", b"file,label\na.wav,sad\n"))
    assert not page.exception
    assert page.title[0].value == "Many recordings"
    assert list(page.dataframe[0].value["sounds"]) == ["sad", "angry"]
    assert "How many are right?" in [header.value for header in page.header]


def test_after_an_upload_there_is_room_for_the_next(fake: FakeService) -> None:
    page = upload(listen(), ("a.wav", spoken("sad")))
    assert not page.file_uploader[0].value
    page.run()
    assert "sounds sad" in html(page)


def test_the_microphone_records_what_the_model_needs(fake: FakeService) -> None:
    page = listen()
    assert page.audio_input[0].proto.sample_rate == 48_000
    assert "localhost" in " ".join(caption.value for caption in page.caption)
    page.audio_input[0].set_value(("audio.wav", spoken("happy"), "audio/wav")).run()
    assert "sounds happy" in html(page)
    assert fake.received[-1] == "Your voice.wav"


def test_what_mattered_is_shown_on_request(fake: FakeService) -> None:
    page = upload(listen(), ("a.wav", spoken("sad")))
    assert "/v1/explain" not in fake.asked
    page = press(page, "Show what mattered")
    assert "/v1/explain" in fake.asked
    assert any("amber" in text.value for text in page.markdown)
    page = upload(page, ("b.wav", spoken("angry")))
    assert not any("amber" in text.value for text in page.markdown)


def test_only_long_recordings_have_a_time_line(fake: FakeService) -> None:
    page = upload(listen(), ("short.wav", spoken("sad", duration_s=6.0, channels=2)))
    assert not page.dataframe
    assert len(charts(page)) == 3  # waveform and spectrogram of all of it, and the window enlarged
    page = upload(page, ("long.wav", spoken("sad", duration_s=10.0, channels=2)))
    assert len(charts(page)) == 2
    assert fake.received == ["short.wav", "long.wav"]
    table = page.dataframe[0].value
    assert list(table["lane"]) == ["Left"] * 5 + ["Right"] * 5
    assert list(table["from"])[:2] == ["0:00.0", "0:02.0"]
    assert "Sounds sad for 100 % of the time" in html(page)


def test_a_service_that_is_away_is_told_with_the_remedy_and_waited_for(fake: FakeService) -> None:
    fake.up = False
    page = upload(listen(), ("a.wav", spoken("happy")))
    assert not page.exception
    assert "does not answer at http://127.0.0.1:8000" in page.warning[0].value
    page = upload(page, ("a.wav", spoken("sad")))
    fake.up = True
    page.run()  # as the page does itself as soon as the service is ready
    assert "sounds sad" in html(page)
    assert not page.warning


def test_a_service_that_starts_is_waited_for_with_the_seconds(
    fake: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SER_API_SINCE", str(time.time() - 9.2))
    fake.up = False
    page = listen()
    assert not page.info  # nobody has to wait yet
    page.pills[0].set_value("Anna, calm").run()
    (told,) = [info.value for info in page.info]
    assert 9 <= int(told.removeprefix("The model is starting … ").removesuffix(" s")) < 60
    assert not page.warning
    fake.up = True
    assert "sounds calm" in html(page.run())
    fake.up = False
    monkeypatch.setenv("SER_API_SINCE", str(time.time() - 3600))  # it ran, and has gone
    assert "does not answer" in upload(page, ("a.wav", spoken("sad"))).warning[0].value


def test_without_an_address_the_page_starts_the_service_itself_once_and_again_where_it_ended(
    fake: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    page = upload(listen(), ("a.wav", spoken("sad")))
    upload(listen(), ("b.wav", spoken("sad")))
    (child,) = started
    assert page.info[0].value.startswith("The model is starting … ")
    assert service.address().startswith("http://127.0.0.1:")
    assert child.poll() is None
    child.stdin.close()  # type: ignore[union-attr]  # as when the page ends
    assert child.wait(60) == 0
    page.run()
    assert "could not be started" in page.error[0].value
    page = press(page, "Start it again")
    assert len(started) == 2
    assert page.info[0].value.startswith("The model is starting … ")
    started[1].communicate(timeout=60)


def test_looking_again_draws_the_page_anew_only_when_the_service_is_ready(
    fake: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
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
        assert (f"This voice sounds {word}" if sure[-1] else f"No clear answer. Closest: {word} ({share})") in html(
            page
        )
        assert share in html(page)
    assert any(sure)


@pytest.mark.parametrize(
    ("status", "words"),
    [(429, "busy"), (401, "SER_API_KEY"), (500, "Told of overloaded.")],
)
def test_every_trouble_has_its_sentence(fake: FakeService, status: int, words: str) -> None:
    fake.status = status
    page = upload(listen(), ("a.wav", spoken("sad")))
    assert not page.exception
    assert words in " ".join(element.value for element in [*page.error, *page.warning])
    assert "Traceback" not in html(page)


def test_our_own_mistakes_show_no_traceback(fake: FakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app_pages.bars.scores_html", lambda answer: 1 / 0)
    page = upload(listen(), ("a.wav", spoken("sad")))
    assert not page.exception
    assert "Something went wrong" in page.error[0].value
    assert "Do not use it to judge people" in html(page)


def test_address_and_key_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[str, str | None]] = []
    monkeypatch.setattr(service, "Client", lambda url, key, patience_s: given.append((url, key)))
    monkeypatch.setenv("SER_API_URL", "http://elsewhere:9/")
    monkeypatch.setenv("SER_API_KEY", "secret")
    service._client.clear()
    service.client()
    service._client.clear()
    assert given == [("http://elsewhere:9", "secret")]


def test_many_become_a_table_with_failures_and_reasons(fake: FakeService) -> None:
    page = upload(
        many(),
        ("a.wav", spoken("sad")),
        ("b.wav", spoken("happy", confidence=0.3)),
        ("c.wav", refused("empty_file")),
    )
    assert not page.exception
    assert page.header[0].value == "2 answered, 1 could not be used"
    table = page.dataframe[0].value
    assert list(table["file"]) == ["a.wav", "b.wav"]
    assert list(table["sounds"]) == ["sad", "not sure (happy?)"]
    assert list(table["confidence"]) == pytest.approx([80, 30])
    assert page.table[0].value.to_numpy().tolist() == [["c.wav", "This file is empty."]]


def test_many_can_be_found_filtered_and_sorted(fake: FakeService) -> None:
    files = [("cat.wav", "sad", 0.6), ("dog.wav", "happy", 0.9), ("cow.wav", "sad", 0.7)]
    page = upload(many(), *[(name, spoken(label, confidence=p)) for name, label, p in files])

    def shown() -> list[str]:
        return list(page.dataframe[0].value["file"])

    page.selectbox[0].set_value("Least sure first").run()
    assert shown() == ["cat.wav", "cow.wav", "dog.wav"]
    page.pills[0].set_value(["sad"]).run()
    assert shown() == ["cat.wav", "cow.wav"]
    page.text_input[0].set_value("OW").run()
    assert shown() == ["cow.wav"]


def test_the_same_file_twice_is_in_the_list_once(fake: FakeService) -> None:
    page = upload(many(), ("a.wav", spoken("sad")), ("a.wav", spoken("sad")))
    assert "1 of these recordings was in the list already" in page.info[0].value
    page = upload(page, ("a.wav", spoken("sad")), ("a.wav", spoken("sad", take=2)))
    assert list(page.dataframe[0].value["file"]) == ["a.wav", "a.wav"]
    assert len(fake.received) == 2


def test_what_was_answered_survives_a_service_that_goes_away(fake: FakeService) -> None:
    fake.after = 16  # the client sends 16 recordings a request
    files = [(f"{i:02d}.wav", spoken("sad", take=i)) for i in range(20)]
    page = upload(many(), *files)
    assert "does not answer" in page.warning[0].value
    fake.after = 10**9
    page.run()
    assert not page.warning
    assert list(page.dataframe[0].value["file"]) == [name for name, _ in files]
    assert fake.received == [name for name, _ in files]


def test_labels_beside_the_recordings_give_a_verdict(fake: FakeService) -> None:
    labels = b"speech,label\nsome/folder/a.wav,sad\nb.wav,happiness\nc.wav,0\nd.wav,calm\n"
    page = upload(
        many(),
        ("a.wav", spoken("sad")),
        ("b.wav", spoken("sad", take=2)),
        ("c.wav", spoken("angry")),
        ("d.wav", refused("not_audio")),
        ("labels.csv", labels),
    )
    assert not page.exception
    assert "Right answers (accuracy)</th><td>67 %</td><td>21 to 94</td><td>80 %</td><td>missed" in html(page)
    assert "Weakest class: happy (recall)</th><td>0 %" in html(page)
    assert any("Not all targets are met" in text.value for text in page.markdown)
    assert any("1 more could not be used" in caption.value for caption in page.caption)
    assert list(page.dataframe[0].value["label"]) == ["sad", "happy", "angry"]
    page.toggle[0].set_value(True).run()  # only wrong ones
    assert list(page.dataframe[0].value["file"]) == ["b.wav"]


def test_wrong_labels_are_told_and_cost_nothing(fake: FakeService) -> None:
    page = upload(many(), ("a.wav", spoken("sad")), ("labels.csv", b"file,label\na.wav,bored\n"))
    assert "“bored”" in page.error[0].value
    assert list(page.dataframe[0].value["file"]) == ["a.wav"]


def test_the_list_can_be_cleared(fake: FakeService) -> None:
    page = upload(many(), ("a.wav", spoken("sad")))
    page = press(page, "Clear the list")
    assert not page.dataframe
    page = press(page, "Use the examples")
    assert len(page.dataframe[0].value) == len(examples()) == 12


def test_the_model_is_told_with_figures_limits_and_law(fake: FakeService) -> None:
    fake.metrics = MODEL_FIGURES
    page = model()
    told = html(page) + "\n".join(text.value for text in page.markdown)
    assert "accuracy)</th><td>86 %</td>" in told
    assert re.search(
        r"Weakest class: fearful \(recall\)</th><td>70 %</td><td>\d+ to \d+</td><td>75 %</td><td>missed", told
    )
    assert "Recall by emotion" in told
    assert "What it confuses" in told
    assert "Article 5(1)(f)" in told
    assert [expander.label for expander in page.expander] == ["Data", "Limits"]
    assert page.table[0].value.to_numpy().tolist()[:2] == [["Address", "http://127.0.0.1:8000"], ["Status", "running"]]


def test_an_adapted_model_is_told_with_the_figures_of_its_folds(fake: FakeService) -> None:
    """Folds without a common speaker say how it does with new voices."""
    for by, title in (("speaker", "New voices"), ("recording", "Voices it knows")):
        fake.metrics = {"training": {"adapted": {"folds_by": by}}, "out_of_fold": MODEL_FIGURES["test"]}
        told = html(model())
        assert re.search(title + r'</h3><p class="figure">86 %</p>', told)
        assert told.count("not measured") == 1
        assert "Weakest class: fearful" in told


def test_the_law_is_told_even_when_the_service_is_away(fake: FakeService) -> None:
    fake.up = False
    page = model()
    assert any("Article 5(1)(f)" in text.value for text in page.markdown)
    assert ["Status", "not answering"] in page.table[0].value.to_numpy().tolist()
