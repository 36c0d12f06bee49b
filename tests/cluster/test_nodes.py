"""What is checked before work is spread over nodes: each node's answer is the real one, only the nodes are made up."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from pipeline.cluster import engine as cluster
from pipeline.cluster.engine import Node, NodeError, check_nodes

TWO = [Node("aa", "one (10.0.0.1)", 2), Node("bb", "two (10.0.0.2)", 2)]
Ask = Callable[[Sequence[Node], str, str, Sequence[str]], dict[Node, str | None]]


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``nodes(TWO, ask)``: a cluster that was joined; ``ask`` answers for the nodes, by default as we do."""

    def here(found: Sequence[Node], probe: str, content: str, paths: Sequence[str]) -> dict[Node, str | None]:
        return {node: cluster._look(probe, content, paths, node.id) for node in found}

    def prepare(found: list[Node], ask: Ask = here) -> None:
        monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
        monkeypatch.setattr(cluster, "start_ray", lambda: None)
        monkeypatch.setattr(cluster, "alive_nodes", lambda: found)
        monkeypatch.setattr(cluster, "_ask", ask)

    return prepare


def test_nodes_that_share_everything_pass_and_nothing_is_left(nodes: Callable[..., None], tmp_path: Path) -> None:
    nodes(TWO)
    (tmp_path / "a.wav").write_bytes(b"x")
    out = tmp_path / "out"
    out.mkdir()
    check_nodes(out, [tmp_path / "a.wav"], some_of=[str(tmp_path / "missing.wav"), "s3://bucket/b.wav"])
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    ("differs", "words"),
    [
        ("unseen", "two (10.0.0.2) does not see {out}"),
        ("other", "two (10.0.0.2) has another folder at {out}"),
        ("data", "two (10.0.0.2) cannot read {data}"),
        ("late", "two (10.0.0.2) in {out} are not visible here"),
    ],
)
def test_one_line_names_the_node_the_path_and_the_remedy(
    nodes: Callable[..., None], tmp_path: Path, differs: str, words: str
) -> None:
    out, data, elsewhere = tmp_path / "out", tmp_path / "a.wav", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    data.write_bytes(b"x")

    def ask(found: Sequence[Node], probe: str, content: str, paths: Sequence[str]) -> dict[Node, str | None]:
        assert str(data) in paths
        answers: dict[Node, str | None] = {TWO[0]: cluster._look(probe, content, paths, "aa")}
        if differs == "unseen":
            Path(probe).unlink()
        elif differs == "other":
            Path(probe).write_text("another")
        elif differs == "data":
            data.unlink()
        answers[TWO[1]] = cluster._look(probe, content, paths, "bb")
        if differs == "late":
            Path(f"{probe}.bb").unlink()
        return answers

    nodes(TWO, ask)
    with pytest.raises(NodeError) as caught:
        check_nodes(out, [data])
    assert words.format(out=out, data=data) in str(caught.value)
    assert "docs/cluster.md" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert list(out.iterdir()) == []


def test_one_node_or_a_local_ray_is_not_asked(
    nodes: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for found in ([], TWO[:1]):
        nodes(found, lambda *_: pytest.fail("asked"))
        check_nodes(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setattr(cluster, "alive_nodes", lambda: pytest.fail("asked"))
    check_nodes(tmp_path)


def test_results_in_rays_copy_of_the_upload_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    out = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1" / "out"
    with pytest.raises(NodeError, match="would be lost"):
        check_nodes(out)


def test_of_many_recordings_some_are_tried_and_the_last(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{i}.wav") for i in range(10_001)]
    some = cluster._spread(paths)
    assert len(some) < 40
    assert some[0] == paths[0]
    assert some[-1] == paths[-1]
    assert cluster._spread([]) == []


def test_cpus_of_a_worker_fit_on_one_node(nodes: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    for cpus, workers, each in (
        *(([1, 1, 1], 2, 1), ([4, 4], 2, 4), ([4, 4], 4, 2), ([16, 2], 2, 8)),
        *(([16, 2], 3, 5), ([1], 5, 1), ([], 2, 1)),
    ):
        nodes([Node(str(i), str(i), n) for i, n in enumerate(cpus)])
        assert cluster.cpus_a_worker(workers) == each
    monkeypatch.delenv("RAY_ADDRESS")
    assert cluster.cpus_a_worker(1) == len(os.sched_getaffinity(0)), "of this machine"
    assert cluster.cpus_a_worker(10_000) == 1
