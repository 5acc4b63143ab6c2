"""A trained model in the runtime that suits its files: a checkpoint in torch, an export in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ditcli import hub
from ditcli.config import Backend, SampleConfig
from ditcli.diffusion.denoiser import Denoiser
from ditcli.errors import ModelNotFoundError, SettingError
from ditcli.progress import say
from ditcli.runs import DECODER, DENOISER, export_folder

Decode = Callable[[np.ndarray], np.ndarray]  # float32 latents (N, C, h, w) -> uint8 images (N, H, W, 3)


def find_model(name: str | None, backend: Backend = "auto") -> Path:
    """The file that a model's name leads to: a checkpoint, or with the backend `onnx` the export of it.

    Raises ModelNotFoundError where there is none, SettingError for an export where torch was asked for.
    """
    path = hub.find_checkpoint(name)
    exported = path.suffix == ".onnx"
    if exported and backend == "torch":
        raise SettingError(f"backend is 'torch', but {path} is an ONNX file: give the run it was exported from.")
    if exported or backend != "onnx":
        return path
    export = export_folder(path) / DENOISER
    if not export.is_file():
        raise ModelNotFoundError(
            f"{path} was not exported yet: run `ditcli export-onnx --model {name or path}`, then sample again."
        )
    if export.stat().st_mtime < path.stat().st_mtime:
        say(f"Note: {export} is older than {path}; `ditcli export-onnx --model {name or path}` renews it.")
    return export


def open_model(path: Path, config: SampleConfig) -> tuple[Denoiser, Decode, int]:
    """The denoiser of a file, the decoder of its latents, and the step of training it was saved at."""
    return _open_onnx(path, config) if path.suffix == ".onnx" else _open_torch(path, config)


def _open_torch(checkpoint: Path, config: SampleConfig) -> tuple[Denoiser, Decode, int]:
    try:
        import torch
    except ModuleNotFoundError as error:
        raise ModelNotFoundError(
            f"{checkpoint} needs torch, which is not installed: install it, or run `ditcli export-onnx` where it is "
            "and give --model the folder that it writes."
        ) from error

    from ditcli.codecs.codec import numpy_decoder
    from ditcli.codecs.named import open_named_codec
    from ditcli.denoisers.torch_denoiser import open_denoiser
    from ditcli.devices import choose_dtype, open_device

    device = open_device(config.device)
    dtype = choose_dtype(config.precision, device)
    denoiser, model = open_denoiser(checkpoint, ema=config.ema, device=device, dtype=dtype)
    codec = open_named_codec(config.vae or model.codec, device=device, dtype=torch.float32)
    return denoiser, numpy_decoder(codec), model.step


def _open_onnx(path: Path, config: SampleConfig) -> tuple[Denoiser, Decode, int]:
    from ditcli.codecs.onnx_decoder import decode_pixels, open_decoder
    from ditcli.denoisers.onnx_denoiser import open_denoiser
    from ditcli.sessions import CUDA

    if config.vae is not None:
        raise SettingError(f"vae is {config.vae!r}, but an ONNX export has its own decoder: export it with that --vae.")
    if config.precision == "bf16":
        raise SettingError("precision is 'bf16', but an ONNX export has its own: export it with --dtype fp16.")
    denoiser, model, ema = open_denoiser(path, device=config.device)
    if ema != config.ema:
        here, instead = ("averaged", "export it with --no-ema") if ema else ("raw", "sample with --no-ema")
        raise SettingError(f"{path} holds the {here} weights alone: {instead}.")
    if model.codec == "pixels":
        return denoiser, decode_pixels, model.step
    device = config.device if CUDA in denoiser.session.get_providers() else "cpu"  # it was said once
    return denoiser, open_decoder(path.with_name(DECODER), device=device), model.step
