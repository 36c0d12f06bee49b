"""Links of all documents lead somewhere (nothing is fetched); examples in docstrings and the notebook run."""

from __future__ import annotations

import ast
import doctest
import importlib
import pkgutil
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "notebooks/training_notebook.ipynb"
FOREIGN = {".venv", "node_modules", "runs", "RAVDESS"}
DOCUMENTS = [
    path
    for path in sorted(ROOT.rglob("*.md"))
    if not any(part in FOREIGN or part.startswith(".") for part in path.relative_to(ROOT).parts[:-1])
]
MODULES = [path for package in ("pipeline", "serve", "jobs") for path in sorted((ROOT / package).rglob("*.py"))]
WITH_EXAMPLES = [path for path in MODULES if ">>> " in path.read_text(encoding="utf-8")]


def without_code(text: str) -> str:
    return re.sub(r"^ *(```|~~~).*?^ *\1 *$", "", text, flags=re.MULTILINE | re.DOTALL)


def links(text: str) -> list[str]:
    """Targets of links, pictures, autolinks, reference definitions, and HTML attributes."""
    text = re.sub(r"(`+).+?\1", "`code`", without_code(text))
    found = re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)", text)
    found += re.findall(r"^\[[^\]]+\]:\s*(\S+)", text, flags=re.MULTILINE)
    found += re.findall(r"<(https?://[^>\s]+)>", text)
    return found + re.findall(r"(?:href|src|srcset)=\"([^\"]+)\"", text)


def anchors(text: str) -> set[str]:
    """Anchors of headings as GitHub makes them: lower case, punctuation dropped, blanks as hyphens, -1 for a second."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", without_code(text), flags=re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        number = 0
        while (name := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(name)
    return found


def leads_somewhere(target: str, document: Path) -> bool:
    parts = urlsplit(target)
    if parts.scheme in ("http", "https"):
        return re.fullmatch(r"(localhost|[\w.-]+\.[a-z0-9]{1,})(:\d+)?", parts.netloc) is not None
    if parts.scheme == "mailto":
        return "@" in parts.path
    file = (document.parent / unquote(parts.path)).resolve() if parts.path else document
    if parts.scheme or not file.is_relative_to(ROOT) or not file.exists():
        return False
    to_heading = parts.fragment and file.suffix == ".md"
    return not to_heading or parts.fragment in anchors(file.read_text(encoding="utf-8"))


@pytest.mark.docs
def test_links_lead_somewhere() -> None:
    wrong = links(
        "[a](nowhere.md) ![b](docs/none.png) [c](README.md#no-such-heading) [d](https://) [e](/etc/passwd)"
        ' <img src="x.png"> `[f](code.md)`\n```\n[g](fenced.md)\n```\n'
    )
    assert len(wrong) == 6
    assert not any(leads_somewhere(target, ROOT / "README.md") for target in wrong), "the check is blind"
    assert len(DOCUMENTS) > 8
    for document in DOCUMENTS:
        found = links(document.read_text(encoding="utf-8"))
        assert [target for target in found if not leads_somewhere(target, document)] == [], document


@pytest.mark.docs
@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: path.stem)
def test_examples_in_docstrings_run(path: Path) -> None:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    result = doctest.testmod(importlib.import_module(name.removesuffix(".__init__")))
    assert (result.attempted > 0, result.failed) == (True, 0)


@pytest.mark.docs
def test_what_packages_say_to_start_with_exists() -> None:
    for package in (path.parent.name for path in ROOT.glob("pipeline/*/__init__.py")):
        text = importlib.import_module(f"pipeline.{package}").__doc__ or ""
        names = re.findall(r"``([\w.]+)``", text.split("Start with:")[1])
        assert names, package
        for name in names:
            pkgutil.resolve_name(f"pipeline.{package}.{name}")


@pytest.mark.docs
def test_the_notebook_s_imports_are_there_and_its_stored_outputs_whole_small_and_without_speech() -> None:
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    imports = [n for cell in cells for n in ast.walk(ast.parse(cell.source)) if isinstance(n, ast.ImportFrom)]
    for node in imports:
        for name in node.names:
            pkgutil.resolve_name(f"{node.module}.{name.name}")
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text.encode()) < 2_000_000
    assert not re.search(r"/(home|root|work|tmp|Users)/", text), "paths of somebody's machine"
    counts = [cell.execution_count for cell in cells]
    assert counts == list(range(1, len(counts) + 1)), "run from top to bottom: python notebooks/execute.py"
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    players = [cell for cell in cells if "data:audio" in str(cell.outputs)]
    assert [re.findall(r"Audio\(filename=(\w+)", cell.source) for cell in players] == [["SAMPLES"]]
    stored = nbformat.v4.writes(nbformat.v4.new_notebook(cells=players))
    assert text.count("data:audio") == stored.count("data:audio") == 2


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(ravdess_like: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SER_NOTEBOOK_DATA", str(ravdess_like))
    monkeypatch.setenv("SER_NOTEBOOK_EPOCHS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    path = {"metadata": {"path": str(ROOT)}}
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources=path).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "64 recordings of 4 speakers" in printed
    assert "epoch 1  loss" in printed
    assert "precision" in printed
