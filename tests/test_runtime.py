"""Starting Ray: once, bound to loopback, tried again when a busy machine was too slow; other errors are told."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import pytest
import ray

from pipeline import runtime
from pipeline.errors import SerError


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """Replaces Ray's start: ``starts(errors...)`` raises them one after the other, then succeeds; returns the calls."""

    def prepare(*errors: Exception) -> list[dict[str, Any]]:
        left, calls = list(errors), []

        def init(**options: Any) -> None:
            calls.append(options)
            if left:
                raise left.pop(0)

        monkeypatch.setattr(ray, "init", init)
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(ray, "shutdown", lambda: None)
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        return calls

    return prepare


SLOW = "The current node timed out during startup."


def test_a_slow_start_is_tried_once_more(starts: Callable[..., list[dict[str, Any]]]) -> None:
    calls = starts(Exception(SLOW))
    runtime.start_ray(2)
    assert len(calls) == 2
    assert calls[0] == calls[1]
    assert calls[0]["address"] == "local"
    assert calls[0]["num_cpus"] == 2


def test_twice_too_slow_is_told(starts: Callable[..., list[dict[str, Any]]]) -> None:
    calls = starts(Exception(SLOW), Exception(SLOW))
    with pytest.raises(Exception, match="timed out"):
        runtime.start_ray()
    assert len(calls) == 2


def test_other_errors_are_not_tried_again(starts: Callable[..., list[dict[str, Any]]]) -> None:
    calls = starts(ValueError("no such option"))
    with pytest.raises(ValueError, match="no such option"):
        runtime.start_ray()
    assert len(calls) == 1


def test_a_given_cluster_is_joined_as_it_is(
    starts: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = starts()
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    runtime.start_ray(2)
    assert "num_cpus" not in calls[0]
    assert "address" not in calls[0]


def test_a_local_ray_is_bound_to_loopback(
    starts: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    starts()
    monkeypatch.delenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", raising=False)
    runtime.start_ray()
    assert os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"


def test_a_submitted_job_keeps_what_it_was_submitted_with(
    starts: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray refuses a variable that both the job and its driver set, and puts the upload on the path itself."""
    calls = starts()
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    given = {"runtime_env": {"env_vars": {"RAY_COLOR_PREFIX": "1", "MINE": "x"}, "working_dir": "gcs://a.zip"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(given))
    runtime.start_ray()
    sent = calls[0]["runtime_env"]["env_vars"]
    assert not set(sent) & {"RAY_COLOR_PREFIX", "MINE", "PYTHONPATH"}
    assert sent["RAY_USAGE_STATS_ENABLED"] == "0"
    assert ray.runtime_env.runtime_env._merge_runtime_env(given["runtime_env"], {"env_vars": sent}) is not None


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConnectionError("Could not find any running Ray instance."), "no Ray cluster answers at RAY_ADDRESS 10.0.0.1"),
        (ray.exceptions.AuthenticationError("no token"), "wants its token; copy the head's"),
    ],
)
def test_a_cluster_that_cannot_be_joined(
    starts: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    starts(error)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(SerError, match=words):
        runtime.start_ray()
