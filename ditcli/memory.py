"""How much memory there is, and how many images fit into it at once."""

from __future__ import annotations

import numpy as np
import psutil

from ditcli.config import DiTConfig
from ditcli.diffusion.denoiser import Denoiser
from ditcli.diffusion.process import Array

# Larger batches are no faster: a few images fill two cores, some hundred a GPU.
MOST_AT_ONCE = {"cpu": 16, "cuda": 256}
SHARE_OF_FREE = 0.6  # the rest is for the decoder and for whoever else needs some


def fitting_batch(denoiser: Denoiser, dit: DiTConfig, *, passes: int) -> int:
    """Images that can be drawn at a time in the free memory of the denoiser's device, `passes` of each per call."""
    kind, free = _free_beside(denoiser.from_numpy(np.zeros(1, dtype=np.float32)))
    fitting = int(SHARE_OF_FREE * free / (passes * bytes_per_image(dit)))
    return max(1, min(MOST_AT_ONCE[kind], fitting))


def _free_beside(array: Array) -> tuple[str, int]:
    """`cpu` or `cuda`, and the free bytes of the device on which an array of some runtime lies."""
    device = array.device
    if hasattr(device, "mem_info"):  # CuPy's, where there may be no torch to ask
        return "cuda", device.mem_info[0]
    pool = device.memory_stats() if hasattr(device, "memory_stats") else None  # JAX takes most of a GPU for itself
    if pool:
        return "cuda", pool["bytes_limit"] - pool["bytes_in_use"]
    if "cuda" not in str(device).lower():
        return "cpu", free_memory("cpu")
    number = getattr(device, "id", getattr(device, "index", None))  # JAX's, torch's
    return "cuda", free_memory(f"cuda:{number or 0}")


def fitting_micro_batch(
    dit: DiTConfig, batch_size: int, *, device: str, bytes_per_number: int, checkpointed: bool, reserved: int
) -> int:
    """The largest divisor of a training's batch whose activations fit into the free memory, less `reserved` bytes."""
    kept = kept_per_image(dit, bytes_per_number, checkpointed=checkpointed)
    fitting = int(SHARE_OF_FREE * (free_memory(device) - reserved) / kept)
    return max(size for size in range(1, batch_size + 1) if batch_size % size == 0 and size <= max(1, fitting))


def kept_per_image(dit: DiTConfig, bytes_per_number: int, *, checkpointed: bool = False) -> int:
    """Bytes that an image's forward pass keeps for its backward pass, at 2 bytes per number with autocast.

    Per token and width a block keeps 13 numbers and the MLP's hidden layer twice, a gated one four times; queries and
    keys once more where they are rotated, and where they are normalised. The four that stay in fp32 are its
    tokens before attention and before the MLP, each as they are and normalised. Of a stage of convolutions there are
    the skip, and the decoder's map before and after it is merged, each with and without its activation.
    """
    numbers = 13 + hidden_numbers(dit) + 2 * dit.rope + 2 * dit.qk_norm
    block = numbers * bytes_per_number + 4 * (4 - bytes_per_number)
    blocks = 4 * dit.depth + block if checkpointed else dit.depth * block
    return int(dit.num_tokens * dit.width * blocks + 6 * dit.conv_numbers * bytes_per_number)


def hidden_numbers(dit: DiTConfig) -> float:
    """Numbers inside an MLP, per number of its input: before and after the activation, and with a gate its product."""
    return (2 if dit.mlp == "gelu" else 4) * dit.mlp_width / dit.width


def free_memory(device: str) -> int:
    """Bytes that nobody uses on `cpu` or a CUDA device."""
    if device == "cpu":
        return psutil.virtual_memory().available
    import torch

    return torch.cuda.mem_get_info(device)[0]


def used_memory(device: str) -> int:
    """Bytes: the most that tensors took so far on a CUDA device, or what this process holds now."""
    if device == "cpu":
        return psutil.Process().memory_info().rss
    import torch

    return torch.cuda.max_memory_allocated(device)


def bytes_per_image(dit: DiTConfig) -> int:
    """An upper bound of what an image needs in one pass through a network in float32, weights left out.

    At its widest a block holds tokens and normalised tokens, then three of them for attention and the result, or the
    MLP's hidden layer before and after its activation, and where attention is not fused two tables of scores. The
    allocator holds up to as much again of what was freed: with a DiT-S/2 on a CPU 1.0 times the sum was measured.
    Convolutions around it hold their skips, and at their widest four maps more.
    """
    tokens = dit.num_tokens + 2
    widest = dit.width * (4 + max(4.0, hidden_numbers(dit)))
    return int(2 * 4 * (tokens * (widest + 2 * dit.num_heads * tokens) + 5 * dit.conv_numbers))
