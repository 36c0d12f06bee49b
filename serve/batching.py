"""Fair scheduling: dynamic batches for the network, and threads for the steps of long requests.

``Batcher``: the items that arrived during a batch form the next one. It takes one item of each request in turn, so that
a recording of 1,800 windows and one of two share the batches. Under light load a batch has one item and adds no delay;
under heavy load batches grow by themselves. ``FairThreads``: long work runs in steps, and requests that have used
little time go first. Both drop the items of callers that have gone. Use each from one event loop.
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
_LITTLE_S = 1.0  # one thread is reserved for requests that have used less thread time than this
_MOST_BEHIND_S = 2.0  # heavy use delays a step by at most this, compared with a step of a new request


@dataclass(eq=False)
class Share:
    """The thread time of one request: used so far, and estimated from its size.

    By the estimate long requests count as heavy from the start.
    """

    used_s: float = 0.0
    expected_s: float = 0.0

    @property
    def weight_s(self) -> float:
        """Seconds used and expected; a larger weight delays the next step."""
        return self.used_s + self.expected_s


class Batched(NamedTuple, Generic[Result]):
    """The result of an item, its batch's size, and when the batch began and ended (``time.monotonic``)."""

    result: Result
    size: int
    begun_s: float
    ended_s: float


class Batcher(Generic[Item, Result]):
    """Runs ``work`` on batches of at most ``size`` items, one batch at a time, in its own thread.

    ``work`` returns one result per item, in the same order.
    """

    def __init__(self, work: Callable[[Sequence[Item]], Sequence[Result]], size: int) -> None:
        self._work, self._size = work, size
        # the next request in turn is first
        self._waiting: dict[Share, deque[tuple[Item, asyncio.Future[Batched[Result]]]]] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="network")
        self._task: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Number of requests with items that are in no batch yet."""
        return len(self._waiting)

    async def submit(self, items: Sequence[Item], share: Share | None = None) -> list[Batched[Result]]:
        """The results of a request's items (at least one), in order. An error of ``work`` is raised here."""
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[Batched[Result]]] = [loop.create_future() for _ in items]
        self._waiting.setdefault(share or Share(), deque()).extend(zip(items, futures, strict=True))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        return list(await asyncio.gather(*futures))  # cancelling the caller cancels them all

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
    """Runs steps of several requests in ``count`` threads, ordered by arrival and by the time their requests used.

    With two threads or more, one is reserved for requests that have used little time.
    """

    def __init__(self, count: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix=name)
        self._free, self._free_for_heavy = count, max(count - 1, 1)
        self._waiting: list[_Step] = []
        self._numbers = itertools.count()

    async def run(self, share: Share, work: Callable[[], Result]) -> Result:
        """The result of a request's next step. An error of ``work`` is raised here; it must not be StopIteration."""
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
