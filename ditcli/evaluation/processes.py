"""The processes that torchrun started, sharing the reading and the drawing: each takes a part, all get the whole."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Processes:
    """This process and how many there are; alone it takes everything."""

    rank: int = 0
    num: int = 1

    def part(self, total: int) -> range:
        """The pictures of this process: parts follow each other, so that the whole keeps its order."""
        return range(total * self.rank // self.num, total * (self.rank + 1) // self.num)

    def collect(self, value: Any) -> list[Any]:
        """Everyone's value, in order of rank, in every process."""
        if self.num == 1:
            return [value]
        values: list[Any] = [None] * self.num
        dist.all_gather_object(values, value)
        return values


def join_processes() -> Processes:
    """Those of torchrun, as its environment says; each then has a GPU of its own where there are enough."""
    num = int(os.environ.get("WORLD_SIZE", 1))
    if num == 1:
        return Processes()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return Processes(dist.get_rank(), num)
