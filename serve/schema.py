"""Request options, responses and errors of the HTTP service as pydantic models, and the checks of the API key.

Service, client and page share this module. It needs pydantic only: no numpy, no torch, no Ray. Units are in the names:
``_s`` seconds, ``_hz`` hertz, ``_dbfs`` dB relative to full scale. Times count from the start of the recording. Fields
are only ever added, never renamed.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

API_KEY_VARIABLE = "SER_API_KEY"
CHANNELS_PATTERN = r"^(mix|each|[0-7])$"


def _form_bool(text: object) -> object:
    """Text of a form field -> bool for ``true`` and ``false``; "", which is no valid bool, for any other text."""
    return {"true": True, "false": False}.get(text, "") if isinstance(text, str) else text


Confidence = Annotated[
    Annotated[float, Field(ge=0, le=1)] | None,
    Field(description="probability of the most probable class; null for silence and not_speech"),
]
Familiarity = Annotated[
    float | None,
    Field(description="similarity to the training recordings, 0 to 1; null where the model cannot measure it"),
]
ModelName = Annotated[
    str | None, Field(max_length=100, description="one of models in GET /v1/model; default: the first")
]
FormBool = Annotated[bool, BeforeValidator(_form_bool)]


class Wire(BaseModel):
    """Base class of all responses. An older client ignores fields that a newer service added."""

    model_config = ConfigDict(frozen=True)


class FieldError(Wire):
    """One wrong field of a request, and what is wrong with it."""

    field: str
    message: str


class Problem(Wire):
    """An error as an RFC 9457 problem document. ``code`` is stable: programs use it, people read ``detail``."""

    type: str = Field(description="urn:ser:problem:CODE")
    title: str = Field(description="the kind of problem; the same for every occurrence of its code")
    status: int = Field(ge=400, le=599, description="the HTTP status")
    code: str = Field(description="identifier of the problem, in snake_case; it never changes")
    detail: str = Field(description="one line: what was found, what is accepted, the remedy")
    request_id: str | None = Field(default=None, description="the request's id, as in the header X-Request-ID")
    errors: list[FieldError] | None = Field(default=None, description="the wrong fields of the request")


class Score(Wire):
    """A class and its probability."""

    label: str
    score: float = Field(ge=0, le=1)


class Segment(Wire):
    """The answer for one window of one channel."""

    channel: str = Field(description="mix, or the channel's number, counted from 0")
    start_s: float
    end_s: float
    label: str = Field(description="a class, or uncertain, silence, not_speech")
    confidence: Confidence = None
    scores: list[Score] = Field(description="most probable first; empty for silence and not_speech")
    familiarity: Familiarity = None
    level_dbfs: float = Field(description="RMS level")


class Waveform(Wire):
    """Outline of a waveform, all channels mixed: the lowest and highest sample of each of n equal parts."""

    start_s: float
    end_s: float
    low: list[float]
    high: list[float]


class Picture(Wire):
    """The log-mel spectrogram of the model's input window, and an overview of the recording around it."""

    waveform: Waveform
    window_start_s: float = Field(description="start of the input window; its part outside the recording is padding")
    window_s: float = Field(description="length of the input window")
    frequency_hz: list[float] = Field(description="centres of the mel bands, ascending")
    time_s: list[float] = Field(description="centres of the frames")
    level_db: list[list[float]] = Field(
        description="bands x frames of the input window, dB relative to the loudest value; row 0 is the lowest band"
    )
    overview_db: list[list[float]] | None = Field(
        default=None,
        description="bands x columns of equal length, over the time of waveform; dB relative to its loudest value",
    )


class Recording(Wire):
    """The answer for one recording that could be analysed."""

    status: Literal["ok"] = "ok"
    name: str | None = Field(description="the file name as sent")
    label: str = Field(description="a class, or uncertain, silence, not_speech")
    confidence: Confidence = None
    scores: list[Score] = Field(
        description="most probable first, at most top_k entries; empty for silence and not_speech"
    )
    duration_s: float = Field(description="length of the recording")
    scored_s: float = Field(description="length of the part that was analysed; silent windows do not count")
    sample_rate_hz: int = Field(description="of the file")
    channels: int = Field(description="number of channels in the file")
    familiarity: Familiarity = None
    speech_share: float | None = Field(
        default=None, description="share of the window that may be speech, 0 to 1; of several windows, the largest"
    )
    level_dbfs: float = Field(description="RMS level of the window; of several windows, the loudest")
    notice: str | None = Field(default=None, description="a remark on how the recording was read, if there is one")
    segments: list[Segment] | None = Field(
        default=None, description="one answer per window, where the whole recording was analysed"
    )
    picture: Picture | None = Field(default=None, description="only where the option picture is true")


class Failure(Wire):
    """The answer for one recording, among several, that could not be used."""

    status: Literal["failed"] = "failed"
    name: str | None
    problem: Problem


FileAnswer = Annotated[Recording | Failure, Field(discriminator="status")]


class Prediction(Wire):
    """Response of ``POST /v1/predict``."""

    id: str = Field(description="the request's id, as in the header X-Request-ID")
    model: str
    version: str = Field(description="first 12 digits of the sha256 of the model's weights")
    files: list[FileAnswer] = Field(description="one entry per file, in the order sent")


class Explanation(Wire):
    """Response of ``POST /v1/explain``: how much each cell of the spectrogram supports the predicted class."""

    id: str
    model: str
    version: str
    label: str = Field(description="the most probable class")
    confidence: float
    scores: list[Score]
    time_s: list[float] = Field(description="edges of the cells in time, ascending: columns + 1")
    frequency_hz: list[float] = Field(description="edges of the cells in frequency, ascending: rows + 1")
    importance: list[list[float]] = Field(
        description="rows x columns, row 0 lowest: by how much the log-odds of the label fall when the cell is masked"
    )
    picture: Picture


class ModelInfo(Wire):
    """Response of ``GET /v1/model``."""

    name: str
    version: str
    labels: list[str] = Field(description="the classes, in the order of the model's outputs")
    other_answers: dict[str, str] = Field(
        default_factory=dict,
        description="values of label that are not classes, and when each is given: uncertain, silence, not_speech",
    )
    features: dict[str, Any] = Field(description="the model's input: window, sample rate, spectrogram settings")
    crops: int = Field(description="windows taken from a recording; their probabilities are pooled")
    metrics: dict[str, Any] = Field(description="measured figures; each block says which training data it is for")
    card: str = Field(description="the model card, Markdown")
    models: list[str] = Field(description="names of all models of this service; the first is the default")
    limits: dict[str, float] = Field(description="the limits of a request")


class StreamReady(Wire):
    """First message of ``WS /v1/stream``: the service now accepts sound."""

    type: Literal["ready"] = "ready"
    id: str
    model: str
    version: str
    labels: list[str] = Field(description="the classes, in the order of the model's outputs")
    window_s: float
    hop_s: float
    limits: dict[str, float]


class StreamSegment(Segment):
    """Consecutive windows with the same label; where two segments overlap, the border is in the middle."""

    final: bool = Field(description="true once the segment no longer changes; the last one grows while its label holds")
    windows: int = Field(description="number of windows that were pooled")


class StreamAnswer(Wire):
    """A message of ``WS /v1/stream``; there is one per window."""

    type: Literal["answer"] = "answer"
    window: Segment = Field(description="the newest window alone")
    segments: list[StreamSegment] = Field(
        description="the segments that this window changes: the one that it ends, if any, and the last one"
    )
    received_s: float = Field(description="length of the sound received so far")
    lag_s: float = Field(description="time from the arrival of the window's last sound to this message")
    skipped: int = Field(description="windows skipped so far because the service or the connection was too slow")


class StreamDone(Wire):
    """Last message of ``WS /v1/stream`` after ``{"type": "end"}``."""

    type: Literal["done"] = "done"
    segments: list[StreamSegment] = Field(description="the last segment, now final; empty where no window was answered")
    duration_s: float = Field(description="length of the sound received")
    windows: int = Field(description="windows answered")
    skipped: int = Field(description="windows skipped")


class StreamError(Wire):
    """Last message of ``WS /v1/stream`` after an error; the close code is 4000 plus the problem's status."""

    type: Literal["error"] = "error"
    problem: Problem


class Live(Wire):
    """Response of ``GET /v2/health/live``."""

    live: bool


class Ready(Wire):
    """Response of ``GET /v2/health/ready`` and ``GET /v2/models/NAME/ready``."""

    ready: bool


class Tensor(Wire):
    """Name, type and shape of a model's input or output; -1 means any size."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(Wire):
    """Response of ``GET /v2/models/NAME``, as the Open Inference Protocol defines it."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[Tensor]
    outputs: list[Tensor]


_LENGTH, _MIDDLE = "a length", "a word"
WindowLength = Annotated[
    Annotated[float, Field(ge=0.1, allow_inf_nan=False), Tag(_LENGTH)] | Annotated[Literal["middle"], Tag(_MIDDLE)],
    Discriminator(lambda value: _MIDDLE if value == "middle" else _LENGTH),
]


class Options(BaseModel):
    """The form fields of ``POST /v1/predict`` beside ``file``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    window_s: WindowLength | None = Field(
        default=None,
        description="analyse the whole recording in windows of this length, at most the model's own; middle: analyse "
        "only the model's one window (the middle, or the part with most speech) or its crops; default: middle for "
        "recordings up to 6 s, the whole recording in the model's windows for longer ones",
    )
    hop_s: float | None = Field(
        default=None,
        ge=0.01,
        allow_inf_nan=False,
        description="time from the start of one window to the next; default: the window's length. Without window_s, "
        "the whole recording is analysed in windows of the model's length",
    )
    channels: Annotated[str, Field(pattern=CHANNELS_PATTERN)] | None = Field(
        default=None,
        description="mix, a channel's number from 0, or each (all channels one by one, over the whole recording); "
        "default: mix, but each where a recording over 6 s is analysed in full and its channels differ",
    )
    top_k: int | None = Field(default=None, ge=1, description="number of classes in scores; default: all")
    min_confidence: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="answers with a lower confidence are labelled uncertain; above 0, so are recordings unlike the "
        "training recordings",
    )
    picture: FormBool = Field(default=False, description="add the waveform and the model's log-mel spectrogram")
    model: ModelName = None


class ExplainOptions(BaseModel):
    """The form fields of ``POST /v1/explain`` beside ``file``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    channels: str = Field(
        default="mix", pattern=r"^(mix|[0-7])$", description="mix, or a channel's number counted from 0"
    )
    model: ModelName = None


class StreamOptions(BaseModel):
    """Options of ``WS /v1/stream``: query parameters of its URL, or if there are none, fields of its first message."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["s16le", "f32le", "webm"] = Field(
        description="s16le, f32le: raw samples, little-endian, channels interleaved; webm: WebM with Opus, as a "
        "browser's MediaRecorder writes it"
    )
    sample_rate_hz: int | None = Field(
        default=None, ge=4_000, le=192_000, description="of raw samples, which need it; not allowed for webm"
    )
    channels: int = Field(default=1, ge=1, le=2, description="of raw samples; the model analyses their mix")
    hop_s: float = Field(
        default=0.5, ge=0.25, le=10, allow_inf_nan=False, description="time from one answer to the next"
    )
    top_k: int | None = Field(default=None, ge=1, description="number of classes in scores; default: all")
    min_confidence: float = Field(default=0.0, ge=0, le=1, description="as of POST /v1/predict")
    model: ModelName = None

    @model_validator(mode="after")
    def _complete(self) -> StreamOptions:
        if (self.sample_rate_hz is None) != (self.format == "webm"):
            raise ValueError("give sample_rate_hz with s16le and f32le, and leave it out with webm, which contains it")
        return self


class TaskParameters(BaseModel):
    """Field ``parameters`` of the audio-classification task."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    top_k: int | None = Field(default=None, ge=1, description="number of classes; default: all")
    function_to_apply: Literal["softmax"] | None = Field(
        default=None, description="only softmax; the scores are always calibrated probabilities"
    )


class TaskInput(BaseModel):
    """JSON body of ``POST /v1/audio-classification``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    inputs: str = Field(
        description="the recording's bytes in base64", min_length=4, json_schema_extra={"format": "byte"}
    )
    parameters: TaskParameters | None = None


def checked_key(text: str | None) -> str | None:
    """An API key without the white space around it, such as a line end from a file; None if nothing is left.

    Raises:
        ValueError: the key has characters other than printable ASCII, which HTTP headers cannot carry reliably.
    """
    key = (text or "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError(
            f"the API key ({API_KEY_VARIABLE}) has characters that are not printable ASCII, which an HTTP header "
            "cannot carry; make another key: openssl rand -hex 32"
        )
    return key or None


def key_digest(key: str) -> str:
    """sha256 of an API key, hexadecimal."""
    return hashlib.sha256(key.encode()).hexdigest()


STREAM_PROTOCOL = "ser.v1"
_TICKET = "ser.ticket."


def stream_ticket(digest: str, until: float) -> str:
    """A WebSocket subprotocol that gives access to streams, and to nothing else, until ``until`` (``time.time``).

    It is for web pages, which cannot send the header and must not hold the key. The holder of the key makes tickets
    from the key's ``digest``.
    """
    moment = str(int(until))
    proof = hmac.new(digest.encode(), f"stream {moment}".encode(), hashlib.sha256).hexdigest()
    return f"{_TICKET}{moment}.{proof}"


def is_stream_ticket(given: str, digest: str, now: float) -> bool:
    """Whether ``stream_ticket`` made ``given`` from this key's digest, and it has not expired at ``now``."""
    moment = given.removeprefix(_TICKET).partition(".")[0]
    if not (given.startswith(_TICKET) and moment.isascii() and moment.isdecimal() and len(moment) < 15):
        return False
    return int(moment) >= now and hmac.compare_digest(stream_ticket(digest, int(moment)).encode(), given.encode())
