"""Fonts for text in any script: matplotlib's own font, DejaVu Sans, has no Chinese, Japanese, Korean, Thai or Hindi.

Of the fonts that the machine has, those are added that have the most of what is missing (TrueType and OpenType cmap
tables). Limits: letters are set one beside the other, as matplotlib does: no ligatures, and Arabic stays unjoined.
"""

from __future__ import annotations

import logging
import warnings
from functools import cache

from matplotlib.font_manager import FontProperties, findfont, findSystemFonts, fontManager, get_font

from pipeline.storage.errors import SerWarning

OWN = "DejaVu Sans"


@cache
def families(text: str) -> tuple[str, ...]:
    """The font families that together have every sign of ``text``, matplotlib's own first.

    Warns:
        SerWarning: no font of this machine has some of the signs, which are drawn as boxes; it says what to install.
    """
    missing = {ord(sign) for sign in text if not sign.isspace()} - _signs(findfont(OWN))
    found = [OWN]
    if not missing:
        return (OWN,)
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # that such a font has no bold is no news
    others = {path: _signs(path) for path in sorted(findSystemFonts())}
    while best := max(others, key=lambda path: len(missing & others[path]), default=None):
        if not missing & others[best]:
            break
        fontManager.addfont(best)
        found.append(FontProperties(fname=best).get_name())
        missing -= others.pop(best)
    if missing:
        signs = "".join(chr(code) for code in sorted(missing)[:8])
        warnings.warn(
            f"no font on this machine has {signs}: boxes stand for it in pictures; install one that has, for example "
            "the package fonts-noto-cjk",
            SerWarning,
            stacklevel=2,
        )
    return tuple(found)


def _signs(path: str) -> set[int]:
    """The code points that the font file ``path`` has drawings of; none where it cannot be read."""
    if "lastresort" in path.lower():  # macOS: a box for every code point that there is
        return set()
    try:
        font = get_font(path)
        return set(font.get_charmap()) if font.scalable else set()  # matplotlib draws no pictures of signs
    except (OSError, RuntimeError):
        return set()
