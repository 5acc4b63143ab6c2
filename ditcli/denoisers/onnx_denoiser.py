"""An exported network in ONNX Runtime as a denoiser. Free of torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from ditcli.config import ModelConfig
from ditcli.diffusion.process import Diffusion
from ditcli.errors import CheckpointError
from ditcli.runs import parse_model_config
from ditcli.sessions import open_session


@dataclass(frozen=True)
class OnnxDenoiser:
    """A session on some device; states are numpy arrays, which go there and back at each call.

    That is 32 KB per image of 4 x 32 x 32, where the network's weights alone are read by the ten MB.
    """

    session: ort.InferenceSession
    diffusion: Diffusion
    input_shape: tuple[int, int, int]
    class_names: tuple[str, ...]

    def __call__(self, x_t: np.ndarray, t: float, labels: np.ndarray) -> np.ndarray:
        time = np.full(len(x_t), self.diffusion.network_time(t), dtype=np.float32)
        (output,) = self.session.run(None, {"x_t": x_t, "t": time, "labels": labels})
        return output

    def from_numpy(self, array: np.ndarray) -> np.ndarray:
        return array

    def to_numpy(self, array: np.ndarray) -> np.ndarray:
        return array


def open_denoiser(path: Path, *, device: str = "auto") -> tuple[OnnxDenoiser, ModelConfig, bool]:
    """The denoiser of an exported network, what the file says of itself, and whether it holds the averaged weights."""
    session = open_session(path, device)
    metadata = session.get_modelmeta().custom_metadata_map
    config = parse_model_config(path, metadata)
    if [array.name for array in session.get_inputs()] != ["x_t", "t", "labels"]:
        raise CheckpointError(f"{path} is not the denoiser of an export, but another part of it: give its folder.")
    shape = (config.dit.in_channels, *config.dit.input_size)
    denoiser = OnnxDenoiser(session, Diffusion(config.diffusion), shape, config.class_names)
    return denoiser, config, json.loads(metadata.get("ema", "true"))
