"""Links of all documents: files and headings are there; addresses elsewhere are well formed (nothing is fetched)."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytestmark = pytest.mark.docs
ROOT = Path(__file__).resolve().parents[2]
_SKIPPED = {".venv", "node_modules", "runs", "RAVDESS"}


def documents() -> list[Path]:
    found = (path for path in ROOT.rglob("*.md") if not _SKIPPED & set(path.relative_to(ROOT).parts))
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(ROOT).parts[:-1]))


def prose(text: str) -> str:
    """The text without fenced code and code spans."""
    text = re.sub(r"^ *(```|~~~).*?^ *\1 *$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(`+).+?\1", "`code`", text)


def links(text: str) -> list[str]:
    """Targets of links, pictures, autolinks, reference definitions, and HTML attributes."""
    text = prose(text)
    found = re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)", text)
    found += re.findall(r"^\[[^\]]+\]:\s*(\S+)", text, flags=re.MULTILINE)
    found += re.findall(r"<(https?://[^>\s]+)>", text)
    return found + re.findall(r"(?:href|src|srcset)=\"([^\"]+)\"", text)


def anchors(text: str) -> set[str]:
    """Anchors of headings as GitHub makes them: lower case, punctuation dropped, blanks as hyphens, -1 for a second."""
    found: set[str] = set()
    fenceless = re.sub(r"^ *(```|~~~).*?^ *\1 *$", "", text, flags=re.MULTILINE | re.DOTALL)
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", fenceless, flags=re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        number = 0
        while (name := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(name)
    return found


def fault(target: str, document: Path) -> str | None:
    """What is wrong with a link, or None."""
    parts = urlsplit(target)
    if parts.scheme in ("http", "https"):
        fine = re.fullmatch(r"(localhost|[\w.-]+\.[a-z0-9]{1,})(:\d+)?", parts.netloc)
        return None if fine and " " not in target else "no well-formed address"
    if parts.scheme == "mailto":
        return None if "@" in parts.path else "no address"
    if parts.scheme or target.startswith("/"):
        return "neither an address nor a path within the project"
    file = (document.parent / unquote(parts.path)).resolve() if parts.path else document
    if not file.is_relative_to(ROOT):
        return "leaves the project"
    if not file.exists():
        return "no such file"
    if parts.fragment and file.suffix == ".md" and parts.fragment not in anchors(file.read_text(encoding="utf-8")):
        return "no such heading"
    return None


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    faults = {
        target: problem
        for target in links(document.read_text(encoding="utf-8"))
        if (problem := fault(target, document)) is not None
    }
    assert not faults


def test_the_check_sees_what_is_wrong(tmp_path: Path) -> None:
    readme = ROOT / "README.md"
    text = "[a](nowhere.md) ![b](docs/none.png) [c](README.md#no-such-heading) [d](https://) [e](/etc/passwd)"
    text += ' <img src="x.png">'
    found = links(f"{text} `[f](code.md)`\n```\n[g](fenced.md)\n```\n")
    assert found == ["nowhere.md", "docs/none.png", "README.md#no-such-heading", "https://", "/etc/passwd", "x.png"]
    assert all(fault(target, readme) for target in found)
    assert anchors("# A `b`, c!\n# A b c\n```\n# no\n```\n") == {"a-b-c", "a-b-c-1"}
    assert len(documents()) > 8
