"""Run extraction, training and scoring on several nodes while nodes are killed, disconnected, or the head restarts.

    python -m benchmarks.cluster_nodes [--nodes 3 --kills 5 --cuts 1 --head_restarts 1 --files 1200 --seed 0]
    python -m benchmarks.cluster_nodes --scaling --files 3600 --block_rows 64 [--turns 3]

The nodes are network namespaces of this machine where that is permitted (root, iproute2), see ``tests.support.hosts``.
First each job runs once undisturbed with ``ray job submit``, and the nodes that work on it are counted. Then the jobs
run with ``ser submit`` and one failure each, at a share of the work drawn from ``--seed``: ``--kills`` times a node is
killed (all its processes; never the head), ``--cuts`` times a node has no network for 20 s, ``--head_restarts`` times
the head is killed. A job that stops is submitted again (training with ``--resume``). Lost, doubled and different rows
are counted against the undisturbed run. ``--scaling`` instead measures extraction and scoring on 1 and on 2 nodes. Each
has one CPU for all its processes: Ray's, the job's and its workers'.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from tests.support.cluster_jobs import Running, Work, evaluation, extraction, make_recordings, scoring, training
from tests.support.hosts import Host, Hosts
from tests.support.processes import machine

CUT_S = 20.0
LAST = {"extract": "manifest.json", "score": "run.json"}  # the last file of a job
MOST = 4  # maximum number of submissions of one job


def report(*cells: object) -> None:
    """Print a row of a Markdown table without buffering."""
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def undisturbed(hosts: Hosts, work: Work) -> bool:
    """Run a job with ``ray job submit``, print the nodes that worked; True where the outcome is right."""
    out = hosts.shared / f"{work.kind}-undisturbed"
    running = Running(hosts, work, out, plain=True)
    code = running.finish()
    if code:
        raise SystemExit(f"{' '.join(running.command)}\nended with {code}:\n{running.text()[-4000:]}")
    wanted, lost, doubled, different = work.check(out)
    places = ", ".join(f"{name} {count}" for name, count in running.seen.items())
    report(work.kind, wanted, lost, doubled, different, f"{running.seconds:.0f} s", places)
    return sum(count > 0 for count in running.seen.values()) > 1 and not (lost or doubled or different)


def disturb(hosts: Hosts, event: str, victim: Host) -> str:
    """Cause one failure; returns its description."""
    if event == "cut":
        hosts.cut(victim, CUT_S)
        return f"{victim.name} without network for {CUT_S:.0f} s"
    if event == "head":
        return f"head killed, {hosts.kill(hosts.head)} processes"
    return f"{victim.name} killed, {hosts.kill(victim)} processes"


def disturbed(hosts: Hosts, work: Work, event: str, number: int, rng: np.random.Generator) -> bool:
    """Run a job with one failure, submit it again until done, print a row; True where the outcome is right."""
    out = hosts.shared / f"{work.kind}-{event}-{number}"
    share = float(rng.uniform(0.05, 0.85))
    running = Running(hosts, work, out, plain=False)
    if not running.watch(share):
        report(work.kind, "nothing", f"{share:.0%} wanted", f"ended before: {running.complaint()}", *"-----")
        return False
    busy = [host for host in hosts.all[1:] if hosts.working(host, *work.titles)] or hosts.all[1:]
    found, what = work.progress(out), disturb(hosts, event, busy[int(rng.integers(len(busy)))])
    code, told, given = running.finish(), "", 1
    while code and given < MOST:
        told = told or f"stopped with {code}: {running.complaint()[:200]}"
        hosts.repair()
        begun = work.kind != "train" or (out / "checkpoint.pt").is_file()
        running = Running(hosts, work, out, plain=False, again=begun)
        code, given = running.finish(), given + 1
    wanted, lost, doubled, different = work.check(out) if code == 0 else (0, -1, -1, -1)
    report(work.kind, what, f"{found:.0%}", told or "continued", given, wanted, lost, doubled, different)
    hosts.repair()
    return not (code or lost or doubled or different)


def failures(hosts: Hosts, works: list[Work], arguments: argparse.Namespace) -> int:
    """Print the table of failures; returns the number of wrong runs."""
    rng = np.random.default_rng(arguments.seed)
    if arguments.cuts and not hosts.real:
        print("no network outages: there are no namespaces here", flush=True)
    counts = {"kill": arguments.kills, "cut": arguments.cuts if hosts.real else 0, "head": arguments.head_restarts}
    report("job", "what happened", "at", "the job", "given", "rows", "lost", "doubled", "different")
    report(*["---"] * 9)
    todo = [(work, event, n) for work in works for event, count in counts.items() for n in range(count)]
    return sum(not disturbed(hosts, work, event, number, rng) for work, event, number in todo)


def first_rows(data: Path, count: int) -> Path:
    """Write a manifest of the first recordings, beside the whole one."""
    path = data.with_name(f"first-{count}.csv")
    pd.read_csv(data).head(count).to_csv(path, index=False)
    return path


def scaling(arguments: argparse.Namespace, folder: Path) -> None:
    """Print seconds of extraction and scoring on 1 and on 2 nodes, in turns: of a large run minus those of a third.

    A third is enough for the workers of all nodes to be running long before the end. The time is that of the job's last
    file, because polling a job has a resolution of one second.
    """
    report("job", "turn", "1 node", "2 nodes", "efficiency")
    report(*["---"] * 5)
    took: dict[tuple[str, int], list[float]] = {}
    small = max(arguments.block_rows * 2, arguments.files // 3)
    for turn in range(1, arguments.turns + 1):
        for nodes in (1, 2):
            place = folder / f"{turn}-{nodes}"
            with Hosts(place, nodes, namespaces=not arguments.loopback, pinned=True) as hosts:
                data = make_recordings(hosts.shared, arguments.files)
                for kind, make in (("extract", extraction), ("score", scoring)):
                    seconds = []  # the first is of a warm-up: uploads, exports, file cache
                    for count in (small, small, arguments.files):
                        work = make(first_rows(data, count), count, arguments.block_rows)
                        out, begun_s = hosts.shared / f"{kind}-{len(seconds)}", time.time()
                        running = Running(hosts, work, out, plain=False)
                        if running.process.wait():  # looking for the working nodes would cost CPU time
                            raise SystemExit(running.text()[-3000:])
                        seconds.append((out / LAST[kind]).stat().st_mtime - begun_s)
                    took.setdefault((kind, nodes), []).append(seconds[2] - seconds[1])
        for kind in ("extract", "score"):
            _efficiency(kind, turn, took[kind, 1][-1], took[kind, 2][-1])
    for kind in ("extract", "score"):
        _efficiency(kind, "median", statistics.median(took[kind, 1]), statistics.median(took[kind, 2]))


def _efficiency(kind: str, turn: object, one_s: float, two_s: float) -> None:
    report(kind, turn, f"{one_s:.1f} s", f"{two_s:.1f} s", f"{one_s / (2 * two_s):.2f}")


def run(arguments: argparse.Namespace, folder: Path) -> int:
    """Run the jobs undisturbed, then with failures; returns the number of wrong runs."""
    with Hosts(folder, arguments.nodes, namespaces=not arguments.loopback) as hosts:
        print(f"{arguments.nodes} nodes with 1 CPU each: {hosts.kind}", flush=True)
        data = make_recordings(hosts.shared, arguments.files)
        clips = first_rows(data, arguments.clips)
        short = extraction(clips, arguments.clips, arguments.block_rows)
        extract = extraction(data, arguments.files, arguments.block_rows)
        train = training(hosts.shared / "features", arguments.epochs)
        score = scoring(data, arguments.files, arguments.block_rows)
        if Running(hosts, short, hosts.shared / "features", plain=True).finish():
            raise SystemExit("the recordings for training could not be extracted")
        report("job", "rows", "lost", "doubled", "different", "took", "busy workers seen on (samples)")
        report(*["---"] * 7)
        evaluate = evaluation(data, arguments.files)
        wrong = sum(not undisturbed(hosts, work) for work in (extract, train, score, evaluate))
        score = scoring(data, arguments.files, arguments.block_rows, hosts.shared / "score-undisturbed")
        return wrong + failures(hosts, [extract, train, score], arguments)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--files", type=int, default=1200, help="recordings to extract and to score, made here")
    parser.add_argument("--clips", type=int, default=64, help="recordings to train on")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--block_rows", type=int, default=16)
    parser.add_argument("--kills", type=int, default=5, help="kills of a node in each job")
    parser.add_argument("--cuts", type=int, default=1, help=f"network outages of {CUT_S:.0f} s in each job")
    parser.add_argument("--head_restarts", type=int, default=1, help="kills of the head in each job")
    parser.add_argument("--scaling", action="store_true", help="measure 1 and 2 nodes instead")
    parser.add_argument("--turns", type=int, default=3, help="turns of --scaling")
    parser.add_argument("--loopback", action="store_true", help="loopback addresses instead of namespaces")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", type=Path, default=Path("/var/tmp"), help="not below /tmp: each node has its own")
    arguments = parser.parse_args()
    print(f"machine: {machine()}; load {os.getloadavg()[0]:.1f}; seed {arguments.seed}", flush=True)
    with tempfile.TemporaryDirectory(dir=arguments.scratch, prefix="ser-nodes-", ignore_cleanup_errors=True) as scratch:
        start_s = time.monotonic()
        if arguments.scaling:
            scaling(arguments, Path(scratch))
            return 0
        wrong = run(arguments, Path(scratch) / "cluster")
        print(f"{wrong} wrong runs; {time.monotonic() - start_s:.0f} s in all")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
