"""Jobs on nodes that see only the shared folder: exit codes, refusals, failures; ``make test-cluster`` does more."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster_jobs import Running, Work, extraction, make_recordings
from tests.support.hosts import Hosts


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder that is not below /tmp, of which each host has its own."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="ser-nodes-", ignore_cleanup_errors=True) as found:
        yield Path(found)


def given(hosts: Hosts, work: Work, out: Path, *, plain: bool) -> tuple[int, str]:
    """Exit code and output of a job."""
    running = Running(hosts, work, out, plain=plain)
    return running.finish(), running.text()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_job_on_a_cluster_of_one(scratch: Path) -> None:
    with Hosts(scratch / "cluster", 1) as hosts:
        data = make_recordings(hosts.shared, 6)
        (hosts.shared / "audio" / "00003.wav").write_bytes(b"no audio")
        work = extraction(data, 6, 2)
        code, text = given(hosts, work, hosts.shared / "out", plain=False)
        assert code == 4, text
        assert "6 rows, 1 failed" in text
        assert "MiB (code" in text
        code, text = given(hosts, work, hosts.shared / "plain", plain=True)
        assert code == 1, "ray job submit tells success from failure only"
        assert "6 rows, 1 failed" in text
        code, text = given(hosts, work, Path("relative"), plain=True)
        assert code == 1
        assert "would be lost: it is in Ray's temporary copy" in text


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_node_that_does_not_see_the_data_is_named(scratch: Path) -> None:
    with Hosts(scratch / "cluster", 2) as hosts:
        if not hosts.real:
            pytest.skip("needs network namespaces: nodes on loopback see everything")
        work = extraction(make_recordings(hosts.shared, 4), 4, 2)
        private = Path("/tmp/out")  # each host has a /tmp of its own
        code, text = given(hosts, work, private, plain=False)
        assert code == 2, text
        assert f"error: node node-2 ({hosts.all[1].address}) does not see /tmp/out" in text
        assert "Traceback" not in text
