"""Data augmentation of features in training, computed for a whole batch at once.

Most augmentations work on the mel power of the whole recording: `crop` (another window), `stretch` (time-stretch by
interpolating frames), `shift` (by whole mel bands),
`warp` (all frequencies times a factor: vocal tract length perturbation, Jaitly & Hinton 2013), `gain` (spectral tilt; a
constant gain would be normalised away), `noise` (white noise added in power), `band` (the band limits of a lower sample
rate, a telephone or a lossy format). Others work on finished features: `masks` (SpecAugment, Park et al. 2019, two per
axis) and `mixup` (Zhang et al. 2018). `pitch` takes a pitch-shifted copy made at extraction. An example without any
augmentation is the stored feature, bit for bit. Limits: the frames of a cropped window lie on the recording's frame
grid and include sound from beyond the window's edges, unlike those of the stored middle window.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum, auto
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.features.features import FeatureConfig, mel_edges_hz
from pipeline.storage.errors import SerError

POWER_NAMES = ("crop", "stretch", "shift", "warp", "gain", "noise", "band")
NAMES = (*POWER_NAMES, "masks", "mixup", "pitch")
# augmentations that take a strength (`warp:0.2`): the setting it sets, and its largest value
_STRENGTHS = {
    "stretch": ("max_stretch", 0.5),
    "warp": ("max_warp", 0.5),
    "gain": ("max_tilt_db", 30.0),
    "noise": ("min_snr_db", 40.0),
    "band": ("band_p", 1.0),
}


@dataclass(frozen=True)
class AugmentConfig:
    """Names, probabilities (`_p`, for each example) and strengths of the augmentations.

    Numbers of bands and frames are for features of 64 x 188; they are scaled for features of another size.
    """

    names: tuple[str, ...] = ()
    crop_p: float = 0.7
    stretch_p: float = 0.5
    max_stretch: float = 0.15
    shift_p: float = 0.5
    max_shift_bands: int = 2
    warp_p: float = 0.5
    max_warp: float = 0.12  # factors from 1 / (1 + max_warp) to 1 + max_warp
    gain_p: float = 0.3
    max_tilt_db: float = 6.0
    noise_p: float = 0.3
    min_snr_db: float = 10.0
    max_snr_db: float = 40.0
    band_p: float = 0.2
    pitch_p: float = 0.5
    freq_mask_bands: int = 8
    time_mask_frames: int = 24
    mixup_alpha: float = 0.2

    @classmethod
    def of(cls, entries: Sequence[str], *, mixup_alpha: float = 0.2) -> AugmentConfig:
        """From names, some with a strength: ``warp:0.2``, ``gain:9`` (dB), ``band:0.5`` (probability).

        Raises:
            SerError: an unknown name, or a strength that is no number or out of range.
        """
        names: list[str] = []
        settings: dict[str, Any] = {}
        for entry in entries:
            name, colon, text = entry.partition(":")
            names.append(name)
            if colon:
                setting, largest = _STRENGTHS.get(name, ("", 0.0))
                if not setting:
                    raise SerError(f"augmentation {entry!r}: only {', '.join(_STRENGTHS)} take a strength")
                settings[setting] = _strength(entry, text, largest)
        return cls(tuple(names), mixup_alpha=mixup_alpha, **settings)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.names) - set(NAMES))
        if unknown:
            raise SerError(f"unknown augmentation {unknown[0]!r}; choose from {', '.join(NAMES)}")
        if not self.mixup_alpha > 0:
            raise SerError(
                f"mixup alpha {self.mixup_alpha}; expected a number above 0 (leave mixup out to turn it off)"
            )


def _strength(entry: str, text: str, largest: float) -> float:
    with suppress(ValueError):
        if 0 < (value := float(text)) <= largest:
            return value
    raise SerError(f"augmentation {entry!r}: expected a number above 0 and at most {largest:g} after the colon")


class Column(IntEnum):
    """Columns of the uniform draws. Each draw has its own column, whichever augmentations are used."""

    CROP = 0
    START = auto()
    STRETCH = auto()
    SPEED = auto()
    SHIFT = auto()
    BANDS = auto()
    GAIN = auto()
    TILT = auto()
    NOISE = auto()
    SNR = auto()
    NOISE_SEED = auto()
    BAND = auto()
    LOW = auto()
    HIGH = auto()
    PITCH = auto()
    COPY = auto()
    MASKS = auto()  # and the seven after it: (width, start) of two masks an axis
    WARP = 24  # drawn after all others, so that their numbers are the same as before `warp` was added
    FACTOR = auto()


_N_COLUMNS = Column.FACTOR + 1


@dataclass(frozen=True)
class Draws:
    """The random numbers of one epoch: a row for each position of the global stream."""

    uniform: NDArray[np.float32]  # (n, columns) in [0, 1)
    partner: NDArray[np.int64]  # (n,) position mixed in, of the same global batch
    weight: NDArray[np.float32]  # (n,) share of the example itself in a mixture, 0.5..1

    @classmethod
    def of_epoch(cls, n: int, batch_size: int, alpha: float, seed: int, epoch: int) -> Draws:
        """Draws for `n` positions in batches of `batch_size`; a function of the arguments alone."""
        rng = np.random.default_rng([seed, epoch, 1])
        uniform = rng.random((n, Column.WARP), dtype=np.float32)
        order = rng.random(n).reshape(-1, batch_size).argsort(axis=1)
        partner = (order + np.arange(0, n, batch_size)[:, None]).ravel()
        weight = rng.beta(alpha, alpha, n).astype(np.float32)
        late = rng.random((_N_COLUMNS - Column.WARP, n), dtype=np.float32)  # adding a row here changes no other draw
        return cls(np.hstack([uniform, late.T]), partner, np.maximum(weight, 1 - weight))


class Augmenter:
    """Applies an AugmentConfig to batches. The draws `u` (B, columns) are rows of `Draws.uniform`."""

    def __init__(self, config: AugmentConfig, features: FeatureConfig) -> None:
        if features.kind != "log_mel" and (wrong := [n for n in config.names if n in (*POWER_NAMES, "pitch")]):
            raise SerError(
                f"augmentation {wrong[0]!r} needs log_mel features, got {features.kind}; use masks and mixup"
            )
        self.config = config
        self.features = features
        taller, longer = features.n_mels / 64, features.n_frames / 188  # relative to the size that the settings are for
        self.max_shift_bands = round(config.max_shift_bands * taller)
        self.freq_mask_bands = round(config.freq_mask_bands * taller)
        self.time_mask_frames = round(config.time_mask_frames * longer)

    def _happens(self, name: str, u: Tensor, column: Column) -> Tensor:
        if name not in self.config.names:
            return torch.zeros(len(u), dtype=torch.bool)
        probability: float = getattr(self.config, f"{name}_p")
        return u[:, column] < probability

    def copy_numbers(self, u: Tensor, n_copies: Tensor) -> Tensor:
        """The number of the pitch-shifted copy that each example takes: (B,) int64, -1 for the recording itself."""
        taken = self._happens("pitch", u, Column.PITCH) & (n_copies > 0)
        return torch.where(taken, (u[:, Column.COPY] * n_copies).long(), -1)

    def needs_power(self, u: Tensor) -> Tensor:
        """(B,) bool: the examples that must be computed from the whole recording's mel power."""
        happens = [self._happens(name, u, Column[name.upper()]) for name in POWER_NAMES]
        return torch.stack(happens).any(dim=0)

    def from_power(self, power: Tensor, n_frames: Tensor, u: Tensor) -> Tensor:
        """Augmented windows (B, 1, n_mels, frames) of mel power (B, n_mels, F), of which `n_frames` (B,) are valid."""
        window = self._window(power, n_frames, u)
        window = self._warp(window, u)
        window = self._tilt(window, u)
        window = self._add_noise(window, u)
        window = self._band_limit(window, u)
        return normalise_batch(window, self.features)

    def _window(self, power: Tensor, n_frames: Tensor, u: Tensor) -> Tensor:
        """Crop, stretch and shift in one interpolation: (B, n_mels, F) -> (B, n_mels, frames)."""
        n_mels, n_out = self.features.n_mels, self.features.n_frames
        stretched = self._happens("stretch", u, Column.STRETCH)
        speed = torch.where(stretched, 1 + self.config.max_stretch * (2 * u[:, Column.SPEED] - 1), 1.0)
        room = (n_frames - 1) - speed * (n_out - 1)  # below 0: the recording is shorter than the window: centre it
        random_start = u[:, Column.START] * torch.where(stretched, room, room + 1)
        cropped = self._happens("crop", u, Column.CROP) & (room > 0)
        start = torch.where(cropped, random_start, room / 2)
        start = torch.where(stretched, start, start.floor())
        position = start[:, None] + speed[:, None] * torch.arange(n_out)
        left = position.floor()
        fraction = (position - left)[:, None, :]
        window = self._frames(power, left, n_frames) * (1 - fraction)
        window += self._frames(power, left + 1, n_frames) * fraction
        shifted = self._happens("shift", u, Column.SHIFT)
        if not shifted.any():
            return window
        steps = (u[:, Column.BANDS] * (2 * self.max_shift_bands + 1)).floor() - self.max_shift_bands
        bands = torch.arange(n_mels) + torch.where(shifted, steps, 0.0).long()[:, None]
        return window.gather(1, bands.clamp(0, n_mels - 1)[:, :, None].expand(-1, -1, n_out))

    @staticmethod
    def _frames(power: Tensor, index: Tensor, n_frames: Tensor) -> Tensor:
        """Frames `index` (B, T) of power (B, n_mels, F), 0 outside the recording: (B, n_mels, T)."""
        inside = (index >= 0) & (index < n_frames[:, None])
        gathered = power.gather(2, index.long().clamp(0, power.shape[2] - 1)[:, None, :].expand(-1, power.shape[1], -1))
        return gathered * inside[:, None, :]

    def _warp(self, power: Tensor, u: Tensor) -> Tensor:
        """Multiply all frequencies by a random factor, by interpolating mel bands; the outermost bands are repeated."""
        happens = self._happens("warp", u, Column.WARP)
        if not happens.any():
            return power
        exponent = torch.where(happens, 2 * u[:, Column.FACTOR] - 1, 0.0)
        centres = torch.tensor(mel_edges_hz(self.features)[1:-1], dtype=torch.float32)
        source = centres / ((1 + self.config.max_warp) ** exponent)[:, None]
        right = torch.searchsorted(centres, source).clamp(1, len(centres) - 1)
        low, high = centres[right - 1], centres[right]
        fraction = ((source - low) / (high - low)).clamp(0, 1)[:, :, None]
        index = right[:, :, None].expand(-1, -1, power.shape[2])
        warped = torch.lerp(power.gather(1, index - 1), power.gather(1, index), fraction)
        return torch.where(happens[:, None, None], warped, power)

    def _tilt(self, power: Tensor, u: Tensor) -> Tensor:
        happens = self._happens("gain", u, Column.GAIN)
        if not happens.any():
            return power
        tilt_db = torch.where(happens, (2 * u[:, Column.TILT] - 1) * self.config.max_tilt_db, 0.0)
        gain_db = tilt_db[:, None] * torch.linspace(-1, 1, power.shape[1])
        return power * (10 ** (gain_db / 10))[:, :, None]

    def _add_noise(self, power: Tensor, u: Tensor) -> Tensor:
        """Add white noise at a drawn signal-to-noise ratio; the power of a noise bin is exponentially distributed."""
        happens = self._happens("noise", u, Column.NOISE)
        for row in happens.nonzero().flatten().tolist():
            lowest, highest = self.config.min_snr_db, self.config.max_snr_db
            snr_db = lowest + float(u[row, Column.SNR]) * (highest - lowest)
            generator = torch.Generator().manual_seed(int(float(u[row, Column.NOISE_SEED]) * 2**24))
            noise = torch.empty_like(power[row]).exponential_(generator=generator)
            power[row] += noise * power[row].mean() * 10 ** (-snr_db / 10)
        return power

    def _band_limit(self, power: Tensor, u: Tensor) -> Tensor:
        """Remove the power outside a drawn frequency band; a mel filter on its edge loses its part outside."""
        happens = self._happens("band", u, Column.BAND)
        if not happens.any():
            return power
        low_hz, high_hz = band_edges_hz(u[:, Column.LOW], u[:, Column.HIGH])
        corners_hz = torch.tensor(mel_edges_hz(self.features), dtype=torch.float32)
        kept = _area_below(high_hz, corners_hz) - _area_below(low_hz, corners_hz)
        return power * torch.where(happens[:, None], kept.clamp_min(0), 1.0)[:, :, None]

    def mask(self, features: Tensor, u: Tensor) -> Tensor:
        """SpecAugment: set two masks per axis to 0 (the mean), in (B, 1, n_mels, frames) or (B, frames, n_dims)."""
        if "masks" not in self.config.names:
            return features
        picture = features.ndim == 4
        n_bands, n_frames = features.shape[2], features.shape[3 if picture else 1]
        size = n_bands, self.freq_mask_bands
        bands = self._span(u, 0, *size) | self._span(u, 1, *size)
        size = n_frames, self.time_mask_frames
        frames = self._span(u, 2, *size) | self._span(u, 3, *size)
        if picture:
            return features.masked_fill(bands[:, None, :, None] | frames[:, None, None, :], 0.0)
        return features.masked_fill(bands[:, None, :] | frames[:, :, None], 0.0)

    @staticmethod
    def _span(u: Tensor, number: int, size: int, widest: int) -> Tensor:
        """Mask `number` of an axis: up to `widest` neighbouring places of `size`, (B, size) bool."""
        width = (u[:, Column.MASKS + 2 * number, None] * (widest + 1)).floor()
        start = (u[:, Column.MASKS + 2 * number + 1, None] * (size - width + 1)).floor()
        index = torch.arange(size)
        return (index >= start) & (index < start + width)


def band_edges_hz(kind: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Lower and upper edge in Hz, (B,) each, of a transmission band, from two draws in [0, 1).

    50 % are 16 kHz files (upper edge 8 kHz, up to 8 % lower because of the resampler's filter), 15 % telephone (200-400
    Hz to 3.4-4 kHz, around ITU-T G.712), 15 % files of 11.025 kHz, 20 % files of 22.05 to 32 kHz and MP3 (upper edge 11
    to 16 kHz).
    """
    wide = torch.where(kind < 0.8, 5512.5 * (1 - 0.08 * place), 11000 + 5000 * place)
    narrow = torch.where(kind < 0.5, 8000 * (1 - 0.08 * place), 3400 + 600 * place)
    low = torch.where((kind >= 0.5) & (kind < 0.65), 200 + 200 * (1 - place), 0.0)
    return low, torch.where(kind < 0.65, narrow, wide)


def _area_below(cut_hz: Tensor, corners_hz: Tensor) -> Tensor:
    """Share (B, n_mels) of each triangular mel filter's area below a frequency (B,); corners (n_mels + 2,)."""
    left, centre, right = corners_hz[:-2], corners_hz[1:-1], corners_hz[2:]
    cut = cut_hz[:, None]
    rising = ((cut - left).clamp_min(0) / (centre - left)).clamp_max(1) ** 2 * (centre - left)
    falling = (1 - ((right - cut).clamp_min(0) / (right - centre)).clamp_max(1) ** 2) * (right - centre)
    return (rising + falling) / (right - left)


def normalise_batch(power: Tensor, config: FeatureConfig) -> Tensor:
    """`features.normalise_power` for a batch: (B, n_mels, frames) power -> (B, 1, n_mels, frames)."""
    decibel = power.clamp_min(1e-10).log10_().mul_(10)
    decibel -= decibel.amax(dim=(1, 2), keepdim=True)
    decibel.clamp_min_(-config.top_db)
    std, mean = torch.std_mean(decibel, dim=(1, 2), correction=0, keepdim=True)
    return decibel.sub_(mean).div_(std + 1e-6).unsqueeze(1)
