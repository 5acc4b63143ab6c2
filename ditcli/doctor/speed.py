"""How fast this machine trains, in ten seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator

from ditcli.doctor.findings import Finding, error, ok
from ditcli.errors import DitcliError

SECONDS = 10.0
LATENTS = (4, 32, 32)  # of a picture of 256 pixels
BATCH = {"cpu": 2, "cuda": 64}


def check_speed(device: str, seconds: float = SECONDS) -> Iterator[Finding]:
    """Optimiser steps of a DiT-S/2, or matrix products in ONNX Runtime where there is no torch."""
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError:
        rate = products_per_second(device, seconds)
        yield ok("speed", f"{rate * 2 * PRODUCT**3 / 1e9:,.0f} GFLOP/s in ONNX Runtime, fp32")
        return
    try:
        rate, where, gflops = images_per_second(device, seconds)
    except (DitcliError, RuntimeError) as problem:  # torch raises RuntimeError for memory that is lacking too
        yield error("speed", f"a training step fails: {' '.join(str(problem).split())}", "Try --device cpu.")
        return
    # Forward and backward are three passes (the backward one is twice the forward), a multiply-add two operations.
    work = rate * gflops * 6 / 1e3
    yield ok("speed", f"trains DiT-S/2 at 256 pixels with {rate:,.1f} images/s, {work:,.2f} TFLOP/s, on {where}")


def images_per_second(device_name: str, seconds: float) -> tuple[float, str, float]:
    """Images/s of training, the device and precision in words, and the network's GFLOPs for an image."""
    import torch

    from ditcli.config import TrainConfig
    from ditcli.devices import choose_dtype, open_device
    from ditcli.info import count_flops
    from ditcli.models.dit import DiT

    device = open_device(device_name)
    dtype, batch = choose_dtype("auto", device), BATCH[device.type]
    shape = TrainConfig(model="DiT-S/2").dit(input_shape=LATENTS, num_classes=1000)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        network = DiT(shape).to(device)
        x, t = torch.randn(batch, *LATENTS, device=device), torch.rand(batch, device=device)
        labels = torch.randint(1000, (batch,), device=device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = network(x, t, labels).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    step()  # the first one chooses kernels and allocates
    began, steps = time.monotonic(), 0
    while steps == 0 or time.monotonic() - began < seconds:
        step()
        steps += 1
    rate = steps * batch / (time.monotonic() - began)
    with torch.device("meta"):
        gflops = count_flops(DiT(shape)) / 1e9
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return rate, f"{device} in {'bf16' if dtype == torch.bfloat16 else 'fp32'}{threads}", gflops


PRODUCT = 1024


def products_per_second(device: str, seconds: float) -> float:
    """Products of two 1024 x 1024 matrices in ONNX Runtime."""
    from ditcli.doctor.runtime import multiplies, open_square

    session = open_square(device)
    began, products = time.monotonic(), 0
    while products == 0 or time.monotonic() - began < seconds:
        multiplies(session, PRODUCT)
        products += 1
    return products / (time.monotonic() - began)
