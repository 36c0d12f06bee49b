"""The training notebook: runs on small synthetic recordings, calls the library, holds no logic, stores no speech."""

from __future__ import annotations

import ast
import pkgutil
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "notebooks/training_notebook.ipynb"
MAX_BYTES = 2_000_000


def cells() -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]


@pytest.mark.docs
def test_it_holds_no_logic() -> None:
    """No function, class, while, try or import of what the library is made of; loops only show things."""
    for cell in cells():
        tree = ast.parse(cell.source)
        logic = ast.FunctionDef | ast.ClassDef | ast.While | ast.Try | ast.If
        assert not [node for node in ast.walk(tree) if isinstance(node, logic)], cell.source
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                assert not {name.split(".")[0] for name in names} & {"torch", "librosa", "sklearn", "soundfile", "ray"}


@pytest.mark.docs
def test_what_it_imports_is_there() -> None:
    for cell in cells():
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pipeline"):
                for name in node.names:
                    pkgutil.resolve_name(f"{node.module}.{name.name}")


@pytest.mark.docs
def test_its_stored_outputs_are_whole_small_and_without_speech() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text.encode()) < MAX_BYTES
    assert not re.search(r"/(home|root|work|tmp|Users)/", text), "paths of somebody's machine"
    counts = [cell.execution_count for cell in cells()]
    assert counts == list(range(1, len(counts) + 1)), "run from top to bottom: python notebooks/execute.py"
    outputs = [output for cell in cells() for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    players = [cell for cell in cells() if "data:audio" in str(cell.outputs)]
    assert [re.findall(r"Audio\(filename=(\w+)", cell.source) for cell in players] == [["SAMPLES"]]
    stored = nbformat.v4.writes(nbformat.v4.new_notebook(cells=players))
    assert text.count("data:audio") == stored.count("data:audio") == 2


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(ravdess_like: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SER_NOTEBOOK_DATA", str(ravdess_like))
    monkeypatch.setenv("SER_NOTEBOOK_EPOCHS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    path = {"metadata": {"path": str(ROOT)}}
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources=path).execute()
    printed = "".join(
        output.get("text", "")
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "stream"
    )
    assert "64 recordings of 4 speakers" in printed
    assert "epoch 1  loss" in printed
    assert "precision" in printed
