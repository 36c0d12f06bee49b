"""The workers that train one model together: who this process is among them, and what they exchange.

Plain `torch.distributed` (gloo or nccl), whoever initialised it: Ray Train, torchrun, a test. Alone (world 1) every
exchange gives back what it was given.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Workers:
    """This process's number among all workers, and how many there are."""

    rank: int = 0
    world: int = 1

    @classmethod
    def current(cls) -> Workers:
        """As `torch.distributed` says; alone when it is not initialised."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    def share_gradients(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model whose backward pass averages gradients over the workers; batch-norm statistics stay apart."""
        if self.world == 1:
            return model
        devices = [device] if device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)

    def wait_for_all(self) -> None:
        """Return when every worker has come here."""
        if self.world > 1:
            dist.barrier()

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all workers of a tensor (of any shape, the same everywhere), in place."""
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def average_buffers(self, module: nn.Module) -> None:
        """Give all workers the mean of their floating-point buffers (batch-norm statistics)."""
        floating = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
        if self.world == 1 or not floating:
            return
        mean = self.sum(torch.cat([buffer.flatten() for buffer in floating])) / self.world
        for buffer, part in zip(floating, mean.split([b.numel() for b in floating]), strict=True):
            buffer.copy_(part.view_as(buffer))

    def gather_rows(self, rows: Tensor, total: int, device: torch.device) -> Tensor:
        """Interleave the workers' rows: row i of the (total, C) result is row i // world of worker i % world."""
        if self.world == 1:
            return rows
        longest = -(-total // self.world)
        padded = functional.pad(rows, (0, 0, 0, longest - len(rows))).to(device)
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded)
        return torch.stack(parts, dim=1).reshape(-1, rows.shape[1])[:total].to(rows.device)
