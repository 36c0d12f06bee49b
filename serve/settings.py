"""What the service can be told at start: models, size, limits. ``serve run serve.deployment:build threads=2`` sets it.

Every limit has a reason beside it; times are in seconds, sizes in MiB. The API key is not here: it comes from the
environment (``SER_API_KEY``), and only its hash travels to the workers.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, field_validator

from pipeline.storage.errors import Limits, SerError

MIB = 2**20
APP_NAME = "ser"  # of the application in Ray Serve


class Settings(BaseModel):
    """Arguments of the application builder; lists may be given as text with commas."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    bundles: tuple[str, ...] = Field(
        default=(), description="model bundles; the first is the default; none: the shipped one"
    )
    replicas: int = Field(default=1, ge=1, description="model workers at least, for each bundle")
    max_replicas: int = Field(default=1, ge=1, description="model workers at most; more than replicas: autoscaling")
    threads: int = Field(default=1, ge=1, description="CPUs, and math threads, of a model worker")
    batch_size: int = Field(default=16, ge=1, description="recordings that the network sees at once")
    max_ongoing: int = Field(default=32, ge=1, description="recordings in work in one model worker")
    max_queued: int = Field(default=16, ge=1, description="recordings waiting for a model worker; more are refused")
    max_body_mib: float = Field(default=32, gt=0, description="bytes of one request: 6 minutes of 48 kHz mono WAV")
    max_held_mib: float = Field(default=256, gt=0, description="bytes of all requests that are being received or used")
    max_files: int = Field(default=32, ge=1, description="recordings in one request")
    max_duration_s: float = Field(default=1800, gt=0, description="length of a recording")
    max_decoded_mib: float = Field(default=700, gt=0, description="a recording as float32: 30 min of 48 kHz stereo")
    max_windows: int = Field(default=1800, ge=1, description="windows of a recording: 15 s of one CPU, or so")
    body_timeout_s: float = Field(default=30, gt=0, description="until a request's body must have come")
    deadline_s: float = Field(default=60, gt=0, description="from body to answer")
    max_streams: int = Field(default=16, ge=0, description="live streams at a time, in each process that speaks HTTP")
    max_stream_s: float = Field(default=1800, gt=0, description="length of a live stream")
    stream_idle_s: float = Field(default=30, gt=0, description="until a live stream without new sound is closed")
    cors_origins: tuple[str, ...] = Field(default=(), description="web origins whose pages may call; none by default")

    @field_validator("bundles", "cors_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        """``"a,b"`` as the command line gives it."""
        return tuple(part for part in value.split(",") if part) if isinstance(value, str) else value

    @property
    def room(self) -> int:
        """Recordings of one model, in work and waiting, when all its workers run."""
        return max(self.replicas, self.max_replicas) * self.max_ongoing + self.max_queued

    @property
    def models(self) -> int:
        """How many there are."""
        return max(1, len(self.bundles))

    def check_cpus(self, there: float) -> None:
        """Whether that many CPUs are enough for all model workers.

        Raises:
            SerError: they are not.
        """
        needed = self.models * self.replicas * self.threads
        if needed > there:
            raise SerError(
                f"{self.models} models x {self.replicas} replicas x {self.threads} threads need {needed} CPUs, and "
                f"there are {there:g}; give fewer --bundles, --replicas or --threads"
            )

    @property
    def audio_limits(self) -> Limits:
        """What a recording may be."""
        return Limits(max_duration_s=self.max_duration_s, max_decoded_bytes=round(self.max_decoded_mib * MIB))

    @property
    def public_limits(self) -> dict[str, float]:
        """What a client should know before it sends."""
        return {
            "max_body_mib": self.max_body_mib,
            "max_files": self.max_files,
            "max_duration_s": self.max_duration_s,
            "max_decoded_mib": self.max_decoded_mib,
            "max_windows": self.max_windows,
            "body_timeout_s": self.body_timeout_s,
            "deadline_s": self.deadline_s,
            "max_streams": self.max_streams,
            "max_stream_s": self.max_stream_s,
            "stream_idle_s": self.stream_idle_s,
        }
