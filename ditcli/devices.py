"""Which device and which precision."""

from __future__ import annotations

import ctypes
import platform

import numpy as np
import torch
from torch import Tensor

from ditcli.config import Precision
from ditcli.errors import SettingError
from ditcli.processes import local_rank, started

# Dense bf16 operations per second, from the data sheets: the first all of whose words are in the device's name.
BF16_PEAKS = {
    "B200": 2.25e15,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
}


def bf16_peak(device: torch.device) -> float | None:
    """Operations per second that the device can do in bf16 at most; None where that is not known."""
    return bf16_peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def bf16_peak_of(name: str) -> float | None:
    """The same of a device's name, as in `NVIDIA H100 80GB HBM3`."""
    words = set(name.replace("-", " ").split())
    if "MIG" in words:  # a part of a device
        return None
    return next((peak for known, peak in BF16_PEAKS.items() if words.issuperset(known.split())), None)


def open_device(name: str) -> torch.device:
    """`auto` is a GPU where there is one: the first, or of several processes each has its own.

    Raises ValueError for a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and started():
        name = f"cuda:{local_rank()}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SettingError(f"device is {name!r}, but must be auto, cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise SettingError(f"device is {name!r}, but must be auto, cpu, cuda or cuda:N.")
    if device.type == "cpu":
        _keep_freed_memory()
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SettingError(f"device is {name!r}, but torch {torch.__version__} sees no CUDA device: use --device cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingError(f"device is {name!r}, but there are only {torch.cuda.device_count()} CUDA devices.")
    return device


# Parameters of mallopt(3), and glibc's own values of them.
TRIM_THRESHOLD, MMAP_MAX = -1, -4
DEFAULT_TRIM_THRESHOLD, DEFAULT_MMAP_MAX = 128 * 1024, 65536


def _keep_freed_memory() -> None:
    """Have glibc keep what tensors leave, up to 2 GB, for the next ones; returned pages come back one fault at a time.

    That takes 9 % of a DiT's training step and 14 % of decoding a picture.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(MMAP_MAX, 0)
        libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)


def give_back_memory(device: torch.device) -> None:
    """Return what no tensor uses, where memory was short; on a CPU from now on, at the price above."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(MMAP_MAX, DEFAULT_MMAP_MAX)
        libc.mallopt(TRIM_THRESHOLD, DEFAULT_TRIM_THRESHOLD)
        libc.malloc_trim(0)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed: CUDA's error has a type of its own, torch and oneDNN on a CPU their sentences."""
    said = ("DefaultCPUAllocator", "could not create a primitive")
    return isinstance(error, torch.OutOfMemoryError) or any(sentence in str(error) for sentence in said)


def choose_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """torch.bfloat16 or torch.float32. `auto` is bf16 where the hardware multiplies in it.

    On a CPU that is AVX512-BF16 or AMX, with which a training step takes 0.4 of the time; elsewhere bf16 is emulated.
    """
    if precision != "auto":
        return torch.bfloat16 if precision == "bf16" else torch.float32
    if device.type == "cuda":
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


def place(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy on the device. A GPU's is made through pinned memory: else one waits until the GPU has nothing to do."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
