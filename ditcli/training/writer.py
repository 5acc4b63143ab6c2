"""Writing while training goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError
from torch import Tensor

from ditcli.config import WhenDiskFull
from ditcli.errors import SavingError
from ditcli.memory import free_memory
from ditcli.processes import ALONE, Processes
from ditcli.progress import say

# Copies for the writer may take this part of the memory that nobody uses.
SHARE_OF_FREE = 0.6
AGAIN = "Make room and run the same command again"


@contextmanager
def telling(what: str, folder: Path) -> Iterator[None]:
    """Raise SavingError where the disk is full, or something else forbids writing."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise SavingError(f"{what} could not be written to {folder} ({error}): the former one is kept.") from error


class Writer:
    """A thread that does what it is given, one after the other; what goes wrong in it is raised by the next call.

    With `go-on` a checkpoint that cannot be written is told to the user instead, and raised by `finish` alone if no
    later one could be written either. Leaving the context lets the thread end what it has. `saved` is the step of the
    last checkpoint that it was given. Of several processes the first one writes, and the others drop what they give.
    """

    def __init__(self, when_disk_full: WhenDiskFull = "stop", processes: Processes = ALONE) -> None:
        self._go_on = when_disk_full == "go-on"
        self.processes = processes
        self.saved: int | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._tasks: list[Future[object]] = []
        self._waiting = False
        self._failure: SavingError | None = None
        self._buffers: dict[str, Tensor] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()

    def copy(self, tensors: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
        """Copies in the machine's memory, in buffers that are used again for these names: former tasks are waited for.

        Where memory is too small the tensors themselves, and then the next task is waited for.
        """
        if not self.processes.first:
            return {}
        self.wait()
        needed = sum(t.nbytes for name, t in tensors.items() if prefix + name not in self._buffers)
        if needed > SHARE_OF_FREE * free_memory("cpu"):
            if not self._waiting:
                say(
                    f"Note: training waits while a checkpoint is written: a copy takes {needed / 1e9:.1f} GB of memory."
                )
            self._waiting = True
            return dict(tensors)
        copies = {name: self._buffer(prefix + name, tensor) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            copies[name].copy_(tensor, non_blocking=True)
        for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        return copies

    def _buffer(self, name: str, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            # Pinned memory takes what lies on a GPU at the full speed of the bus.
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[name] = buffer
        return buffer

    def submit_checkpoint(self, step: int, task: Callable[[], object]) -> None:
        """Write the checkpoint of a step after all that came before."""

        def write() -> None:
            try:
                task()
                self._failure = None
            except SavingError as error:
                self._failure = error
                raise

        self.submit(write)
        self.saved = step

    def submit(self, task: Callable[[], object]) -> None:
        """Do it after all that came before."""
        if not self.processes.first:
            return
        self._tasks.append(self._thread.submit(task))
        if self._waiting:
            self.wait()

    @contextmanager
    def telling(self, what: str, folder: Path) -> Iterator[None]:
        """What the thread's tasks are granted, for what is written without it."""
        try:
            with telling(what, folder):
                yield
        except SavingError as error:
            self._tell(error)

    def check(self) -> None:
        """Raise what went wrong in the tasks that are done. Waits for none."""
        while self._tasks and self._tasks[0].done():
            self._end(self._tasks.pop(0))

    def wait(self) -> None:
        """Wait for all tasks."""
        while self._tasks:
            wait(self._tasks[:1])  # a signal may break this off: what was not waited for is still in the list
            self._end(self._tasks.pop(0))

    def finish(self) -> None:
        """Wait for all tasks, of all processes; raises SavingError where the last checkpoint could not be written."""
        self.wait()
        if self._failure:
            raise SavingError(f"{self._failure} {AGAIN}.") from self._failure
        self.processes.collect(None)

    def _end(self, task: Future[object]) -> None:
        try:
            task.result()
        except SavingError as error:
            self._tell(error)

    def _tell(self, error: SavingError) -> None:
        if not self._go_on:
            raise SavingError(f"{error} {AGAIN}, or train with --when-disk-full go-on.") from error
        say(f"Warning: {error} Going on.")
