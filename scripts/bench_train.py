"""Images per second of training, beside plain loops around diffusers' DiT; Markdown tables on stdout.

    python scripts/bench_train.py cpu
    python scripts/bench_train.py cuda

Latents are 4 x 32 x 32, of 1000 classes. A step of ours is that of `ditcli train`: batch, noise, forward, loss,
backward, AdamW and EMA. Around DiTTransformer2DModel of the same size it is the loop that everybody writes: mean
squared error, AdamW with its defaults, and an average updated weight by weight; neither learns a variance.

`cpu` trains DiT-S/2 in batches of 16. Candidates are processes that take turns, so that what else the machine does
hits all alike; numbers are medians, with the slowest and the fastest turn behind them.

`cuda` trains S/2, B/2, L/2 and XL/2, one candidate after the other, with peak memory and the part of the device's bf16
peak that the model's operations make up (MFU). A candidate that does not fit says
so. The plain loops are left out where diffusers is not installed.
"""

from __future__ import annotations

import argparse
import copy
import gc
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ditcli.config import ModelConfig, TrainConfig
from ditcli.data.latents import Latents
from ditcli.devices import bf16_peak, choose_dtype, open_device
from ditcli.diffusion.process import Diffusion
from ditcli.models.conv import make_network
from ditcli.models.flops import training_flops
from ditcli.processes import ALONE
from ditcli.runs import RunDir
from ditcli.training.batches import Batches
from ditcli.training.setup import Setup
from ditcli.training.state import new_state
from ditcli.training.step import Steps

SHAPE = (4, 32, 32)
NUM_CLASSES = 1000
NUM_IMAGES = 1024
Step = Callable[[], object]


def tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


class StoredLatents:
    """A codec whose moments are the latents."""

    latent_channels = SHAPE[0]

    def to_latents(self, moments: torch.Tensor, eps: torch.Tensor | None = None) -> torch.Tensor:
        return moments.float()


def some_latents() -> Latents:
    rng = np.random.default_rng(0)
    moments = rng.standard_normal((NUM_IMAGES, 1, *SHAPE)).astype(np.float16)
    return Latents(moments, rng.integers(NUM_CLASSES, size=NUM_IMAGES), ())


def ours(size: str, batch_size: int, device: torch.device, **options: Any) -> Step:
    """The step of `ditcli train` with these options."""
    device = open_device(str(device))  # which settles, too, how memory is kept on a CPU
    config = TrainConfig(model=size, batch_size=batch_size, learn_sigma=False, device=str(device), **options)
    dit = config.dit(input_shape=SHAPE, num_classes=NUM_CLASSES)
    names = tuple(map(str, range(NUM_CLASSES)))
    model = ModelConfig(dit=dit, diffusion=config.diffusion(), codec="pixels", image_size=256, class_names=names)
    codec: Any = StoredLatents()
    setup = Setup(
        config=config,
        model=model,
        run=RunDir(Path("unused")),
        dataset=None,  # type: ignore[arg-type]
        codec=codec,
        device=device,
        dtype=choose_dtype(config.precision, device),
        processes=ALONE,
    )
    diffusion = Diffusion(model.diffusion)
    batches = Batches(some_latents(), codec, diffusion, config, num_classes=NUM_CLASSES, device=device)
    return Steps(setup, new_state(config, model, device), batches, diffusion).take


def plain(size: str, batch_size: int, device: torch.device, *, bf16: bool) -> Step:
    """The loop that everybody writes, around diffusers' network."""
    from diffusers import DDPMScheduler, DiTTransformer2DModel

    dit = TrainConfig(model=size, learn_sigma=False).dit(input_shape=SHAPE, num_classes=NUM_CLASSES)
    network = DiTTransformer2DModel(
        num_attention_heads=dit.num_heads,
        attention_head_dim=dit.width // dit.num_heads,
        in_channels=dit.in_channels,
        out_channels=dit.out_channels,
        num_layers=dit.depth,
        sample_size=dit.input_size[0],
        patch_size=dit.patch_size,
        num_embeds_ada_norm=NUM_CLASSES,
    ).to(device)
    average = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.0)
    scheduler = DDPMScheduler(1000)
    latents = some_latents()
    moments = torch.from_numpy(latents.moments[:, 0]).float()
    labels = torch.from_numpy(latents.labels)

    def step() -> float:
        rows = torch.randint(len(moments), (batch_size,))
        x0, label = moments[rows].to(device), labels[rows].to(device)
        eps = torch.randn_like(x0)
        t = torch.randint(1000, (batch_size,), device=device)
        x_t = scheduler.add_noise(x0, eps, t)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            output = network(x_t, timestep=t, class_labels=label).sample
        loss = F.mse_loss(output.float(), eps)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for a, p in zip(average.parameters(), network.parameters(), strict=True):
                a.mul_(0.9999).add_(p, alpha=0.0001)
        return loss.item()

    return step


def bench_cpu(args: argparse.Namespace) -> None:
    candidates: dict[str, tuple[Callable[..., Step], dict[str, Any]]] = {
        "diffusers, fp32": (plain, {"bf16": False}),
        "diffusers, bf16 autocast": (plain, {"bf16": True}),
        "ditcli, fp32": (ours, {"precision": "fp32"}),
        "ditcli, bf16": (ours, {"precision": "bf16"}),
        "ditcli, bf16, compiled": (ours, {"precision": "bf16", "compile": True}),
    }
    processes = multiprocessing.get_context("spawn")
    workers = {}
    for name, (make, options) in candidates.items():
        connection, other = processes.Pipe()
        worker = processes.Process(target=serve, args=(other, make, args.size, args.batch_size, options), daemon=True)
        worker.start()
        tell(f"{name}: first step after {connection.recv():.1f} s")
        workers[name] = connection
    rates: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(args.rounds):
        for name, connection in workers.items():
            connection.send("step")
            rates[name].append(args.batch_size / connection.recv())
    medians = {name: statistics.median(found) for name, found in rates.items()}
    print(f"{args.size}, 4 x 32 x 32 latents, batch {args.batch_size}, {torch.get_num_threads()} threads")
    print("\n| loop | images/s | slowest to fastest | to diffusers fp32 | to diffusers bf16 |\n|---|---|---|---|---|")
    for name, rate in medians.items():
        to_fp32, to_bf16 = (rate / medians[f"diffusers, {kind}"] for kind in ("fp32", "bf16 autocast"))
        spread = f"{min(rates[name]):.2f} to {max(rates[name]):.2f}"
        print(f"| {name} | {rate:.2f} | {spread} | {to_fp32:.2f}x | {to_bf16:.2f}x |")


def serve(connection: Any, make: Callable[..., Step], size: str, batch_size: int, options: dict[str, Any]) -> None:
    """A candidate in a process of its own: seconds of the first step, then of one whenever it is asked."""
    step = make(size, batch_size, torch.device("cpu"), **options)
    while True:
        began = time.perf_counter()
        step()
        connection.send(time.perf_counter() - began)
        connection.recv()


def bench_cuda(args: argparse.Namespace) -> None:
    device = torch.device("cuda")
    torch.set_float32_matmul_precision("high")  # TF32
    peak = bf16_peak(device)
    print(
        f"{torch.cuda.get_device_name(device)}, 4 x 32 x 32 latents, batch {args.batch_size}, torch {torch.__version__}"
    )
    print("\n| model | loop | images/s | MFU | peak memory |\n|---|---|---|---|---|")
    for size in args.sizes:
        dit = TrainConfig(model=size, learn_sigma=False).dit(input_shape=SHAPE, num_classes=NUM_CLASSES)
        with torch.device("meta"):
            flops = training_flops(make_network(dit), dit)
        candidates: dict[str, Callable[[], Step]] = {
            "ditcli": lambda size=size: ours(size, args.batch_size, device, precision="bf16"),
            "ditcli --no-compile": lambda size=size: ours(
                size, args.batch_size, device, precision="bf16", compile=False
            ),
            "ditcli --checkpoint-activations": lambda size=size: ours(
                size, args.batch_size, device, precision="bf16", checkpoint_activations=True
            ),
            "diffusers, bf16 autocast": lambda size=size: plain(size, args.batch_size, device, bf16=True),
            "diffusers, TF32": lambda size=size: plain(size, args.batch_size, device, bf16=False),
        }
        for name, make in candidates.items():
            rate, memory, why_not = time_cuda(make, args)
            if why_not:
                print(f"| {size} | {name} | {why_not} | | |", flush=True)
                continue
            share = f"{rate * flops / peak:.1%}" if peak else "–"
            print(f"| {size} | {name} | {rate:.0f} | {share} | {memory / 1e9:.1f} GB |", flush=True)


def time_cuda(make: Callable[[], Step], args: argparse.Namespace) -> tuple[float, int, str]:
    """Images per second, the median of the rounds, the most bytes that tensors took, and why there is neither."""
    gc.collect()
    torch.compiler.reset()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        step = make()
        for _ in range(args.warm_up):
            step()
        rates = []
        for _ in range(args.rounds):
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(args.steps):
                step()
            torch.cuda.synchronize()
            rates.append(args.steps * args.batch_size / (time.perf_counter() - began))
        return statistics.median(rates), torch.cuda.max_memory_allocated(), ""
    except ImportError as error:
        return 0.0, 0, f"not installed: {error.name}"
    except torch.OutOfMemoryError:
        return 0.0, 0, "out of memory"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    cpu = commands.add_parser("cpu")
    cpu.add_argument("--size", default="DiT-S/2")
    cpu.add_argument("--batch-size", type=int, default=16)
    cpu.add_argument("--rounds", type=int, default=5)
    cuda = commands.add_parser("cuda")
    cuda.add_argument("--sizes", nargs="+", default=["DiT-S/2", "DiT-B/2", "DiT-L/2", "DiT-XL/2"])
    cuda.add_argument("--batch-size", type=int, default=128)
    cuda.add_argument("--warm-up", type=int, default=5)
    cuda.add_argument("--steps", type=int, default=20, help="steps of a round")
    cuda.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    bench_cpu(args) if args.command == "cpu" else bench_cuda(args)


if __name__ == "__main__":
    main()
