"""ONNX Runtime sessions: which device, which options, and what is wrong where none comes up. Free of torch."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import sys
from pathlib import Path
from typing import Any

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as raised

from ditcli.errors import CheckpointError, SettingError
from ditcli.processes import local_rank
from ditcli.progress import say

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
SILENT = 4  # tell of what is fatal alone: errors are raised
LOAD_ERRORS = (
    *(raised.Fail, raised.InvalidArgument, raised.InvalidGraph, raised.InvalidProtobuf, raised.NoModel),
    *(raised.NoSuchFile, raised.NotFound, raised.NotImplemented, raised.RuntimeException, raised.EPFail),
)


def open_session(path: Path, device: str = "auto") -> ort.InferenceSession:
    """A session of an ONNX file on `device`: auto, cpu, cuda or cuda:N.

    `auto` takes CUDA where ONNX Runtime can use it and says so where it falls back on the CPU. Raises SettingError for
    CUDA that was asked for and is not there, CheckpointError for a file that is damaged or no ONNX.
    """
    number = _cuda_device(device)
    if number is not None:
        try:
            return _open_on_cuda(path, number)
        except _NoCuda as obstacle:
            cause, cure = obstacle.args
            if device != "auto":
                raise SettingError(f"device is {device!r}, but {cause}. {cure}, or use --device cpu.") from obstacle
            say(f"Running on the CPU: {cause}.")
    return _open(path, [CPU])


class _NoCuda(Exception):
    """What keeps CUDA from working, and what mends it: two sentences."""


def _open_on_cuda(path: Path, number: int) -> ort.InferenceSession:
    if CUDA not in ort.get_available_providers():
        cure = "Replace the package onnxruntime: `pip install 'onnxruntime-gpu[cuda,cudnn]'`"
        raise _NoCuda(f"ONNX Runtime {ort.__version__} was built without CUDA", cure)
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError as error:
        raise _NoCuda("there is no NVIDIA driver", "Install it") from error
    ort.set_default_logger_severity(SILENT)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints which libraries it does not find, and where to read on
        ort.preload_dlls()
        try:
            session = _open(path, [(CUDA, {"device_id": number}), CPU])
        except CheckpointError as error:
            if "CUDA" not in str(error):
                raise
            raise _NoCuda(f"CUDA device {number} failed ({error})", "See `nvidia-smi` for what is free") from error
    if CUDA in session.get_providers():  # where its provider does not load, the session is on the CPU without a word
        session.disable_fallback()  # nor go there when a run fails
        return session
    name = "onnxruntime_providers_cuda.dll" if sys.platform == "win32" else "libonnxruntime_providers_cuda.so"
    try:
        ctypes.CDLL(str(Path(ort.__file__).parent / "capi" / name))
    except OSError as error:
        if "ProviderHost" not in str(error):  # that is of the library which loads this one: all others were found
            cure = "Get it with `pip install 'onnxruntime-gpu[cuda,cudnn]'`"
            raise _NoCuda(f"a library of CUDA is missing ({error})", cure) from error
    raise _NoCuda(f"CUDA device {number} cannot be used", "See `nvidia-smi` for whether it is there and well")


def _open(path: Path, providers: list[Any]) -> ort.InferenceSession:
    if not path.is_file():
        raise CheckpointError(f"there is no {path}: export the model again with `ditcli export-onnx`.")
    try:
        return ort.InferenceSession(path, _options(), providers=providers)
    except LOAD_ERRORS as error:
        told = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} is damaged or no ONNX file ({told}): export the model again.") from error


def _options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = SILENT
    options.intra_op_num_threads = num_threads()
    return options


def num_threads() -> int:
    """`$OMP_NUM_THREADS`, or as many threads as this process has cores."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdigit() and int(wanted) > 0:
        return int(wanted)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cuda_device(name: str) -> int | None:
    """The number of the CUDA device that a name asks for, for auto that of this process; None for the CPU."""
    kind, _, number = name.partition(":")
    if name == "cpu":
        return None
    if name not in ("auto", "cuda") and not (kind == "cuda" and number.isdigit()):
        raise SettingError(f"device is {name!r}, but must be auto, cpu, cuda or cuda:N.")
    return int(number or local_rank())
