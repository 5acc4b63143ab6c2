"""Processor, memory, driver, GPUs, and torch on them."""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from ditcli.doctor.findings import Finding, error, ok, warning
from ditcli.sessions import num_threads

GET_TORCH = "Get a CUDA build of torch: `pip install torch`, or as https://pytorch.org says for your driver"
HIDDEN = "See what `nvidia-smi` says, and whether CUDA_VISIBLE_DEVICES hides it; without a driver install NVIDIA's."
BF16_FROM = (8, 0)  # compute capability


def check_cpu() -> Iterator[Finding]:
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    yield ok("cpu", f"{cpu_name()}, {cores} cores, {num_threads()} threads")
    memory = psutil.virtual_memory()
    found = f"{memory.total / 1e9:.1f} GB, {memory.available / 1e9:.1f} GB of it free"
    if memory.available < 2e9:
        yield warning("memory", found, "Training needs 2 GB and more: end other programs.")
    else:
        yield ok("memory", found)


def check_driver() -> Iterator[Finding]:
    """NVIDIA's driver and the GPUs that it knows."""
    driver = read_driver()
    if isinstance(driver, Driver):
        yield ok("driver", f"NVIDIA {driver.version}for CUDA up to {driver.cuda}")
        for number, gpu in enumerate(driver.gpus):
            yield ok(f"gpu {number}", gpu)
        if not driver.gpus:
            yield error("gpu", "the driver sees none", HIDDEN)
    elif _has_nvidia_device():
        yield error("driver", f"there is an NVIDIA GPU, but {driver}", HIDDEN)
    else:
        yield ok("driver", f"{driver}; all runs on the CPU")


def check_torch() -> Iterator[Finding]:
    """Whether torch is there, and comes up on the GPU where there is one."""
    try:
        import torch
    except ModuleNotFoundError:
        yield warning("torch", "not installed: exported models alone can be sampled", "`pip install torch`")
        return
    driver = read_driver()
    has_gpu = isinstance(driver, Driver) and bool(driver.gpus)
    version = f"{torch.__version__}, {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'without CUDA'}"
    if not has_gpu:
        from ditcli.devices import choose_dtype

        bf16 = choose_dtype("auto", torch.device("cpu")) == torch.bfloat16
        yield ok("torch", f"{version}; the CPU multiplies in bf16: {'yes' if bf16 else 'no, fp32 is used'}")
        return
    if not torch.version.cuda:
        yield error("torch", f"{version}, though there is a GPU", f"{GET_TORCH}.")
        return
    try:
        with torch.inference_mode():
            for number in range(torch.cuda.device_count()):
                square = torch.ones(64, 64, device=f"cuda:{number}")
                (square @ square).sum().item()
            torch.cuda.init()  # says why where the driver's GPUs are none to torch
    except (RuntimeError, AssertionError) as problem:
        yield error("torch", f"{version}, fails on the GPU: {' '.join(str(problem).split())}", f"{GET_TORCH}.")
        return
    yield ok("torch", f"{version}, comes up on {torch.cuda.device_count()} GPU(s)")
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        has_bf16 = torch.cuda.get_device_capability(number) >= BF16_FROM
        found = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free; bf16: {'yes' if has_bf16 else 'no, fp32 is used'}"
        if free < 2e9:
            yield warning(f"cuda:{number}", found, "See `nvidia-smi` for who uses it.")
        else:
            yield ok(f"cuda:{number}", found)


@dataclass(frozen=True)
class Driver:
    version: str  # "570.86.10, ", empty where it is not told
    cuda: str  # the newest CUDA that it runs
    gpus: list[str]


def read_driver() -> Driver | str:
    """What the CUDA driver API says (https://docs.nvidia.com/cuda/cuda-driver-api), or in words why it says nothing."""
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver"
    number, total, major, minor = ctypes.c_int(), ctypes.c_size_t(), ctypes.c_int(), ctypes.c_int()
    if code := cuda.cuInit(0):
        if code == 100:  # CUDA_ERROR_NO_DEVICE
            return "the NVIDIA driver sees no GPU"
        return f"the NVIDIA driver does not start (CUDA error {code})"
    cuda.cuDriverGetVersion(ctypes.byref(number))
    newest = f"{number.value // 1000}.{number.value % 1000 // 10}"
    cuda.cuDeviceGetCount(ctypes.byref(number))
    gpus = []
    for ordinal in range(number.value):
        device, name = ctypes.c_int(), ctypes.create_string_buffer(100)
        cuda.cuDeviceGet(ctypes.byref(device), ordinal)
        cuda.cuDeviceGetName(name, len(name), device)
        cuda.cuDeviceTotalMem_v2(ctypes.byref(total), device)
        cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device)  # COMPUTE_CAPABILITY_MAJOR
        cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
        capability = f"compute capability {major.value}.{minor.value}"
        gpus.append(f"{name.value.decode(errors='replace')}, {total.value / 1e9:.0f} GB, {capability}")
    return Driver(_driver_version(), newest, gpus)


def _driver_version() -> str:
    try:
        management = ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
        version = ctypes.create_string_buffer(80)
        if management.nvmlInit_v2() or management.nvmlSystemGetDriverVersion(version, len(version)):
            return ""
        return f"{version.value.decode()}, "
    except OSError:
        return ""


def _has_nvidia_device() -> bool:
    """Whether one is on the PCI bus, as Linux lists it: vendor 10de, a display or 3-D controller."""
    for device in Path("/sys/bus/pci/devices").glob("*"):
        try:
            vendor, kind = (device / "vendor").read_text().strip(), (device / "class").read_text().strip()
        except OSError:
            continue
        if vendor == "0x10de" and kind.startswith("0x03"):
            return True
    return False


def cpu_name() -> str:
    """As the system calls it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
