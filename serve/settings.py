"""Settings of the service at start: models, workers, limits. Example: ``serve run serve.deployment:build threads=2``.

Times are in seconds, sizes in MiB. The API key is not a setting: it comes from the environment (``SER_API_KEY``), and
worker processes get only its hash.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, field_validator

from pipeline.storage.errors import Limits, SerError

MIB = 2**20
_PUBLIC = {
    *("max_body_mib", "max_files", "max_duration_s", "max_decoded_mib", "max_windows"),
    *("body_timeout_s", "deadline_s", "max_streams", "max_stream_s", "stream_idle_s"),
}
APP_NAME = "ser"  # name of the application in Ray Serve


class Settings(BaseModel):
    """Arguments of the application builder; a list may be given as text with commas."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    bundles: tuple[str, ...] = Field(
        default=(), description="folders of model bundles; the first is the default model; none: the shipped bundle"
    )
    replicas: int = Field(default=1, ge=1, description="minimum number of worker processes per model")
    max_replicas: int = Field(
        default=1,
        ge=1,
        description="maximum number of worker processes per model; above replicas, Ray Serve autoscales",
    )
    threads: int = Field(default=1, ge=1, description="CPUs, and math threads, of one model worker")
    batch_size: int = Field(default=16, ge=1, description="maximum number of windows in one batch of the network")
    max_ongoing: int = Field(default=32, ge=1, description="recordings that one model worker processes at a time")
    max_queued: int = Field(
        default=16, ge=1, description="recordings that may wait for a worker of a model; further ones are refused"
    )
    max_body_mib: float = Field(
        default=32, gt=0, description="maximum size of one request in MiB; 32 is 6 minutes of 48 kHz mono WAV"
    )
    max_held_mib: float = Field(
        default=256, gt=0, description="maximum size in MiB of all requests that are being received or answered"
    )
    max_files: int = Field(default=32, ge=1, description="maximum number of recordings in one request")
    max_duration_s: float = Field(default=1800, gt=0, description="maximum length of a recording in seconds")
    max_decoded_mib: float = Field(
        default=700,
        gt=0,
        description="maximum size in MiB of a recording decoded to float32; 700 is 30 minutes of 48 kHz stereo",
    )
    max_windows: int = Field(
        default=1800, ge=1, description="maximum number of windows of a recording; 1,800 take about 15 s of one CPU"
    )
    body_timeout_s: float = Field(
        default=30, gt=0, description="seconds within which the body of a request must arrive"
    )
    deadline_s: float = Field(default=60, gt=0, description="maximum seconds from the complete body to the answer")
    max_streams: int = Field(
        default=16, ge=0, description="maximum number of open live streams, in each process that speaks HTTP"
    )
    max_stream_s: float = Field(default=1800, gt=0, description="maximum length of a live stream in seconds")
    stream_idle_s: float = Field(
        default=30, gt=0, description="seconds after which a live stream without new sound is closed"
    )
    cors_origins: tuple[str, ...] = Field(
        default=(), description="web origins whose pages may call the service; none by default"
    )

    @field_validator("bundles", "cors_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        """Split the text ``"a,b"``, as the command line gives it, into a tuple."""
        return tuple(part for part in value.split(",") if part) if isinstance(value, str) else value

    @property
    def room(self) -> int:
        """Maximum number of recordings of one model, in progress and waiting, when all its workers run."""
        return max(self.replicas, self.max_replicas) * self.max_ongoing + self.max_queued

    @property
    def models(self) -> int:
        """Number of models."""
        return max(1, len(self.bundles))

    def check_cpus(self, there: float) -> None:
        """Raise SerError unless ``there`` CPUs are enough for the minimum number of model workers."""
        needed = self.models * self.replicas * self.threads
        if needed > there:
            raise SerError(
                f"{self.models} models x {self.replicas} replicas x {self.threads} threads need {needed} CPUs, and "
                f"there are {there:g}; give fewer --bundles, --replicas or --threads"
            )

    @property
    def audio_limits(self) -> Limits:
        """Limits on the length and decoded size of a recording."""
        return Limits(max_duration_s=self.max_duration_s, max_decoded_bytes=round(self.max_decoded_mib * MIB))

    @property
    def public_limits(self) -> dict[str, float]:
        """The limits that ``GET /v1/model`` publishes to clients."""
        return self.model_dump(include=_PUBLIC)
