"""Run the training notebook and store its outputs in it.

    SER_NOTEBOOK_DATA=/path/to/RAVDESS SER_NOTEBOOK_EPOCHS=6 python notebooks/execute.py [OUT.ipynb]

Needs the packages of requirements-dev.txt. Without the variables, the clips of samples/ and two epochs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().with_name("training_notebook.ipynb")


def execute(out: Path) -> None:
    """Run every cell in a fresh kernel whose working directory is the project's root, and write the notebook."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(NOTEBOOK.parents[1])}},
    )
    client.execute()
    nbformat.write(notebook, out)


if __name__ == "__main__":
    execute(Path(sys.argv[1]) if len(sys.argv) > 1 else NOTEBOOK)
