"""Dynamic batching: order, sizes, nobody waits, callers who go, failures. Time is told by events, not by sleeping."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import awaited

from serve.batching import Batcher, FairThreads, Share


class Gate:
    """Work that doubles numbers, and waits at each batch until it is let through."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.entered = threading.Semaphore(0)
        self.leave = threading.Semaphore(0)

    def __call__(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        self.entered.release()
        assert self.leave.acquire(timeout=10)
        return [2 * item for item in items]


async def one(batcher: Batcher[int, int], item: int) -> tuple[int, int]:
    """The result of a request of one item, and the size of its batch."""
    (found,) = await batcher.submit([item])
    assert found.begun_s <= found.ended_s
    return found.result, found.size


async def entered(gate: Gate) -> None:
    assert await asyncio.to_thread(gate.entered.acquire, timeout=10)


@awaited
async def test_what_gathers_while_a_batch_runs_is_the_next_one() -> None:
    gate = Gate()
    batcher: Batcher[int, int] = Batcher(gate, 3)
    first = asyncio.create_task(one(batcher, 1))
    await entered(gate)  # it did not wait for others
    others = [asyncio.create_task(one(batcher, item)) for item in range(2, 7)]
    await asyncio.sleep(0)
    assert batcher.waiting == 5
    gate.leave.release(3)
    assert await first == (2, 1)
    assert await asyncio.gather(*others) == [(4, 3), (6, 3), (8, 3), (10, 2), (12, 2)]
    assert gate.batches == [[1], [2, 3, 4], [5, 6]]
    assert batcher.waiting == 0


@awaited
async def test_callers_who_have_gone_are_left_out() -> None:
    gate = Gate()
    batcher: Batcher[int, int] = Batcher(gate, 2)
    gone = [asyncio.create_task(batcher.submit(range(100)))]  # two of them in work: their results are thrown away
    await entered(gate)
    stays = []
    for item in (7, 8):
        gone.append(asyncio.create_task(batcher.submit([0])))
        stays.append(asyncio.create_task(one(batcher, item)))
    await asyncio.sleep(0)
    for task in gone:
        task.cancel()
    await asyncio.wait(gone)
    gate.leave.release(9)
    assert await asyncio.gather(*stays) == [(14, 2), (16, 2)]
    assert gate.batches == [[0, 1], [7, 8]]


@awaited
async def test_a_failure_reaches_its_own_batch_or_step_and_no_other() -> None:
    def work(items: Sequence[int]) -> list[int]:
        if 0 in items:
            raise ZeroDivisionError
        return list(items)

    batcher: Batcher[int, int] = Batcher(work, 4)
    with pytest.raises(ZeroDivisionError):
        await one(batcher, 0)
    assert await one(batcher, 7) == (7, 1)
    threads, share = FairThreads(1, "test"), Share()
    with pytest.raises(ZeroDivisionError):
        await threads.run(Share(), lambda: 1 // 0)
    await threads.run(share, lambda: time.sleep(0.02))
    assert share.used_s >= 0.01


@settings(max_examples=30, deadline=None)
@given(items=st.lists(st.integers(), max_size=40), size=st.integers(1, 9))
@awaited
async def test_everybody_gets_their_own_answer(items: list[int], size: int) -> None:
    sizes = []

    def work(batch: Sequence[int]) -> list[int]:
        sizes.append(len(batch))
        return [item * item for item in batch]

    batcher: Batcher[int, int] = Batcher(work, size)
    answers = await asyncio.gather(*(one(batcher, item) for item in items))
    assert [answer for answer, _ in answers] == [item * item for item in items]
    assert sum(sizes) == len(items)
    assert max(sizes, default=1) <= size
    assert sorted(found for _, found in answers) == sorted(count for count in sizes for _ in range(count))


@awaited
async def test_requests_share_the_batches_in_turn() -> None:
    gate = Gate()
    batcher: Batcher[int, int] = Batcher(gate, 4)
    asked = [range(100, 110), range(2), range(10, 12), range(200, 203)]
    tasks = [asyncio.create_task(batcher.submit(asked[0]))]
    await entered(gate)
    tasks += [asyncio.create_task(batcher.submit(items)) for items in asked[1:]]
    await asyncio.sleep(0)
    gate.leave.release(9)
    for task, items in zip(tasks, asked, strict=True):
        assert [found.result for found in await task] == [2 * item for item in items]
    assert gate.batches[:3] == [[100, 101, 102, 103], [104, 0, 10, 200], [105, 1, 11, 201]]
    assert gate.batches[3:] == [[106, 202, 107, 108], [109]]


class Steps:
    """Steps in threads that say when they begin, and wait until they may end."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.entered = threading.Semaphore(0)
        self.leave: dict[str, threading.Event] = {}

    def of(self, name: str) -> Callable[[], str]:
        self.leave[name] = threading.Event()

        def step() -> str:
            self.begun.append(name)
            self.entered.release()
            assert self.leave[name].wait(10)
            return name

        return step


@awaited
async def test_a_newcomer_goes_before_those_who_have_had_much_and_finds_a_thread() -> None:
    threads, steps, running = FairThreads(2, "test"), Steps(), {}

    async def start(name: str, share: Share) -> None:
        running[name] = asyncio.create_task(threads.run(share, steps.of(name)))
        await asyncio.sleep(0)

    async def begun(*names: str) -> None:
        assert await asyncio.to_thread(steps.entered.acquire, timeout=10)
        assert steps.begun == list(names)

    await start("long 1", Share(50.0))
    await start("long 2", Share(50.0))
    await start("long 3", Share(expected_s=50.0))
    await begun("long 1")  # the other thread is kept free
    await start("new 1", Share())
    await begun("long 1", "new 1")
    await start("new 2", Share())
    await start("gone", Share())
    running.pop("gone").cancel()
    steps.leave["long 1"].set()
    assert await running["long 1"] == "long 1"
    await begun("long 1", "new 1", "new 2")
    for event in steps.leave.values():
        event.set()
    assert await asyncio.gather(*running.values()) == list(running)
    assert steps.begun[3:] == ["long 2", "long 3"]


@awaited
async def test_many_newcomers_do_not_keep_long_work_waiting_for_ever() -> None:
    threads, order = FairThreads(1, "test"), []
    loop = asyncio.get_running_loop()
    now_s = loop.time()
    loop.time = lambda: now_s  # type: ignore[method-assign]
    first = asyncio.create_task(threads.run(Share(), lambda: order.append("first")))
    waiting = [asyncio.create_task(threads.run(Share(1e9), lambda: order.append("long")))]
    await asyncio.sleep(0)
    now_s += 60
    waiting += [asyncio.create_task(threads.run(Share(), lambda: order.append("new"))) for _ in range(9)]
    await asyncio.gather(first, *waiting)
    assert order[:2] == ["first", "long"]
