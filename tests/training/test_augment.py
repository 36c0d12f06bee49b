"""What each augmentation must change and what it must leave alone, measured on the powers it works on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import soxr
import torch
from torch import Tensor
from toy_data import CONFIG, FRAMES, mel_powers, middle

from pipeline.features import features
from pipeline.features.extract import _pitch_shift
from pipeline.features.features import FeatureConfig, mel_edges_hz, mel_power, normalise_power
from pipeline.storage.errors import SerError
from pipeline.training.augment import (
    _N_COLUMNS,
    NAMES,
    POWER_NAMES,
    AugmentConfig,
    Augmenter,
    Column,
    Draws,
    _area_below,
    band_edges_hz,
    normalise_batch,
)

N_OUT = CONFIG.n_frames
ALWAYS = {f"{name}_p": 1.0 for name in (*POWER_NAMES, "pitch")}
NEVER = {f"{name}_p": 0.0 for name in (*POWER_NAMES, "pitch")}
STRONG = {"max_stretch": 0.3, "max_shift_bands": 16}  # of 64; the pictures here have 16 bands


def augmenter(*names: str, **settings: Any) -> Augmenter:
    return Augmenter(AugmentConfig(names, **{**ALWAYS, **settings}), CONFIG)


def draws(n: int, seed: int = 0, **columns: float) -> Tensor:
    """Uniform draws (n, columns), some columns fixed by name."""
    u = torch.from_numpy(Draws.of_epoch(n, n, 0.2, seed, 1).uniform)
    for name, value in columns.items():
        u[:, Column[name]] = value
    return u


def window(chosen: Augmenter, power: Tensor, u: Tensor, n_frames: int = FRAMES) -> Tensor:
    """The power of the augmented windows, before it is made a feature."""
    found = chosen._window(power, torch.full((len(power),), n_frames), u)
    return chosen._band_limit(chosen._add_noise(chosen._tilt(found, u), u), u)


@pytest.fixture(scope="module")
def power() -> Tensor:
    return torch.from_numpy(mel_powers(12)[0])


@pytest.mark.parametrize("name", POWER_NAMES)
def test_changes_the_examples_that_draw_it_and_no_other(name: str, power: Tensor) -> None:
    before, n_frames, u = power.clone(), torch.full((len(power),), FRAMES), draws(len(power))
    changed, half, plain = (augmenter(name, **STRONG, **{f"{name}_p": p}) for p in (1.0, 0.5, 0.0))
    drawn = half.needs_power(u)
    assert 0 < drawn.sum() < len(drawn)
    assert changed.needs_power(u).all()
    assert not plain.needs_power(u).any()
    changed, half, plain = (chosen.from_power(power, n_frames, u) for chosen in (changed, half, plain))
    assert torch.equal(power, before)  # the stored arrays are read-only
    assert changed.shape == plain.shape == (len(power), 1, CONFIG.n_mels, N_OUT)
    assert changed.dtype == torch.float32
    assert torch.isfinite(changed).all()
    torch.testing.assert_close(changed.mean(dim=(1, 2, 3)), torch.zeros(len(power)), atol=1e-5, rtol=0)
    np.testing.assert_allclose(plain.numpy(), np.stack([middle(p) for p in power.numpy()]), atol=1e-5)
    seen = 0.1 if name == "band" else 0.7  # of these 4 kHz a telephone alone cuts; a shift by 0 bands may be drawn
    assert ((changed - plain).abs().amax(dim=(1, 2, 3)) > 0.1).float().mean() > seen
    torch.testing.assert_close(half, torch.where(drawn[:, None, None, None], changed, plain))


@pytest.mark.parametrize("name", POWER_NAMES)
@pytest.mark.parametrize("n_frames", [1, 10, N_OUT - 1, N_OUT, N_OUT + 1])
def test_short_and_silent_recordings_stay_finite(name: str, n_frames: int) -> None:
    power = torch.zeros(4, CONFIG.n_mels, FRAMES)
    power[:2, :, :n_frames] = torch.rand(2, CONFIG.n_mels, n_frames)
    changed = augmenter(name).from_power(power, torch.full((4,), n_frames), draws(4))
    assert changed.shape == (4, 1, CONFIG.n_mels, N_OUT)
    assert torch.isfinite(changed).all()


def test_a_crop_is_a_window_of_the_recording_and_a_shorter_one_is_centred(power: Tensor) -> None:
    u = draws(len(power))
    starts = set()
    for row, found in zip(power, window(augmenter("crop"), power, u), strict=True):
        candidates = row.unfold(1, N_OUT, 1).permute(1, 0, 2)
        (start,) = (candidates == found).all(dim=(1, 2)).nonzero()
        starts.add(int(start))
    assert len(starts) > 6
    first, last = (window(augmenter("crop"), power, draws(len(power), START=start)) for start in (0.0, 0.99999))
    assert torch.equal(first, power[:, :, :N_OUT])
    assert torch.equal(last, power[:, :, -N_OUT:])
    expected = torch.nn.functional.pad(power[:, :, :20], [(N_OUT - 20) // 2] * 2)
    assert torch.equal(window(augmenter("crop"), power, u, n_frames=20), expected)


@pytest.mark.parametrize(("speed", "expected"), [(0.0, 0.8), (0.5, 1.0), (0.99999, 1.2)])
def test_stretching_moves_clicks_apart_by_the_factor_and_keeps_their_bands(speed: float, expected: float) -> None:
    power = torch.full((1, CONFIG.n_mels, FRAMES), 1e-6)
    power[0, 5, [40, 56]] = 1.0
    found = window(augmenter("stretch", max_stretch=0.2), power, draws(1, SPEED=speed))[0]
    assert (found > 1e-3).any(dim=1).nonzero().flatten().tolist() == [5]
    frames, weight = np.arange(N_OUT), found[5].numpy()
    half = int(np.average(frames, weights=weight))
    first, second = (np.average(frames[part], weights=weight[part]) for part in (slice(half), slice(half, None)))
    assert second - first == pytest.approx(16 / expected, abs=0.6)


def test_a_shift_moves_whole_bands(power: Tensor) -> None:
    plain = augmenter("shift", **NEVER)
    for draw, bands in ((0.0, -2), (0.5, 0), (0.99999, 2)):
        found = window(augmenter("shift", max_shift_bands=8), power, draws(len(power), BANDS=draw))
        expected = window(plain, power, draws(len(power)))
        inner = slice(2, CONFIG.n_mels - 2)
        assert torch.equal(found[:, inner], expected[:, 2 + bands : CONFIG.n_mels - 2 + bands])


@pytest.mark.parametrize("factor", [0.85, 1.0, 1.2])
@pytest.mark.parametrize("tone_hz", [300.0, 1500.0, 9000.0])
def test_a_warp_moves_a_tone_to_the_band_of_another(tone_hz: float, factor: float) -> None:
    config = FeatureConfig()
    t = np.arange(config.window_samples) / config.sample_rate_hz
    before, after = (
        torch.from_numpy(mel_power(np.sin(2 * np.pi * hz * t).astype(np.float32), config))[None]
        for hz in (tone_hz, tone_hz * factor)
    )
    draw = (np.log(factor) / np.log(1.25) + 1) / 2
    chosen = Augmenter(AugmentConfig(("warp",), warp_p=1.0, max_warp=0.25), config)
    found = chosen._warp(before, draws(1, WARP=0.0, FACTOR=draw))
    middle_of = [
        float((p.mean(dim=2)[0] * torch.arange(config.n_mels)).sum() / p.mean(dim=2).sum()) for p in (found, after)
    ]
    assert middle_of[0] == pytest.approx(middle_of[1], abs=0.3)  # in bands
    if factor == 1.0:
        torch.testing.assert_close(found, before, rtol=1e-5, atol=0)


def test_a_tilt_is_linear_in_db_over_the_bands(power: Tensor) -> None:
    plain = window(augmenter("gain", **NEVER), power, draws(len(power)))
    found = window(augmenter("gain", max_tilt_db=9.0), power, draws(len(power), TILT=1.0))
    gain_db = 10 * torch.log10(found / plain)
    expected = torch.linspace(-9, 9, CONFIG.n_mels)[None, :, None].expand_as(gain_db)
    torch.testing.assert_close(gain_db, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("snr_db", [0.0, 10.0, 20.0])
def test_noise_has_the_drawn_level(snr_db: float, power: Tensor) -> None:
    plain = window(augmenter("noise", **NEVER), power, draws(len(power)))
    found = window(augmenter("noise", min_snr_db=snr_db, max_snr_db=snr_db), power, draws(len(power)))
    noise = found - plain
    assert (noise >= -1e-6).all()
    measured_db = 10 * torch.log10(plain.mean() / noise.mean())
    assert float(measured_db) == pytest.approx(snr_db, abs=0.3)
    assert not torch.equal(noise[0], noise[1])


@pytest.mark.parametrize("edge_hz", [4000.0, 8000.0, 12000.0])
def test_the_kept_part_of_white_noise_is_what_a_filter_bank_of_fewer_bins_hears(edge_hz: float) -> None:
    config = FeatureConfig()
    bank = features.filters(config.n_mels, config.top_hz, 2**15, config.sample_rate_hz).astype(np.float64)
    below = np.fft.rfftfreq(2**15, 1 / config.sample_rate_hz) < edge_hz
    expected = bank[:, below].sum(axis=1) / bank.sum(axis=1)
    corners_hz = torch.tensor(mel_edges_hz(config), dtype=torch.float64)
    found = _area_below(torch.tensor([edge_hz], dtype=torch.float64), corners_hz)[0].numpy()
    np.testing.assert_allclose(found, expected, atol=0.02)


def test_a_clip_through_16_khz_is_nearly_the_clip_band_limited_in_mel_power() -> None:
    config, rng = FeatureConfig(), np.random.default_rng(0)
    noise = rng.standard_normal(config.window_samples)
    pulses = np.where(np.arange(config.window_samples) % 300 == 0, 1.0, 0.0)  # a voice of 160 Hz
    samples = (0.02 * noise + np.convolve(pulses, np.exp(-np.arange(200) / 20), "same")).astype(np.float32)
    narrow = soxr.resample(soxr.resample(samples, 48000, 16000), 16000, 48000)[: len(samples)].astype(np.float32)
    power = torch.from_numpy(mel_power(samples, config))[None]
    limited = Augmenter(AugmentConfig(("band",), band_p=1.0), config)
    differences = []
    for place in (0.0, 0.25, 0.5, 0.75, 0.99):
        found = normalise_batch(limited._band_limit(power, draws(1, LOW=0.1, HIGH=place)), config)[0, 0].numpy()
        differences.append(np.abs(found - normalise_power(mel_power(narrow, config), config)).mean())
    assert np.mean(differences) <= 0.03
    plain = normalise_power(power[0].numpy(), config)
    assert np.abs(plain - normalise_power(mel_power(narrow, config), config)).mean() > 0.1  # it is a change


def test_bands_are_those_of_files_people_have() -> None:
    u = draws(20_000)
    low_hz, high_hz = band_edges_hz(u[:, Column.LOW], u[:, Column.HIGH])
    telephone = (high_hz >= 3400) & (high_hz <= 4000) & (low_hz >= 200) & (low_hz <= 400)
    for share, files in (
        (0.5, (high_hz > 7300) & (high_hz <= 8000)),  # at 16 kHz
        (0.15, telephone),
        (0.15, (high_hz > 5000) & (high_hz <= 5512.5)),  # at 11 kHz
        (0.2, (high_hz >= 11000) & (high_hz <= 16000)),
    ):
        assert float(files.float().mean()) == pytest.approx(share, abs=0.02)
    assert (low_hz[high_hz > 4000] == 0).all()


@pytest.mark.parametrize(
    ("config", "shape", "widest"),
    [
        (FeatureConfig(), (1, 64, 188), (8, 24)),
        (FeatureConfig(kind="frame_features"), (188, 190), (8, 24)),
        (FeatureConfig(window_s=3.0, hop_length=1152, n_mels=96), (1, 96, 126), (12, 16)),
    ],
)
def test_masks_set_whole_rows_and_columns_to_the_mean_and_no_more_than_allowed(
    config: FeatureConfig, shape: tuple[int, ...], widest: tuple[int, int]
) -> None:
    chosen = Augmenter(AugmentConfig(("masks",)), config)
    features = 1 + torch.rand(200, *shape)  # no zero by chance
    masked = chosen.mask(features, draws(200))
    zero = (masked == 0).reshape(200, *shape[-2:])
    if len(shape) == 2:
        zero = zero.transpose(1, 2)  # (clips, bands, frames)
    bands, frames = zero.all(dim=2), zero.all(dim=1)
    assert torch.equal(zero, bands[:, :, None] | frames[:, None, :])
    assert torch.equal(masked[masked != 0], features[masked != 0])
    assert 1.5 * widest[0] < bands.sum(dim=1).max() <= 2 * widest[0]
    assert 1.5 * widest[1] < frames.sum(dim=1).max() <= 2 * widest[1]
    assert bands.sum(dim=1).float().mean() == pytest.approx(widest[0], rel=0.12)  # two masks, which may overlap
    assert Augmenter(AugmentConfig(), config).mask(features, draws(200)) is features


@pytest.mark.parametrize("semitones", [-1.0, 1.0])
def test_a_pitch_shifted_copy_is_as_long_and_a_semitone_off(semitones: float) -> None:
    tone = np.sin(2 * np.pi * 440 * np.arange(48_000) / 48_000).astype(np.float32)
    shifted = _pitch_shift(tone, FeatureConfig(), semitones)
    assert shifted.shape == tone.shape
    assert np.isfinite(shifted).all()
    peak_hz = int(np.abs(np.fft.rfft(shifted * np.hanning(48_000))).argmax())  # 1 s: a bin is 1 Hz
    assert peak_hz == pytest.approx(440 * 2 ** (semitones / 12), abs=2)


def test_probabilities_are_kept() -> None:
    u = torch.from_numpy(Draws.of_epoch(4000, 40, 0.2, 0, 1).uniform)
    for name in POWER_NAMES:
        config = AugmentConfig((name,))
        happens = Augmenter(config, CONFIG).needs_power(u).float().mean()
        assert float(happens) == pytest.approx(getattr(config, f"{name}_p"), abs=0.03)
    numbers = Augmenter(AugmentConfig(("pitch",)), CONFIG).copy_numbers(u, torch.full((4000,), 2))
    shares = torch.bincount(numbers + 1, minlength=3) / 4000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.25, 0.25]), atol=0.03, rtol=0)
    assert (Augmenter(AugmentConfig(("pitch",)), CONFIG).copy_numbers(u, torch.zeros(4000)) == -1).all()


def test_draws_are_uniform_those_of_earlier_releases_and_partners_stay_in_the_batch() -> None:
    found = Draws.of_epoch(320, 16, 0.2, 3, 5)
    assert found.uniform.shape == (320, _N_COLUMNS)
    assert 0 <= found.uniform.min() < 0.01
    assert 0.99 < found.uniform.max() < 1
    assert (found.weight >= 0.5).all()
    assert (found.weight <= 1).all()
    for batch in found.partner.reshape(-1, 16) - np.arange(0, 320, 16)[:, None]:
        np.testing.assert_array_equal(np.sort(batch), np.arange(16))
    np.testing.assert_array_equal(found.uniform, Draws.of_epoch(320, 16, 0.2, 3, 5).uniform)
    assert not np.array_equal(found.uniform, Draws.of_epoch(320, 16, 0.2, 3, 6).uniform)
    before_warp = np.random.default_rng([3, 5, 1]).random((320, 24), dtype=np.float32)  # of recipes made then
    np.testing.assert_array_equal(found.uniform[:, : Column.MASKS + 8], before_warp)


def test_strengths_are_settings() -> None:
    found = AugmentConfig.of(["crop", "stretch:0.2", "warp:0.25", "gain:9", "noise:5"], mixup_alpha=0.4)
    strengths = {"max_stretch": 0.2, "max_warp": 0.25, "max_tilt_db": 9.0, "min_snr_db": 5.0}
    assert found == AugmentConfig(("crop", "stretch", "warp", "gain", "noise"), mixup_alpha=0.4, **strengths)


@pytest.mark.parametrize(
    "entry", ["echo", "crop:1", "warp:", "warp:much", "warp:0", "warp:-0.1", "warp:0.6", "gain:nan", "gain:inf"]
)
def test_an_unknown_name_or_a_strength_out_of_range_is_refused(entry: str) -> None:
    with pytest.raises(SerError, match=f"'{entry}'"):
        AugmentConfig.of(["masks", entry])


def test_what_these_features_or_numbers_do_not_allow_is_refused() -> None:
    with pytest.raises(SerError, match="alpha"):
        AugmentConfig(("mixup",), mixup_alpha=0)
    frames = FeatureConfig(kind="frame_features")
    for name in sorted(set(NAMES) - {"masks", "mixup"}):
        with pytest.raises(SerError, match="log_mel"):
            Augmenter(AugmentConfig((name,)), frames)
