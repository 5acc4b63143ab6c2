"""Encode and decode speed of the Stable Diffusion VAE against diffusers in its default use, on the same weights.

    python scripts/bench_vae.py                 # a CPU, 256x256
    python scripts/bench_vae.py --device cuda --num 32

Weights are drawn at random in the architecture of Stable Diffusion's VAE: speed does not depend on them. The decoder's
last layer is scaled so that its pictures span the range of 0..255; PSNR compares uint8 pictures at a peak of 255, and
moments at a peak of the reference's range. Both sides are timed in turns; medians are printed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ditcli.codecs.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from ditcli.codecs.codec import normalise, quantise
from ditcli.codecs.folder import open_codec, save_codec
from ditcli.devices import choose_dtype

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


def seconds(function: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor]:
    began = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--num", type=int, default=4, help="images in a batch")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    from diffusers import AutoencoderKL as Reference

    device = torch.device(arguments.device)
    with tempfile.TemporaryDirectory() as name:
        write_weights(Path(name))
        reference = Reference.from_pretrained(name).to(device).eval()
        dtype = choose_dtype("auto", device)
        codec = open_codec(Path(name), device=device, dtype=dtype)
    images = make_images(arguments.num, arguments.size).to(device)
    pixels = normalise(images)

    with torch.no_grad():
        side = arguments.size // 8
        latents = torch.randn(arguments.num, 4, side, side, generator=torch.Generator().manual_seed(2)).to(device)
        latents *= codec.config.scaling_factor  # as wide, unscaled, as those that the last layer was scaled for
        tasks: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
            "encode": (lambda: reference.encode(pixels).latent_dist.parameters, lambda: codec.encode(images)),
            "decode": (
                lambda: quantise(reference.decode(latents / codec.config.scaling_factor).sample),
                lambda: codec.decode(latents),
            ),
        }
        threads = torch.get_num_threads()
        print(
            f"{device}, {threads} threads, {arguments.num} images of {arguments.size}x{arguments.size}, ours in {dtype}"
        )
        for task, sides in tasks.items():
            times: tuple[list[float], list[float]] = ([], [])
            results = [run() for run in sides]  # warm-up
            for _ in range(arguments.repeats):
                for i, run in enumerate(sides):
                    spent, results[i] = seconds(run, device)
                    times[i].append(spent)
            theirs, ours = (arguments.num / statistics.median(spent) for spent in times)
            expected, found = results
            peak = 255.0 if task == "decode" else (expected.max() - expected.min()).item()
            print(
                f"{task}: diffusers {theirs:.2f} images/s, ditcli {ours:.2f} images/s, {ours / theirs:.2f} times; "
                f"PSNR between them {psnr(found, expected, peak):.1f} dB"
            )


if __name__ == "__main__":
    main()
