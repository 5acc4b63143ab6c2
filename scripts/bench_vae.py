"""Encode and decode speed of the Stable Diffusion VAE against diffusers in its default use, on the same weights.

    python scripts/bench_vae.py                 # a CPU, 256x256
    python scripts/bench_vae.py --device cuda --num 32

Weights are drawn at random in the architecture of Stable Diffusion's VAE: speed does not depend on them. The decoder's
last layer is scaled so that its pictures span the range of 0..255; PSNR compares uint8 pictures at a peak of 255, and
moments at a peak of the reference's range. Both sides are timed in turns, each in a process of its own, since ditcli
changes how its process keeps memory; medians are printed.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ditcli.codecs.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from ditcli.codecs.codec import Codec, normalise, quantise
from ditcli.codecs.folder import open_codec, save_codec
from ditcli.devices import choose_dtype, open_device

STABLE_DIFFUSION = AutoencoderKLConfig(block_out_channels=(128, 256, 512, 512), layers_per_block=2)


@torch.no_grad()
def write_weights(folder: Path) -> None:
    """A VAE whose pictures have a mean near grey and a standard deviation of a quarter of the range."""
    torch.manual_seed(0)
    network = AutoencoderKL(STABLE_DIFFUSION)
    images = network.decode(torch.randn(1, 4, 16, 16))
    last = network.decoder.conv_out
    last.weight /= 2 * images.std()
    last.bias.copy_((last.bias - images.mean(dim=(0, 2, 3))) / (2 * images.std()))
    save_codec(network, folder)


def make_images(num: int, size: int) -> Tensor:
    """Smooth shapes with some grain: uint8 (N, 3, H, W)."""
    generator = torch.Generator().manual_seed(1)
    images = torch.zeros(num, 3, size, size)
    for side in (4, 16, 64, size):
        noise = torch.randn(num, 3, side, side, generator=generator)
        images += F.interpolate(noise, size=(size, size), mode="bicubic") * (4 / side) ** 0.7
    return quantise(images / images.abs().amax() * 1.2)


def psnr(values: Tensor, reference: Tensor, peak: float) -> float:
    error = (values.double() - reference.double()).square().mean()
    return (10 * torch.log10(peak**2 / error)).item()


class Theirs:
    """diffusers' AutoencoderKL in its default use."""

    def __init__(self, folder: Path, device: torch.device):
        from diffusers import AutoencoderKL as Reference

        self.network = Reference.from_pretrained(folder).to(device).eval()

    def encode(self, images: Tensor) -> Tensor:
        return self.network.encode(normalise(images)).latent_dist.parameters

    def decode(self, latents: Tensor) -> Tensor:
        return quantise(self.network.decode(latents / self.network.config.scaling_factor).sample)


def open_ours(folder: Path, device: torch.device) -> Codec:
    device = open_device(str(device))
    return open_codec(folder, device=device, dtype=choose_dtype("auto", device))


def serve(open_side: Callable[[Path, torch.device], Any], folder: Path, device: torch.device, end: Connection) -> None:
    """In a process of its own: (task, input) in, (seconds, result) out, until the other end is closed."""
    with torch.no_grad(), contextlib.suppress(EOFError):
        side = open_side(folder, device)
        while True:
            task, array = end.recv()
            given = torch.from_numpy(array).to(device)
            began = time.perf_counter()
            result = getattr(side, task)(given).cpu()
            end.send((time.perf_counter() - began, result.float().numpy()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--num", type=int, default=4, help="images in a batch")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    device, num = torch.device(arguments.device), arguments.num
    images = make_images(num, arguments.size)
    latents = torch.randn(num, 4, arguments.size // 8, arguments.size // 8, generator=torch.Generator().manual_seed(2))
    # As wide, unscaled, as those that the last layer was scaled for.
    inputs = {"encode": images.numpy(), "decode": (latents * STABLE_DIFFUSION.scaling_factor).numpy()}
    print(f"{device}, {torch.get_num_threads()} threads, {num} images of {arguments.size}x{arguments.size}")
    with tempfile.TemporaryDirectory() as folder:
        write_weights(Path(folder))
        processes, ends = multiprocessing.get_context("spawn"), []
        for open_side in (Theirs, open_ours):
            near, far = processes.Pipe()
            processes.Process(target=serve, args=(open_side, Path(folder), device, far), daemon=True).start()
            far.close()
            ends.append(near)
        for task, array in inputs.items():
            spent: tuple[list[float], list[float]] = ([], [])
            results: list[Tensor] = [torch.empty(0)] * 2
            for turn in range(1 + arguments.repeats):
                for i, end in enumerate(ends):
                    end.send((task, array))
                    took, result = end.recv()
                    results[i] = torch.from_numpy(result)
                    if turn:  # the first one warms up
                        spent[i].append(took)
            theirs, ours = (num / statistics.median(times) for times in spent)
            expected, found = results
            peak = 255.0 if task == "decode" else (expected.max() - expected.min()).item()
            print(
                f"{task}: diffusers {theirs:.2f} images/s, ditcli {ours:.2f} images/s, {ours / theirs:.2f} times; "
                f"PSNR between them {psnr(found, expected, peak):.1f} dB"
            )


if __name__ == "__main__":
    main()
