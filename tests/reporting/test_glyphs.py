from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from made_predictions import made_predictions
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.image import imread

from jobs._common import Parser, run
from pipeline.reporting import figures
from pipeline.reporting.report import write_report

SIZE_PT, DPI = 30, 100


def made_font(path: Path, family: str, signs: str) -> str:
    """A font whose every sign is one filled square."""
    names = [".notdef", *(f"sign{ord(sign):x}" for sign in signs)]
    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    for corner in ((100, 800), (900, 800), (900, 0)):
        pen.lineTo(corner)
    pen.closePath()
    square, empty = pen.glyph(), TTGlyphPen(None).glyph()
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder(names)
    font.setupCharacterMap({ord(sign): name for sign, name in zip(signs, names[1:], strict=True)})
    font.setupGlyf({name: square if name != ".notdef" else empty for name in names})
    font.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": family, "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(path)
    return str(path)


@pytest.fixture
def fonts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the machine has; a test may add to it."""
    found: list[str] = []
    monkeypatch.setattr(figures, "findSystemFonts", lambda: found)
    figures.families.cache_clear()
    yield found
    figures.families.cache_clear()


def drawn(text: str, families: tuple[str, ...]) -> float:
    """How many pixels of ink a text takes."""
    with rc_context({"font.family": families}), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure = Figure(figsize=(2, 1))
        figure.text(0.1, 0.3, text, size=SIZE_PT)
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=DPI)
    return float((1 - imread(io.BytesIO(buffer.getvalue()))[..., 0]).sum())


def test_fonts_with_the_signs_are_found_and_draw_them(fonts: list[str], tmp_path: Path) -> None:
    (tmp_path / "torn.ttf").write_bytes(b"\0\1\0\0 not a font")
    fonts += [str(tmp_path / "torn.ttf"), made_font(tmp_path / "han.ttf", "Made Han", "愤怒悲")]
    fonts += [made_font(tmp_path / "b.ttf", "Made B", "기쁨伤静")]
    assert figures.families("sad, triste, грустный, λυπημένος") == ("DejaVu Sans",)
    found = figures.families("angry 愤怒")
    assert found == ("DejaVu Sans", "Made Han")
    side_px = 0.8 * SIZE_PT / 72 * DPI
    assert drawn("愤怒", found) == pytest.approx(2 * side_px**2, rel=0.02)  # two filled squares, not two empty boxes
    assert figures.families("悲기쁨") == ("DejaVu Sans", "Made B", "Made Han"), "the one with most signs first"


def test_a_report_tells_once_that_a_font_is_missing(
    fonts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = ["平静", "悲伤"]
    fonts.append(made_font(tmp_path / "LastResort.otf", "Last", "平静悲伤"))  # has an empty box for every sign

    def job(_: object) -> int:
        write_report(made_predictions(40, labels), labels, tmp_path / "report", meta={})
        return 0

    assert run(job, Parser(prog="report"), []) == 0
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("warning: no font")
    assert all(sign in told for sign in "平静悲伤")
    assert (tmp_path / "report" / "confusion_matrix.png").is_file()
