"""What of another voice needs no vocoder: its factors, and spectra moved along the frequencies."""

from __future__ import annotations

import numpy as np

from benchmarks.other_voices import Voice, moved


def test_a_voice_is_drawn_from_the_name_alone_and_stays_in_range() -> None:
    voices = [Voice.of(f"recording {i}") for i in range(400)]
    assert voices == [Voice.of(f"recording {i}") for i in range(400)]
    for factors, largest in (
        ([voice.formants for voice in voices], 1.2),
        ([voice.pitch for voice in voices], 2 ** (4 / 12)),
        ([voice.breath for voice in voices], 1.25),
    ):
        assert 1 / largest < min(factors) < 1.05 / largest
        assert 0.95 * largest < max(factors) < largest
        assert abs(np.log(factors).mean()) < 0.03


def test_a_formant_moves_by_its_factor() -> None:
    """A resonance at bin 100 lies at 120 afterwards and at 80, as wide in octaves as before."""
    bins = np.arange(1025)
    resonance = np.exp(-0.5 * ((bins - 100) / 10) ** 2)[None, :]
    for factor in (1.2, 0.8):
        found = moved(resonance, factor)[0]
        assert found.argmax() == round(100 * factor)
        above = bins[found > found.max() / 2]
        assert abs((above[-1] - above[0]) - 23.5 * factor) < 2
    np.testing.assert_array_equal(moved(resonance, 1.0), resonance)
