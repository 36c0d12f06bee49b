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
    └── AudioError                    code                one recording cannot be used
        ├── NotFound                  not_found            no such path
        ├── NotFetched                not_fetched          a URL of the web or of a store that is not read here
        ├── NotAFile                  not_a_file           directory, pipe, socket, device
        ├── PermissionDenied          permission_denied
        ├── Unreadable                unreadable           the operating system failed to open or read it
        ├── EmptyFile                 empty_file           0 bytes
        ├── NotAudio                  not_audio            no audio container known here, or no audio track in it
        ├── UnsupportedFormat         unsupported_format   a known container with a codec that is not accepted
        │   └── ExtraNeeded           extra_needed         decodable once PyAV is installed
        ├── Corrupt                   corrupt              the header is impossible, or the audio data cannot be decoded
        │   └── Truncated             truncated            the recording says it is longer than it is
        ├── NoSamples                 no_samples           a valid recording of 0 frames, or a part past its end
        ├── TooShort                  too_short            too little audio for a prediction
        ├── NotFinite                 not_finite           NaN or infinity among the samples
        ├── OutOfRange                out_of_range         |sample| so large that its power overflows float32
        ├── TooLong                   too_long             ┐
        ├── TooLarge                  too_large            │ outside `Limits`
        ├── BadSampleRate             bad_sample_rate      │
        ├── BadChannels               bad_channels         ┘
        ├── NoSuchChannel             no_such_channel      the requested channel is not in the recording
        ├── NoSuchSegment             no_such_segment      the requested part is empty, or not in the recording
        ├── DecoderCrashed            decoder_crashed      the decoder ended the process it ran in
        └── DecodeTimeout             decode_timeout       the decoder did not answer in time

`code` never changes: it is written into tables (`status`) and HTTP responses (`code`). `ERRORS` maps code to class.
"""

# ruff: noqa: D101 - the tree above describes each class

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


class NotFound(AudioError):
    code = "not_found"


class NotFetched(AudioError):
    code = "not_fetched"


class NotAFile(AudioError):
    code = "not_a_file"


class PermissionDenied(AudioError):
    code = "permission_denied"


class Unreadable(AudioError):
    code = "unreadable"


class EmptyFile(AudioError):
    code = "empty_file"


class NotAudio(AudioError):
    code = "not_audio"


class UnsupportedFormat(AudioError):
    code = "unsupported_format"


class ExtraNeeded(UnsupportedFormat):
    code = "extra_needed"


class Corrupt(AudioError):
    code = "corrupt"


class Truncated(Corrupt):
    code = "truncated"


class NoSamples(AudioError):
    code = "no_samples"


class TooShort(AudioError):
    code = "too_short"


class NotFinite(AudioError):
    code = "not_finite"


class OutOfRange(AudioError):
    code = "out_of_range"


class TooLong(AudioError):
    code = "too_long"


class TooLarge(AudioError):
    code = "too_large"


class BadSampleRate(AudioError):
    code = "bad_sample_rate"


class BadChannels(AudioError):
    code = "bad_channels"


class NoSuchChannel(AudioError):
    code = "no_such_channel"


class NoSuchSegment(AudioError):
    code = "no_such_segment"


class DecoderCrashed(AudioError):
    code = "decoder_crashed"


class DecodeTimeout(AudioError):
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
