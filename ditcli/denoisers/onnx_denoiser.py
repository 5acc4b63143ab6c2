"""An exported network in ONNX Runtime as a denoiser. Free of torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import onnxruntime as ort

from ditcli.config import ModelConfig
from ditcli.diffusion.process import Array, Diffusion
from ditcli.errors import CheckpointError
from ditcli.progress import say
from ditcli.runs import parse_model_config
from ditcli.sessions import CUDA, open_session


@dataclass(frozen=True)
class OnnxDenoiser:
    """A session whose inputs and outputs are bound to arrays where they lie: numpy's, or CuPy's on the session's GPU.

    `arrays` is the module whose arrays the states are. A session on a GPU takes numpy's too and copies them.
    """

    session: ort.InferenceSession
    diffusion: Diffusion
    input_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    out_channels: int
    arrays: ModuleType = np

    def __call__(self, x_t: Array, t: float, labels: Array) -> Array:
        xp = self.arrays
        time = xp.full(len(x_t), self.diffusion.network_time(t), dtype=np.float32)
        output = xp.empty((len(x_t), self.out_channels, *x_t.shape[2:]), dtype=np.float32)
        bound = {"x_t": xp.ascontiguousarray(x_t), "t": time, "labels": xp.ascontiguousarray(labels)}
        binding = self.session.io_binding()
        for name, array in bound.items():
            binding.bind_input(name, *_place(array), array.dtype, array.shape, _address(array))
        binding.bind_output("output", *_place(output), output.dtype, output.shape, _address(output))
        if xp is not np:
            xp.cuda.get_current_stream().synchronize()  # ONNX Runtime works on a stream of its own
        self.session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return output

    def from_numpy(self, array: np.ndarray) -> Array:
        return self.arrays.asarray(array)

    def to_numpy(self, array: Array) -> np.ndarray:
        return array if self.arrays is np else self.arrays.asnumpy(array)


def _place(array: Array) -> tuple[str, int]:
    """Device and its number in ONNX Runtime's words."""
    return ("cpu", 0) if isinstance(array, np.ndarray) else ("cuda", array.device.id)


def _address(array: Array) -> int:
    interface = array.__array_interface__ if isinstance(array, np.ndarray) else array.__cuda_array_interface__
    return interface["data"][0]


def open_denoiser(path: Path, *, device: str = "auto") -> tuple[OnnxDenoiser, ModelConfig, bool]:
    """The denoiser of an exported network, what the file says of itself, and whether it holds the averaged weights."""
    session = open_session(path, device)
    metadata = session.get_modelmeta().custom_metadata_map
    config = parse_model_config(path, metadata)
    if [array.name for array in session.get_inputs()] != ["x_t", "t", "labels"]:
        raise CheckpointError(f"{path} is not the denoiser of an export, but another part of it: give its folder.")
    shape = (config.dit.in_channels, *config.dit.input_size)
    process, channels = Diffusion(config.diffusion), config.dit.out_channels
    denoiser = OnnxDenoiser(session, process, shape, config.class_names, channels, _arrays_of(session))
    return denoiser, config, json.loads(metadata.get("ema", "true"))


def _arrays_of(session: ort.InferenceSession) -> ModuleType:
    """CuPy for a session on a GPU, so that states stay there, where it is installed and works; else numpy."""
    if CUDA not in session.get_providers():
        return np
    try:
        import cupy

        cupy.cuda.Device(int(session.get_provider_options()[CUDA]["device_id"])).use()
        cupy.ones(1)  # compiles a kernel, for which a library or a header of CUDA may be missing
    except Exception as error:
        cause = "CuPy is not installed" if isinstance(error, ModuleNotFoundError) else f"CuPy failed: {error}"
        say(
            f"States are copied to the GPU and back at each step, since {' '.join(cause.split())[:200]}; "
            "`pip install 'ditcli[cuda]'` keeps them there."
        )
        return np
    return cupy
