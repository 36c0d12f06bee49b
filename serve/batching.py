"""Dynamic batching: whatever gathered while the last batch was worked on becomes the next one; nobody ever waits.

A batch starts as soon as its thread is free. Under light load it holds one item and costs no delay; under heavy load
batches grow by themselves. Callers who have gone are left out.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batcher(Generic[Item, Result]):
    """Runs ``work`` on batches of at most ``size`` items, one batch at a time, in a thread of its own.

    To be used from one event loop.

    Args:
        work: gets items, returns as many results in their order.
    """

    def __init__(self, work: Callable[[Sequence[Item]], Sequence[Result]], size: int) -> None:
        self._work, self._size = work, size
        self._waiting: deque[tuple[Item, asyncio.Future[tuple[Result, int]]]] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="network")
        self._task: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Items that are in no batch yet."""
        return len(self._waiting)

    async def submit(self, item: Item) -> tuple[Result, int]:
        """The result of one item, and how many there were in its batch. Raises what ``work`` raised."""
        future: asyncio.Future[tuple[Result, int]] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        return await future

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while batch := self._next():
            items = [item for item, _ in batch]
            try:
                results = await loop.run_in_executor(self._thread, self._work, items)
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), result in zip(batch, results, strict=True):
                if not future.done():
                    future.set_result((result, len(batch)))

    def _next(self) -> list[tuple[Item, asyncio.Future[tuple[Result, int]]]]:
        batch: list[tuple[Item, asyncio.Future[tuple[Result, int]]]] = []
        while self._waiting and len(batch) < self._size:
            item, future = self._waiting.popleft()
            if not future.done():  # a caller who has gone cancelled it
                batch.append((item, future))
        return batch
