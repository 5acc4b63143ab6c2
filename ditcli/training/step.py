"""One optimiser step: as fast as the device allows, and in parts where the whole batch does not fit."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ditcli.devices import give_back_memory, is_out_of_memory
from ditcli.diffusion.process import Diffusion
from ditcli.errors import DitcliError
from ditcli.memory import fitting_micro_batch, free_memory, kept_per_image
from ditcli.progress import say
from ditcli.training.batches import Batch, Batches
from ditcli.training.ema import ema_decay, update_average
from ditcli.training.finetune import unfrozen
from ditcli.training.loop import apply_gradients, learning_rate
from ditcli.training.metrics import NOISE_LEVELS
from ditcli.training.objective import by_noise_level, diffusion_loss
from ditcli.training.setup import Setup
from ditcli.training.sharding import exchange_after, replicate
from ditcli.training.state import TrainState


class Steps:
    """The optimiser steps of a run; `micro_batch` images go through the network at a time."""

    def __init__(self, setup: Setup, state: TrainState, batches: Batches, diffusion: Diffusion):
        self.setup, self.state, self.batches, self.diffusion = setup, state, batches, diffusion
        config, self.size = setup.config, len(setup.processes.part(setup.config.batch_size))
        trained = sum(p.numel() for p in unfrozen(state.model))
        reserved = 12 * trained  # gradients and AdamW's two moments
        kinds: dict[str, Any] = {
            "bytes_per_number": setup.dtype.itemsize,
            "checkpointed": config.checkpoint_activations,
        }
        if config.micro_batch == "auto":
            fitting = fitting_micro_batch(
                setup.model.dit, self.size, device=str(setup.device), reserved=reserved, **kinds
            )
            self.micro_batch = self._least(fitting, self.size)
            if self.micro_batch < self.size:
                say(f"Micro-batches of {self.micro_batch} images fit into memory.")
        else:
            self.micro_batch = min(int(config.micro_batch or self.size), self.size)
            if setup.device.type == "cpu":  # where the system may kill the process, and no error comes first
                needed = self.micro_batch * kept_per_image(setup.model.dit, **kinds) + reserved
                _warn_of_memory(self.micro_batch, setup.processes.num * needed, free_memory("cpu"))
        # Blocks are alike: what is compiled for one serves all, in a fraction of the time that the whole would take.
        self.compiled = list(state.model.get_submodule("blocks").children()) if self._compiles() else []
        for block in self.compiled:
            block.compile(dynamic=False)
        if self.compiled:
            say("The first step takes longer: the blocks are compiled.")
        self.worked = False
        self.network: nn.Module = state.model
        if setup.processes.num > 1 and not config.shard:
            self._rehearse(trained)
        self.network = replicate(state.model, setup.processes)

    def _compiles(self) -> bool:
        compile = self.setup.config.compile
        return self.setup.device.type == "cuda" if compile is None else compile

    def take(self) -> tuple[Tensor, Tensor]:
        """Loss and gradient norm, on the device: nothing here waits for it.

        A step whose gradient is not finite changes no weight; the average takes in the same weights once more.
        """
        config, state = self.setup.config, self.state
        measured = self.backward(self.batches[state.step])
        norm = apply_gradients(state.optimizer, learning_rate(config, state.step), config.clip_grad)
        update_average(state.average, state.model, ema_decay(config.ema_decay, state.step, warmup=config.ema_warmup))
        state.losses.append(measured)
        state.step += 1
        if state.powers:
            state.powers.update(state.step)
        return measured[0], norm

    def backward(self, batch: Batch) -> Tensor:
        """Gradients, and what is measured of the loss, (17,).

        Out of memory it begins anew with smaller parts, and where compiling fails, without. Several processes cannot
        any more, since each may be at another place of what they exchange: DitcliError says what to do.
        """
        processes = self.setup.processes
        measured = self._within_means(lambda: self._accumulate(batch.split(self.micro_batch)), alone=processes.num == 1)
        return processes.sum(measured)

    def _rehearse(self, trained: int) -> None:
        """Find out what fits and compiles while no process waits for another yet; the least room holds for all.

        Beside it lies memory for what steps hold of `trained` weights: gradients, and moments where there are none yet.
        Sharded processes wait for each other in every block.
        """
        state, former = self.state, self.micro_batch
        reserved = (4 if state.optimizer.state else 12) * trained
        batch = self.batches[state.step]

        def first_part() -> Tensor:
            beside = torch.empty(reserved, dtype=torch.uint8, device=self.setup.device)
            measured = self._accumulate(batch.split(self.micro_batch)[:1])
            del beside
            return measured

        self._within_means(first_part, alone=True)
        state.optimizer.zero_grad(set_to_none=True)
        self.worked = False  # the exchange is still to be tried
        fitting = self.micro_batch
        self.micro_batch = self._least(fitting, former)
        if self.micro_batch < fitting:
            say(f"Out of memory with {fitting} images at a time in another process: going on with {self.micro_batch}.")

    def _least(self, fitting: int, wanted: int) -> int:
        """The least of what fits into the processes' memories; one that has what it wanted limits no other."""
        limit = fitting if fitting < wanted else self.setup.config.batch_size
        return min(fitting, *self.setup.processes.collect(limit))

    def _within_means(self, run: Callable[[], Tensor], *, alone: bool) -> Tensor:
        """What `run` returns, with parts that fit into memory, and compiled if that works."""
        while True:
            try:
                measured = run()
                self.worked = True
                return measured
            except Exception as error:
                failed_to_compile = bool(self.compiled) and not self.worked and not is_out_of_memory(error)
                if not failed_to_compile and not is_out_of_memory(error):
                    raise
                reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
                if not alone:
                    raise DitcliError(self._advice(reason, failed_to_compile)) from error
            # Here and not in the except clause, whose traceback holds what is to be freed.
            self._clear()
            if failed_to_compile:
                self._give_up_compiling(reason)
            else:
                self._halve()

    def _accumulate(self, micro_batches: list[Batch]) -> Tensor:
        config, device, processes = self.setup.config, self.setup.device, self.setup.processes
        measured = torch.zeros(1 + 2 * NOISE_LEVELS, device=device)
        for batch in micro_batches:
            with exchange_after(self.network, last=batch is micro_batches[-1]):
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.setup.dtype == torch.bfloat16):
                    losses = diffusion_loss(self.network, self.diffusion, batch, config.loss)
                # Of several processes the mean of their gradients is taken.
                (losses.sum() * (processes.num / config.batch_size)).backward()
            measured += by_noise_level(losses.detach(), batch.t) * (len(losses) / config.batch_size)
        return measured

    def _advice(self, reason: str, failed_to_compile: bool) -> str:
        trouble, cure = (
            f"out of memory with {self.micro_batch} images at a time in a process",
            "a smaller --micro-batch",
        )
        if failed_to_compile:
            trouble, cure = f"torch.compile does not work here ({reason})", "--no-compile"
        return f"{trouble}: run the same command again with {cure}; it goes on from the last checkpoint."

    def _halve(self) -> None:
        if self.micro_batch == 1:
            raise DitcliError(
                "out of memory with one image at a time: try --checkpoint-activations, a smaller --model or another "
                "--device."
            )
        former, self.micro_batch = self.micro_batch, next_micro_batch(self.size, self.micro_batch)
        say(f"Out of memory with {former} images at a time: going on with {self.micro_batch}.")

    def _give_up_compiling(self, reason: str) -> None:
        say(f"torch.compile does not work here ({reason}): going on without it. --no-compile spares the try.")
        for block in self.compiled:
            block._compiled_call_impl = None
        self.compiled = []

    def _clear(self) -> None:
        """Free what a failed pass left."""
        self.state.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        give_back_memory(self.setup.device)


def _warn_of_memory(micro_batch: int, needed: int, free: int) -> None:
    if needed > free:
        say(
            f"Note: {micro_batch} images at a time take {needed / 1e9:.0f} GB of memory, and {free / 1e9:.0f} GB are "
            "free: where the system ends the run, give --micro-batch auto, or a smaller --model."
        )


def next_micro_batch(batch_size: int, micro_batch: int) -> int:
    """The largest divisor of the batch size that is at most half of the micro-batch."""
    return max(size for size in range(1, micro_batch // 2 + 1) if batch_size % size == 0)
