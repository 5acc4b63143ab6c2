"""The processes that share a command, one for each device, as torch.distributed.run starts them.

Every process runs the whole command. Where there is work to share each takes its part, what all must know they tell
each other, and the first alone prints and writes. Torch is imported where there are several only.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import tempfile
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from ditcli.errors import DitcliError, Interrupted, SettingError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import Store

Value = TypeVar("Value")
# The first may draw or score for long while the others wait; where one dies, the launcher ends the others at once.
PATIENCE = timedelta(hours=2)
SECONDS_TO_SAVE = 600  # until a launcher that was told to stop kills its processes, for torch from 2.13 on; else 30


@dataclass(frozen=True)
class Processes:
    """This process and how many there are; alone it takes everything."""

    rank: int = 0
    num: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def part(self, total: int) -> range:
        """What of `total` is this process's: parts follow each other, so that the whole keeps its order."""
        return range(total * self.rank // self.num, total * (self.rank + 1) // self.num)

    def collect(self, value: Value) -> list[Value]:
        """Everyone's value, in order of rank, in every process."""
        if self.num == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.num
        dist.all_gather_object(values, value)
        return values

    def agree(self, value: Value) -> Value:
        """The first process's value, in every process."""
        if self.num == 1:
            return value
        import torch.distributed as dist

        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def any(self, flag: bool) -> bool:
        """Whether one of them says yes: cheap enough for every step."""
        if self.num == 1:
            return flag
        import torch
        import torch.distributed as dist

        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of everyone's tensor, in its place and on its device."""
        if self.num > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor)
        return tensor


ALONE = Processes()


def started() -> bool:
    """Whether this process is one of several that torch.distributed.run started."""
    return "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1


def local_rank() -> int:
    """The number of this process on its machine, and of its GPU."""
    return int(os.environ["LOCAL_RANK"]) if started() else 0


def is_first() -> bool:
    """Whether this process prints."""
    return not started() or os.environ["RANK"] == "0"


@cache
def join(device: str) -> Processes:
    """The processes of this command, all of them when this returns; each has a GPU of its own unless `device` is cpu.

    Raises SettingError for one device that all would share, and where there are too few.
    """
    if not started():
        return ALONE
    import torch
    import torch.distributed as dist

    _check_device(device, int(os.environ["LOCAL_WORLD_SIZE"]))
    backend = "gloo"
    if device != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
        backend = "cpu:gloo,cuda:nccl"
    store, rank, num = next(dist.rendezvous("env://", timeout=PATIENCE))
    store = dist.PrefixStore(_agree_on_word(store, rank, num), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=num, timeout=PATIENCE)
    atexit.register(dist.destroy_process_group)
    return Processes(dist.get_rank(), dist.get_world_size())


def leave(code: int) -> None:
    """End this process here where it is one of several, without Python's own end; another goes on.

    A thread of torch's that asks for the interpreter while it ends is unwound by force, and C++ aborts the process for
    that: "terminate called without an active exception", when all was done.
    """
    if not started():
        return
    if "torch.distributed" in sys.modules and sys.modules["torch.distributed"].is_initialized():
        sys.modules["torch.distributed"].destroy_process_group()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # nobody listens
            stream.flush()
    os._exit(code)


def _agree_on_word(store: Store, rank: int, num: int) -> str:
    """A word that the processes of this start have in common, and no others had before.

    The launcher's store outlives processes that it starts anew (torch 2.13), with the addresses at which the former
    ones were found: the word tells these from the new ones.
    """
    word = uuid.uuid4().hex
    if rank > 0:
        store.set(f"asks-{rank}", word)
        answer = store.get(f"answer-{word}").decode()  # waits for it
        store.add(f"met-{answer}", 1)
        return answer
    while store.add(f"met-{word}", 0) < num - 1:
        for other in range(1, num):
            if store.check([f"asks-{other}"]):  # the one before may have asked too
                store.set(f"answer-{store.get(f'asks-{other}').decode()}", word)
        time.sleep(0.05)
    return word


def start(num: int, device: str) -> int:
    """Run this very command in `num` processes on this machine; returns the exit code of the first that failed, or 0.

    On a CPU they divide its cores. Raises SettingError as `join`, DitcliError where a process was killed.
    """
    import torch.distributed.run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    _check_device(device, num)
    logging.disable()  # the processes speak for themselves
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // num)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SECONDS_TO_SAVE))
    with tempfile.TemporaryDirectory(prefix="ditcli-") as folder:
        words = ["--standalone", f"--nproc-per-node={num}", f"--log-dir={folder}", "-m", "--", "ditcli", *sys.argv[1:]]
        try:
            torchrun.run(torchrun.parse_args(words))
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode > 0:
                return failure.exitcode
            raise DitcliError(
                f"process {rank} was killed ({signal.Signals(-failure.exitcode).name}); where that was for lack of "
                "memory give a smaller batch. To go on, run the same command again."
            ) from error
        except SignalException:
            return Interrupted.exit_code
    return 0


def _check_device(device: str, num: int) -> None:
    import torch

    if ":" in device:
        raise SettingError(f"device is {device!r}, but {num} processes need one each: give auto, cuda or cpu.")
    if device != "cpu" and torch.cuda.is_available() and num > torch.cuda.device_count():
        raise SettingError(
            f"there are {num} processes, but only {torch.cuda.device_count()} GPUs: start fewer, or give --device cpu."
        )
