"""Jobs on nodes that see only the shared folder, and one of each failure; ``make test-cluster`` does more of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_nodes_die_and_nothing_is_lost(tmp_path: Path) -> None:
    words = ["--kills", "1", "--cuts", "1", "--head_restarts", "1", "--files", "600", "--epochs", "3"]
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.cluster_nodes", *words, "--scratch", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "0 runs were not right" in run.stdout
