"""Dynamic batching: order, sizes, nobody waits, callers who go, failures. Time is told by events, not by sleeping."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.batching import Batcher


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


async def entered(gate: Gate) -> None:
    assert await asyncio.to_thread(gate.entered.acquire, timeout=10)


def test_what_gathers_while_a_batch_runs_is_the_next_one() -> None:
    async def scenario() -> None:
        gate = Gate()
        batcher: Batcher[int, int] = Batcher(gate, 3)
        first = asyncio.create_task(batcher.submit(1))
        await entered(gate)  # it did not wait for others
        others = [asyncio.create_task(batcher.submit(item)) for item in range(2, 7)]
        await asyncio.sleep(0)
        assert batcher.waiting == 5
        gate.leave.release(3)
        assert await first == (2, 1)
        assert await asyncio.gather(*others) == [(4, 3), (6, 3), (8, 3), (10, 2), (12, 2)]
        assert gate.batches == [[1], [2, 3, 4], [5, 6]]
        assert batcher.waiting == 0

    asyncio.run(scenario())


def test_callers_who_have_gone_are_left_out() -> None:
    async def scenario() -> None:
        gate = Gate()
        batcher: Batcher[int, int] = Batcher(gate, 2)
        first = asyncio.create_task(batcher.submit(1))
        await entered(gate)
        waiting = [asyncio.create_task(batcher.submit(item)) for item in range(2, 6)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        waiting[2].cancel()
        await asyncio.sleep(0)
        first.cancel()  # in work already: its result is thrown away, the others are not disturbed
        gate.leave.release(2)
        assert await waiting[1] == (6, 2)
        assert await waiting[3] == (10, 2)
        assert gate.batches == [[1], [3, 5]]

    asyncio.run(scenario())


def test_a_failure_reaches_its_batch_and_no_other() -> None:
    def work(items: Sequence[int]) -> list[int]:
        if 0 in items:
            raise ZeroDivisionError
        return list(items)

    async def scenario() -> None:
        batcher: Batcher[int, int] = Batcher(work, 4)
        with pytest.raises(ZeroDivisionError):
            await batcher.submit(0)
        assert await batcher.submit(7) == (7, 1)

    asyncio.run(scenario())


@settings(max_examples=30, deadline=None)
@given(items=st.lists(st.integers(), max_size=40), size=st.integers(1, 9))
def test_everybody_gets_their_own_answer(items: list[int], size: int) -> None:
    sizes = []

    def work(batch: Sequence[int]) -> list[int]:
        sizes.append(len(batch))
        return [item * item for item in batch]

    async def scenario() -> list[tuple[int, int]]:
        batcher: Batcher[int, int] = Batcher(work, size)
        return await asyncio.gather(*(batcher.submit(item) for item in items))

    answers = asyncio.run(scenario())
    assert [answer for answer, _ in answers] == [item * item for item in items]
    assert sum(sizes) == len(items)
    assert max(sizes, default=1) <= size
    assert sorted(found for _, found in answers) == sorted(count for count in sizes for _ in range(count))
