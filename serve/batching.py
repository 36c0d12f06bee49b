"""Who goes next: dynamic batches for the network, and threads for the steps of long work. Nobody stops the others.

Whatever gathered while the last batch was worked on becomes the next one (``Batcher``), which takes one item of each
request in turn, so that a recording of 1,800 windows and one of two share the batches. Under light load a batch holds
one item and costs no delay; under heavy load batches grow by themselves. Long work comes in steps (``FairThreads``):
requests that have had little time go before those that have had much. What callers who have gone had waiting is left
out. To be used from one event loop.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
_LITTLE_S = 1.0  # whoever has had less of a thread has one kept free
_MOST_BEHIND_S = 2.0  # so much later may a step begin than one that came with it, however much its request has had


@dataclass(eq=False)
class Share:
    """One request among several.

    Attributes:
        used_s: of a thread, so far.
        expected_s: what its size lets expect, so that several long ones that come together do not count as new.
    """

    used_s: float = 0.0
    expected_s: float = 0.0

    @property
    def weight_s(self) -> float:
        """The more, the later its next step."""
        return self.used_s + self.expected_s


class Batched(NamedTuple, Generic[Result]):
    """The result of an item, the items in its batch, and when that began and ended (``time.monotonic``)."""

    result: Result
    size: int
    begun_s: float
    ended_s: float


class Batcher(Generic[Item, Result]):
    """Runs ``work`` on batches of at most ``size`` items, one batch at a time, in a thread of its own.

    Args:
        work: gets items, returns as many results in their order.
    """

    def __init__(self, work: Callable[[Sequence[Item]], Sequence[Result]], size: int) -> None:
        self._work, self._size = work, size
        self._waiting: dict[Share, deque[tuple[Item, asyncio.Future[Batched[Result]]]]] = {}  # whose turn it is, first
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="network")
        self._task: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Requests with items that are in no batch yet."""
        return len(self._waiting)

    async def submit(self, items: Sequence[Item], share: Share | None = None) -> list[Batched[Result]]:
        """The results of a request's items, one or more, in order. Raises what ``work`` raised."""
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[Batched[Result]]] = [loop.create_future() for _ in items]
        self._waiting.setdefault(share or Share(), deque()).extend(zip(items, futures, strict=True))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        return list(await asyncio.gather(*futures))  # a caller who goes cancels them all

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while batch := self._next():
            begun_s = time.monotonic()
            try:
                results = await loop.run_in_executor(self._thread, self._work, [item for item, _ in batch])
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            ended_s = time.monotonic()
            for (_, future), result in zip(batch, results, strict=True):
                if not future.done():
                    future.set_result(Batched(result, len(batch), begun_s, ended_s))

    def _next(self) -> list[tuple[Item, asyncio.Future[Batched[Result]]]]:
        """The next batch: one item of each request in turn, until it is full or nothing waits."""
        batch: list[tuple[Item, asyncio.Future[Batched[Result]]]] = []
        while self._waiting and len(batch) < self._size:
            share = next(iter(self._waiting))
            items = self._waiting.pop(share)
            while items:
                item, future = items.popleft()
                if not future.done():
                    batch.append((item, future))
                    break
            if items:
                self._waiting[share] = items  # behind the others
        return batch


@dataclass(order=True)
class _Step:
    after_s: float
    number: int
    share: Share = field(compare=False)
    work: Callable[[], Any] = field(compare=False)
    done: asyncio.Future[Any] = field(compare=False)


class FairThreads:
    """Runs steps of several requests in ``count`` threads: earlier ones first, and those of who has had little.

    Where there are two threads or more, requests that have had much never hold all of them.
    """

    def __init__(self, count: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix=name)
        self._free, self._free_for_heavy = count, max(count - 1, 1)
        self._waiting: list[_Step] = []
        self._numbers = itertools.count()

    async def run(self, share: Share, work: Callable[[], Result]) -> Result:
        """The result of a request's next step. Raises what ``work`` raised, but for StopIteration."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Result] = loop.create_future()
        after_s = loop.time() + min(share.weight_s, _MOST_BEHIND_S)
        self._waiting.append(_Step(after_s, next(self._numbers), share, work, done))
        self._start()
        return await done

    def _start(self) -> None:
        self._waiting = sorted(step for step in self._waiting if not step.done.done())
        for step in list(self._waiting):
            heavy = step.share.weight_s >= _LITTLE_S
            if self._free and (self._free_for_heavy or not heavy):
                self._waiting.remove(step)
                self._free -= 1
                self._free_for_heavy -= heavy
                self._pool.submit(self._run, step, heavy, asyncio.get_running_loop())

    def _run(self, step: _Step, heavy: bool, loop: asyncio.AbstractEventLoop) -> None:
        begun_s, result, error = time.monotonic(), None, None
        try:
            result = step.work()
        except BaseException as raised:
            error = raised
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(self._ended, step, heavy, time.monotonic() - begun_s, result, error)

    def _ended(self, step: _Step, heavy: bool, used_s: float, result: Any, error: BaseException | None) -> None:
        step.share.used_s += used_s
        self._free += 1
        self._free_for_heavy += heavy
        if not step.done.done():
            if error is None:
                step.done.set_result(result)
            else:
                step.done.set_exception(error)
        self._start()
