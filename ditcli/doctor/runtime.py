"""ONNX Runtime: which build, and whether a session of it really comes up on the GPU."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ditcli.doctor.findings import Finding, error, ok, warning
from ditcli.doctor.machine import Driver, read_driver
from ditcli.doctor.packages import installed
from ditcli.errors import DitcliError

# x -> x @ x, as onnx.helper makes it (a test compares): there is no onnx where models are only sampled.
SQUARE = (
    b'\x08\x08:D\n\x11\n\x01x\n\x01x\x12\x01y"\x06MatMul\x12\x01gZ\x15\n\x01x\x12\x10\n\x0e\x08\x01\x12\n\n\x03\x12\x01n'
    b"\n\x03\x12\x01nb\x15\n\x01y\x12\x10\n\x0e\x08\x01\x12\n\n\x03\x12\x01n\n\x03\x12\x01nB\x04\n\x00\x10\x14"
)
ONE_ALONE = "`pip uninstall -y onnxruntime onnxruntime-gpu`, then `pip install onnxruntime-gpu` (on macOS onnxruntime)"


def check_onnxruntime() -> Iterator[Finding]:
    builds = {name: version for name in ("onnxruntime", "onnxruntime-gpu") if (version := installed(name))}
    if len(builds) > 1:
        both = " and ".join(f"{name} {version}" for name, version in builds.items())
        found = f"{both} are both installed: each overwrites the other's files, and CUDA may silently not be used"
        yield error("onnxruntime", found, ONE_ALONE)
    try:
        import onnxruntime as ort

        from ditcli.sessions import CUDA
    except ImportError as problem:
        if not builds:
            yield warning("onnxruntime", "not installed: nothing is exported to ONNX", "`pip install onnxruntime-gpu`")
        else:
            yield error("onnxruntime", f"is installed, but broken: {problem}", ONE_ALONE)
        return
    driver = read_driver()
    has_gpu = isinstance(driver, Driver) and bool(driver.gpus)
    build = f"{ort.__version__}, built {'with' if CUDA in ort.get_available_providers() else 'without'} CUDA"
    try:
        session = open_square("cuda" if has_gpu else "cpu")
        is_right = multiplies(session)
    except DitcliError as problem:
        yield error("onnxruntime", f"{build}; no session comes up on the GPU", str(problem))
        return
    where = "CUDA" if session.get_providers()[0] == CUDA else "the CPU"
    if not is_right:
        yield error("onnxruntime", f"{build}; the product of two matrices is wrong on {where}", ONE_ALONE)
    else:
        yield ok("onnxruntime", f"{build}; a session runs on {where}")


def open_square(device: str) -> Any:
    """A session of `SQUARE`. Raises as `open_session` does."""
    from ditcli.sessions import open_session

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "square.onnx"
        path.write_bytes(SQUARE)
        return open_session(path, device)


def multiplies(session: Any, size: int = 4) -> bool:
    """Square a matrix of which the square is known."""
    mirror = np.eye(size, dtype=np.float32)[::-1].copy()
    (product,) = session.run(None, {"x": mirror})
    return np.array_equal(product, np.eye(size, dtype=np.float32))
