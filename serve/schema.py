"""What goes over the wire: answers and problems as pydantic models, and the API key; for service, client and page.

Needs pydantic only: no numpy, no torch, no Ray. Units are in the names (``_s`` seconds, ``_hz`` hertz, ``_dbfs`` dB
over full scale); times count from the start of the recording. Fields are only ever added, never renamed.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

API_KEY_VARIABLE = "SER_API_KEY"
CHANNELS_PATTERN = r"^(mix|each|[0-7])$"


def _form_bool(text: object) -> object:
    """The two spellings that a form's boolean has."""
    return {"true": True, "false": False}.get(text, "") if isinstance(text, str) else text


Confidence = Annotated[float, Field(ge=0, le=1)] | None
FormBool = Annotated[bool, BeforeValidator(_form_bool)]


class Wire(BaseModel):
    """A message. Fields that a newer service added are ignored by an older client."""

    model_config = ConfigDict(frozen=True)


class FieldError(Wire):
    """One field of a request that is wrong."""

    field: str
    message: str


class Problem(Wire):
    """An error, RFC 9457. ``code`` is stable: programs decide by it, people read ``detail``."""

    type: str = Field(description="urn:ser:problem:CODE")
    title: str = Field(description="the kind of problem, the same for every occurrence")
    status: int = Field(ge=400, le=599, description="the HTTP status")
    code: str = Field(description="stable, snake_case")
    detail: str = Field(description="one sentence: what was got, what is accepted, the remedy")
    request_id: str | None = Field(default=None, description="as in the header X-Request-ID")
    errors: list[FieldError] | None = Field(default=None, description="the fields that are wrong")


class Score(Wire):
    """A class and its probability."""

    label: str
    score: float = Field(ge=0, le=1)


class Segment(Wire):
    """One window of one channel."""

    channel: str = Field(description="mix, or the channel's number from 0")
    start_s: float
    end_s: float
    label: str = Field(description="the class, or uncertain, silence, not_speech")
    confidence: Confidence = Field(
        default=None, description="probability of the most probable class; none of silence and not_speech"
    )
    scores: list[Score] = Field(description="most probable first; none of silence and not_speech")
    familiarity: float | None = Field(
        default=None, description="how like the training recordings it is, 0 to 1; null where the model does not know"
    )
    level_dbfs: float


class Waveform(Wire):
    """Outline of a recording's sound, all of it, channels mixed: lowest and highest sample of each of n equal parts."""

    start_s: float
    end_s: float
    low: list[float]
    high: list[float]


class Picture(Wire):
    """What the model sees, with the recording around it."""

    waveform: Waveform
    window_start_s: float = Field(description="start of the model's window; what lies outside the recording is padding")
    window_s: float
    frequency_hz: list[float] = Field(description="centres of the mel bands, ascending")
    time_s: list[float] = Field(description="centres of the frames")
    level_db: list[list[float]] = Field(description="bands x frames, dB below the loudest; row 0 is the lowest band")
    overview_db: list[list[float]] | None = Field(
        default=None, description="bands x columns of equal length, of what the waveform outlines: dB below its loudest"
    )


class Recording(Wire):
    """The answer for one recording that could be used."""

    status: Literal["ok"] = "ok"
    name: str | None = Field(description="its file name as sent")
    label: str = Field(description="the class, or uncertain, silence, not_speech")
    confidence: Confidence = Field(
        default=None, description="probability of the most probable class; none of silence and not_speech"
    )
    scores: list[Score] = Field(description="most probable first, top_k of them; none of silence and not_speech")
    duration_s: float
    scored_s: float = Field(description="how much of it was heard")
    sample_rate_hz: int
    channels: int
    familiarity: float | None = Field(
        default=None, description="how like the training recordings it is, 0 to 1; null where the model does not know"
    )
    speech_share: float | None = Field(default=None, description="share of the time that may be speech, 0 to 1")
    level_dbfs: float = Field(description="RMS level of what was heard, of its loudest window")
    notice: str | None = Field(default=None, description="what to know of how it was read, a sentence")
    segments: list[Segment] | None = Field(default=None, description="its windows, where all of it was heard")
    picture: Picture | None = Field(default=None, description="when it was asked for")


class Failure(Wire):
    """The answer for one recording, of several, that could not be used."""

    status: Literal["failed"] = "failed"
    name: str | None
    problem: Problem


FileAnswer = Annotated[Recording | Failure, Field(discriminator="status")]


class Prediction(Wire):
    """Answer of ``POST /v1/predict``: one entry a file, in the order sent."""

    id: str = Field(description="the request's id, as in the header X-Request-ID")
    model: str
    version: str = Field(description="first 12 digits of the sha256 of the model's weights")
    files: list[FileAnswer]


class Explanation(Wire):
    """Answer of ``POST /v1/explain``: how much each patch of the picture speaks for the predicted class."""

    id: str
    model: str
    version: str
    label: str
    confidence: float
    scores: list[Score]
    time_s: list[float] = Field(description="edges of the cells in time, ascending: columns + 1")
    frequency_hz: list[float] = Field(description="edges of the cells in frequency, ascending: rows + 1")
    importance: list[list[float]] = Field(
        description="rows x columns, row 0 lowest: fall of the log-odds of the label when the cell is hidden"
    )
    picture: Picture


class ModelInfo(Wire):
    """Answer of ``GET /v1/model``."""

    name: str
    version: str
    labels: list[str] = Field(description="in index order")
    other_answers: dict[str, str] = Field(
        default_factory=dict, description="what a label may be besides, and when: uncertain, silence, not_speech"
    )
    features: dict[str, Any] = Field(description="what the model hears: window, rate, analysis")
    crops: int = Field(description="windows a recording, pooled")
    metrics: dict[str, Any] = Field(description="measured figures; each block says what it was trained on")
    card: str = Field(description="the model card, Markdown")
    models: list[str] = Field(description="names of all models that this service has; the first is the default")
    limits: dict[str, float] = Field(description="what a request may hold")


class StreamReady(Wire):
    """First message of ``WS /v1/stream``: sound is taken from now on."""

    type: Literal["ready"] = "ready"
    id: str
    model: str
    version: str
    labels: list[str] = Field(description="in index order")
    window_s: float
    hop_s: float
    limits: dict[str, float]


class StreamSegment(Segment):
    """Windows of one label, one after the other; where two segments overlap, the border is in the middle."""

    final: bool = Field(description="whether it stays as it is; the last one goes on while its label does")
    windows: int = Field(description="how many were pooled in it")


class StreamAnswer(Wire):
    """A message of ``WS /v1/stream``, one a window."""

    type: Literal["answer"] = "answer"
    window: Segment = Field(description="the newest window, by itself")
    segments: list[StreamSegment] = Field(description="what it changes: the one that it ends, if any, and the last one")
    received_s: float = Field(description="sound that had come when this was sent")
    lag_s: float = Field(description="from when the window's sound was here to this message")
    skipped: int = Field(description="windows left out so far, for the service or the line was too slow for them")


class StreamDone(Wire):
    """Last message of ``WS /v1/stream`` after ``{"type": "end"}``."""

    type: Literal["done"] = "done"
    segments: list[StreamSegment] = Field(description="the last one, final; none where nothing was heard")
    duration_s: float
    windows: int
    skipped: int


class StreamError(Wire):
    """Last message of ``WS /v1/stream`` when it ends with an error; the close code is 4000 and the problem's status."""

    type: Literal["error"] = "error"
    problem: Problem


class Live(Wire):
    """Answer of ``GET /v2/health/live``."""

    live: bool


class Ready(Wire):
    """Answer of ``GET /v2/health/ready`` and ``GET /v2/models/NAME/ready``."""

    ready: bool


class Tensor(Wire):
    """Name, type and shape of a model's input or output; -1 is any."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(Wire):
    """Answer of ``GET /v2/models/NAME``, as the Open Inference Protocol has it."""

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
        description="hear all of the recording in windows of this length, at most the model's own; middle: one window "
        "(its middle, or that with most speech, as the model is), or the model's crops; default: middle up to 6 s, "
        "all of it in the model's windows beyond",
    )
    hop_s: float | None = Field(
        default=None,
        ge=0.01,
        allow_inf_nan=False,
        description="from one window to the next; default: the window's length. Alone it implies the model's window",
    )
    channels: Annotated[str, Field(pattern=CHANNELS_PATTERN)] | None = Field(
        default=None,
        description="mix, a channel's number from 0, or each (which implies windows); default: mix, and each where a "
        "recording of more than 6 s is heard in full and its channels differ",
    )
    top_k: int | None = Field(default=None, ge=1, description="so many classes in scores; default: all")
    min_confidence: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="answers below it, and to recordings unlike the training's, are called uncertain",
    )
    picture: FormBool = Field(default=False, description="add waveform and log-mel picture of what the model sees")
    model: str | None = Field(default=None, max_length=100, description="a name of GET /v1/model; default: its first")


class ExplainOptions(BaseModel):
    """The form fields of ``POST /v1/explain`` beside ``file``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    channels: str = Field(
        default="mix", pattern=r"^(mix|[0-7])$", description="mix, or a channel's number counted from 0"
    )
    model: str | None = Field(default=None, max_length=100, description="a name of GET /v1/model; default: its first")


class StreamOptions(BaseModel):
    """Parameters of the address of ``WS /v1/stream``, or of its first message."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["s16le", "f32le", "webm"] = Field(
        description="raw samples, little-endian, channels interleaved; or WebM with Opus, as MediaRecorder gives it"
    )
    sample_rate_hz: int | None = Field(default=None, ge=4_000, le=192_000, description="of raw samples")
    channels: int = Field(default=1, ge=1, le=2, description="of raw samples; their mix is heard")
    hop_s: float = Field(default=0.5, ge=0.25, le=10, allow_inf_nan=False, description="from one answer to the next")
    top_k: int | None = Field(default=None, ge=1, description="so many classes in scores; default: all")
    min_confidence: float = Field(default=0.0, ge=0, le=1, description="as of POST /v1/predict")
    model: str | None = Field(default=None, max_length=100, description="a name of GET /v1/model; default: its first")

    @model_validator(mode="after")
    def _complete(self) -> StreamOptions:
        if (self.sample_rate_hz is None) != (self.format == "webm"):
            raise ValueError("sample_rate_hz belongs to s16le and f32le, which need it; webm says its own")
        return self


class TaskParameters(BaseModel):
    """``parameters`` of the audio-classification task."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    top_k: int | None = Field(default=None, ge=1, description="so many classes; default: all")
    function_to_apply: Literal["softmax"] | None = Field(default=None, description="only softmax: calibrated")


class TaskInput(BaseModel):
    """``POST /v1/audio-classification`` as JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    inputs: str = Field(description="the recording, base64", min_length=4, json_schema_extra={"format": "byte"})
    parameters: TaskParameters | None = None


def checked_key(text: str | None) -> str | None:
    """A key without the white space around it, such as the line's end of a file; None where nothing is left.

    Raises:
        ValueError: characters that a header of HTTP cannot carry the same way everywhere.
    """
    key = (text or "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError(
            f"the API key ({API_KEY_VARIABLE}) holds characters that are no printable ASCII, which an HTTP header "
            "cannot carry; take another one: openssl rand -hex 32"
        )
    return key or None


def key_digest(key: str) -> str:
    """sha256 of an API key, hexadecimal."""
    return hashlib.sha256(key.encode()).hexdigest()


STREAM_PROTOCOL = "ser.v1"
_TICKET = "ser.ticket."


def stream_ticket(digest: str, until: float) -> str:
    """A WebSocket subprotocol that opens streams, and nothing else, until a moment (``time.time``).

    For pages, which can send no header, and must not hold the key: whoever has the key makes tickets of its ``digest``.
    """
    moment = str(int(until))
    proof = hmac.new(digest.encode(), f"stream {moment}".encode(), hashlib.sha256).hexdigest()
    return f"{_TICKET}{moment}.{proof}"


def is_stream_ticket(given: str, digest: str, now: float) -> bool:
    """Whether ``stream_ticket`` made it of this key, and it is still good."""
    moment = given.removeprefix(_TICKET).partition(".")[0]
    if not (given.startswith(_TICKET) and moment.isascii() and moment.isdecimal() and len(moment) < 15):
        return False
    return int(moment) >= now and hmac.compare_digest(stream_ticket(digest, int(moment)).encode(), given.encode())
