"""Altair charts of sound: waveform, spectrogram, the model's input, and the cells that mattered.

Times are seconds of the recording. A spectrogram is one image stretched over its axes, because a chart of 12,032
rectangles would take seconds. Its rows are mel bands; the axis shows their frequencies.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import cast

import altair as alt
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from app_pages.palette import ACCENT, AGAINST, FOR, NEUTRAL, grey, heat
from serve.schema import Explanation, Picture

WAVEFORM_PX, PICTURE_PX, STRIP_PX = 96, 226, 150
_MINUTES_FROM_S = 60.0  # the axis of longer recordings is in minutes
_TICK_PX = 4
_AXIS_PX = 46  # the same left margin in both charts, so that their time axes align
_TICKS_HZ = (100, 500, 1000, 2000, 5000, 10000, 20000)
_SILENT_DB = -80.0


def waveform(picture: Picture, *, whole: bool = False) -> alt.LayerChart:
    """The waveform of a recording; the analysed part is marked, unless the ``whole`` was analysed."""
    outline = picture.waveform
    times = np.linspace(outline.start_s, outline.end_s, len(outline.low))
    sound = pd.DataFrame({"time_s": times, "low": outline.low, "high": outline.high})
    peak = max(0.02, float(np.abs([outline.low, outline.high]).max()))
    window = pd.DataFrame({"start": [picture.window_start_s], "end": [picture.window_start_s + picture.window_s]})
    span = _span(picture)
    height = alt.Scale(domain=[-peak, peak])
    marked = (
        alt.Chart(window)
        .mark_rect(color=ACCENT, opacity=0.22, stroke=ACCENT, strokeWidth=2, cornerRadius=3)
        .encode(x=alt.X("start:Q", scale=alt.Scale(domain=span, nice=False)), x2="end:Q")
    )
    drawn = (
        alt.Chart(sound)
        .mark_area(color=NEUTRAL, line=False)
        .encode(
            x=_time_axis("time_s:Q", span, title=None),
            y=alt.Y(
                "low:Q",
                scale=height,
                axis=alt.Axis(labels=False, ticks=False, grid=False, minExtent=_AXIS_PX + _TICK_PX),
                title=None,
            ),
            y2="high:Q",
            tooltip=[alt.Tooltip("time_s:Q", title="second", format=".2f")],
        )
    )
    return framed(WAVEFORM_PX, *([drawn] if whole else [marked, drawn]))


def spectrogram(picture: Picture, *, strip: bool = False) -> alt.LayerChart:
    """The model's log-mel input: time to the right, frequency upwards, brighter is louder; ``strip``: less high."""
    ticks = _TICKS_HZ[::2] if strip else _TICKS_HZ
    return framed(STRIP_PX if strip else PICTURE_PX, _ground(picture, heat(_shares(picture.level_db)), ticks_hz=ticks))


def overview(picture: Picture) -> alt.LayerChart:
    """The log-mel spectrogram of the whole recording, on the waveform's time axis."""
    outline = picture.waveform
    levels = heat(_shares(picture.overview_db or []))
    return framed(PICTURE_PX, _ground(picture, levels, (outline.start_s, outline.end_s), _span(picture)))


def _span(picture: Picture) -> list[float]:
    """Start and end of the time axis: the whole recording, and the padding where it is shorter than the window."""
    outline, end_s = picture.waveform, picture.window_start_s + picture.window_s
    return [min(outline.start_s, picture.window_start_s), max(outline.end_s, end_s)]


def mattered(explanation: Explanation) -> alt.LayerChart:
    """The spectrogram in grey, and over it how much each cell supports or opposes the answer."""
    picture = explanation.picture
    values = np.asarray(explanation.importance, dtype=float)
    most = max(float(np.abs(values).max()), 1e-9)
    bands = _band_of(explanation.frequency_hz, picture)
    bands[0], bands[-1] = 0.0, float(len(picture.frequency_hz))
    times = explanation.time_s
    rows, columns = values.shape
    cells = pd.DataFrame(
        {
            "start": times[column],
            "end": times[column + 1],
            "low": bands[row],
            "high": bands[row + 1],
            "strength": abs(values[row, column]) / most,
            "speaks": "for the answer" if values[row, column] > 0 else "against it",
            "pitch": f"{explanation.frequency_hz[row]:,.0f} to {explanation.frequency_hz[row + 1]:,.0f} Hz",
        }
        for row in range(rows)
        for column in range(columns)
    )
    patches = (
        alt.Chart(cells)
        .mark_rect()
        .encode(
            x="start:Q",
            x2="end:Q",
            y="low:Q",
            y2="high:Q",
            color=alt.Color(
                "speaks:N",
                scale=alt.Scale(domain=["for the answer", "against it"], range=[FOR, AGAINST]),
                legend=alt.Legend(title="This patch speaks", orient="bottom"),
            ),
            opacity=alt.Opacity("strength:Q", scale=alt.Scale(domain=[0, 1], range=[0, 0.9]), legend=None),
            tooltip=[
                alt.Tooltip("speaks:N", title="speaks"),
                alt.Tooltip("strength:Q", title="how much (most = 1)", format=".2f"),
                alt.Tooltip("start:Q", title="second", format=".2f"),
                alt.Tooltip("pitch:N", title="pitch"),
            ],
        )
    )
    return framed(PICTURE_PX + 120, _ground(picture, grey(_shares(picture.level_db))), patches)


def _ground(
    picture: Picture,
    colours: NDArray[np.uint8],
    place_s: tuple[float, float] | None = None,
    shown_s: Sequence[float] | None = None,
    ticks_hz: Sequence[int] = _TICKS_HZ,
) -> alt.Chart:
    """An image at times ``place_s`` (default: the model's window), on a time axis from and to ``shown_s``."""
    span = list(place_s or (picture.window_start_s, picture.window_start_s + picture.window_s))
    bands = len(picture.frequency_hz)
    ticks = [hz for hz in ticks_hz if picture.frequency_hz[0] <= hz <= picture.frequency_hz[-1]]
    at = [round(float(band), 3) for band in _band_of(ticks, picture)]
    names = {
        f"{band:g}": f"{hz:,} Hz" if hz < 1000 else f"{hz // 1000} kHz" for band, hz in zip(at, ticks, strict=True)
    }
    axis = alt.Axis(values=at, labelExpr=f"({names})[datum.value]", grid=False, minExtent=_AXIS_PX, maxExtent=_AXIS_PX)
    place = pd.DataFrame([{"start": span[0], "end": span[1], "low": 0, "high": bands, "picture": _data_url(colours)}])
    image: alt.Chart = (
        alt.Chart(place)
        .mark_image(aspect=False)
        .encode(
            x=_time_axis("start:Q", shown_s or span),
            x2="end:Q",
            y=alt.Y("low:Q", scale=alt.Scale(domain=[0, bands], nice=False), axis=axis, title=None),
            y2="high:Q",
            url="picture:N",
            tooltip=alt.value(None),
        )
    )
    return image


def _time_axis(field: str, span: Sequence[float], title: str | None = "seconds") -> alt.X:
    axis = alt.Axis(grid=False, format="~f", tickCount=8)
    if span[1] > _MINUTES_FROM_S:
        minutes = "floor(datum.value / 60) + ':' + format(datum.value % 60, '02')"
        axis, title = alt.Axis(grid=False, labelExpr=minutes, tickCount=8), title and "minutes : seconds"
    return alt.X(field, scale=alt.Scale(domain=list(span), nice=False), title=title, axis=axis)


def _shares(level_db: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """Levels in dB -> 0 (silent) to 1 (loudest), bands x frames, lowest band first."""
    shares: NDArray[np.float64] = np.clip(1.0 - np.asarray(level_db, dtype=float) / _SILENT_DB, 0.0, 1.0)
    return shares


def _band_of(frequencies_hz: Sequence[float], picture: Picture) -> NDArray[np.float64]:
    """Frequencies -> positions on the axis of bands; the centre of the first band is at 0.5."""
    centres = np.arange(len(picture.frequency_hz)) + 0.5
    bands: NDArray[np.float64] = np.interp(frequencies_hz, picture.frequency_hz, centres)
    return bands


def _data_url(colours: NDArray[np.uint8]) -> str:
    """Colours ``(bands, frames, 3)`` as a data URL of a PNG, lowest band at the bottom."""
    buffer = io.BytesIO()
    Image.fromarray(colours[::-1]).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def framed(height_px: int, *layers: alt.Chart) -> alt.LayerChart:
    """The layers as one chart without a frame; ``height_px`` is the height of the plot."""
    bare = alt.layer(*layers).properties(height=height_px, padding={"left": 0, "top": 2, "right": 2, "bottom": 2})
    return cast(alt.LayerChart, bare.configure_view(strokeWidth=0))
