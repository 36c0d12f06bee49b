"""Run all checks of schemathesis against the service, with requests made from its OpenAPI document.

    make fuzz-api         (installs schemathesis; or: python -m benchmarks.fuzz_api [--examples 100 --seed 0])

The service has an API key, so that authentication is checked too. The exit code is that of schemathesis.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.services import ROOT, ours, started

KEY = "key-of-the-fuzz-run"


def main() -> int:
    """Start the service, run schemathesis, stop the service."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=100, help="at most, per operation and phase")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=("ray", "local"), default="ray")
    arguments = parser.parse_args()
    os.environ["SER_API_KEY"] = KEY
    with started(ours("--engine", arguments.engine)) as service:
        words = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{service.url}/openapi.json"]
        words += ["--checks", "all", "--header", f"Authorization: Bearer {KEY}", "--request-timeout", "60"]
        words += ["--max-examples", str(arguments.examples), "--seed", str(arguments.seed)]
        hooks = {"SCHEMATHESIS_HOOKS": "benchmarks.fuzz_api_hooks", "PYTHONPATH": str(ROOT)}
        return subprocess.run(words, cwd=ROOT, env=os.environ | hooks, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
