"""The errors that a user's input can cause, as one class tree; and the limits of a recording.

A class with a prefix is in the module of that name.

    SerError
    ├── labels.LabelError           a label is not a class, or class names are invalid
    ├── features.FeatureError       samples or settings do not fit a FeatureConfig
    ├── tables.ManifestError        a folder, CSV or table cannot be used as a manifest
    ├── store.ShardError            a feature folder is incomplete, damaged or of another configuration
    ├── bundle.BundleError          a model bundle is missing, damaged or unknown
    ├── backends.ExportError, download.DownloadError, download.ArchiveError, engine.NodeError,
    │   ledger.LedgerError, loop.DivergedError, submit.ClusterError
    └── AudioError                  one recording cannot be used; its subclasses are below

`code` never changes: it is written into tables (`status`) and HTTP responses (`code`). `ERRORS` maps code to class.
"""

# ruff: noqa: D101 - a comment describes each class

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


class SerError(Exception):
    """An input or setting cannot be used; the message is one line: what was found, what was expected, the remedy.

    Jobs print it without a traceback and exit with code 2.
    """


class SerWarning(UserWarning):
    """A warning for the user: one line, with the remedy. Jobs print it as a warning."""


class AudioError(SerError):
    """A recording cannot be used; the message is one line: what was found, what is accepted, the remedy."""

    code: ClassVar[str] = "audio_error"


class NotFound(AudioError):  # no such path
    code = "not_found"


class NotFetched(AudioError):  # a URL of the web or of a store that is not read here
    code = "not_fetched"


class NotAFile(AudioError):  # directory, pipe, socket, device
    code = "not_a_file"


class PermissionDenied(AudioError):
    code = "permission_denied"


class Unreadable(AudioError):  # the operating system failed to open or read it
    code = "unreadable"


class EmptyFile(AudioError):  # 0 bytes
    code = "empty_file"


class NotAudio(AudioError):  # no audio container known here, or no audio track in it
    code = "not_audio"


class UnsupportedFormat(AudioError):  # a known container with a codec that is not accepted
    code = "unsupported_format"


class ExtraNeeded(UnsupportedFormat):  # decodable once PyAV is installed
    code = "extra_needed"


class Corrupt(AudioError):  # the header is impossible, or the audio data cannot be decoded
    code = "corrupt"


class Truncated(Corrupt):  # the recording says it is longer than it is
    code = "truncated"


class NoSamples(AudioError):  # a valid recording of 0 frames, or a part past its end
    code = "no_samples"


class TooShort(AudioError):  # too little audio for a prediction
    code = "too_short"


class NotFinite(AudioError):  # NaN or infinity among the samples
    code = "not_finite"


class OutOfRange(AudioError):  # |sample| so large that its power overflows float32
    code = "out_of_range"


class TooLong(AudioError):  # outside `Limits`
    code = "too_long"


class TooLarge(AudioError):  # outside `Limits`
    code = "too_large"


class BadSampleRate(AudioError):  # outside `Limits`
    code = "bad_sample_rate"


class BadChannels(AudioError):  # outside `Limits`
    code = "bad_channels"


class NoSuchChannel(AudioError):  # the requested channel is not in the recording
    code = "no_such_channel"


class NoSuchSegment(AudioError):  # the requested part is empty, or not in the recording
    code = "no_such_segment"


class DecoderCrashed(AudioError):  # the decoder ended the process it ran in
    code = "decoder_crashed"


class DecodeTimeout(AudioError):  # the decoder did not answer in time
    code = "decode_timeout"


def _with_subclasses(error: type[AudioError]) -> list[type[AudioError]]:
    return [error, *(one for kind in error.__subclasses__() for one in _with_subclasses(kind))]


ERRORS: dict[str, type[AudioError]] = {error.code: error for error in _with_subclasses(AudioError)}


@dataclass(frozen=True)
class Limits:
    """Limits of an accepted recording, checked on its header; if that lacks the length, while decoding to count it.

    `max_decoded_bytes` limits frames x channels x 4 of the whole recording: a forged sample rate can shorten the
    duration, but not this. The defaults accept ten hours of eight channels at 192 kHz, because reading one window does
    not cost more in a long recording. Code that decodes whole recordings of strangers should pass lower limits.
    """

    max_duration_s: float = 36_000.0
    max_decoded_bytes: int = 36_000 * 192_000 * 8 * 4
    min_rate_hz: int = 4_000
    max_rate_hz: int = 384_000
    max_channels: int = 8

    def __post_init__(self) -> None:
        if not (self.max_duration_s > 0 and self.max_decoded_bytes > 0 and self.max_channels > 0):
            raise ValueError(f"limits must be positive, got {self}")
        if not 0 < self.min_rate_hz <= self.max_rate_hz:
            raise ValueError(f"limits need 0 < min_rate_hz <= max_rate_hz, got {self}")

    def check(self, name: str, *, rate_hz: int, channels: int, frames: int) -> None:
        """Raise the `AudioError` for the first limit that the recording `name` exceeds."""
        if not self.min_rate_hz <= rate_hz <= self.max_rate_hz:
            expected = f"{self.min_rate_hz} to {self.max_rate_hz} Hz"
            raise BadSampleRate(f"{name}: sample rate {rate_hz} Hz; accepted are {expected}. Resample it.")
        if not 1 <= channels <= self.max_channels:
            raise BadChannels(f"{name}: {channels} channels; accepted are 1 to {self.max_channels}. Split or mix it.")
        duration_s = frames / rate_hz
        if duration_s > self.max_duration_s:
            raise TooLong(f"{name}: {duration_s:.1f} s long; the limit is {self.max_duration_s:g} s. Split it.")
        decoded = frames * channels * 4
        if decoded > self.max_decoded_bytes:
            expected = f"{self.max_decoded_bytes / 2**20:.0f} MiB"
            raise TooLarge(f"{name}: {decoded / 2**20:.0f} MiB once decoded; the limit is {expected}. Split it.")


DEFAULT_LIMITS = Limits()
