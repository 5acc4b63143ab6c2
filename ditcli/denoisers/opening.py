"""A trained model in the runtime that suits its files: a checkpoint in torch, an export in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ditcli import hub
from ditcli.config import Backend, ModelConfig, SampleConfig
from ditcli.diffusion.denoiser import Denoiser
from ditcli.errors import ModelNotFoundError, SettingError
from ditcli.progress import say
from ditcli.runs import DECODER, DENOISER, export_folder

if TYPE_CHECKING:
    from ditcli.codecs.codec import Codec

Decode = Callable[[np.ndarray], np.ndarray]  # float32 latents (N, C, h, w) -> uint8 images (N, H, W, 3)
Opened = tuple[Denoiser, Decode, ModelConfig]


def find_model(name: str | None, backend: Backend = "auto") -> Path:
    """The file that a model's name leads to: a checkpoint, or with the backend `onnx` the export of it.

    The embedded model comes with its export, from which a picture is drawn before torch would be imported. Raises
    ModelNotFoundError where there is none, SettingError for an export where torch was asked for.
    """
    path = hub.find_checkpoint(name)
    if is_export(path) and backend in ("torch", "jax"):
        raise SettingError(f"backend is {backend!r}, but {path} is an ONNX file: give the run it was exported from.")
    if path == hub.EMBEDDED_MODEL:
        return path if backend in ("torch", "jax") else path.with_name(DENOISER)
    if is_export(path) or backend != "onnx":
        return path
    export = export_folder(path) / DENOISER
    command = f"`ditcli export-onnx --model {name or path}`"
    if not export.is_file():
        raise ModelNotFoundError(f"{path} was not exported yet: run {command}, then sample again.")
    if export.stat().st_mtime < path.stat().st_mtime:
        say(f"Note: {export} is older than {path}; {command} renews it.")
    return export


def is_export(path: Path) -> bool:
    """Whether a model's file is for ONNX Runtime."""
    return path.suffix == ".onnx"


def open_model(path: Path, config: SampleConfig) -> Opened:
    """The denoiser of a file, the decoder of its latents, and what the file says of itself."""
    if is_export(path):
        return _open_onnx(path, config)
    return _open_jax(path, config) if config.backend == "jax" else _open_torch(path, config)


def open_guide(name: str, model: Path, config: SampleConfig) -> Denoiser:
    """The denoiser that guides the one of the file `model`; SettingError unless both run in the same runtime."""
    path = find_model(name, config.backend)
    if is_export(path) != is_export(model):
        raise SettingError(
            f"guide-model is {path} and model is {model}: give two checkpoints or two folders of `ditcli export-onnx`."
        )
    return open_model(path, replace(config, adapter=None))[0]


def encode_picture(pixels: np.ndarray, codec_name: str, device: str) -> np.ndarray:
    """The latents (C, h, w) of a uint8 picture (S, S, 3): the mean of its encoding, by torch except for pixels."""
    image = pixels.transpose(2, 0, 1)
    if codec_name == "pixels":
        return image.astype(np.float32) / np.float32(127.5) - np.float32(1)
    _need_torch(f"the encoder of {codec_name}, for --init,")
    import torch

    from ditcli.codecs.named import open_named_codec
    from ditcli.devices import open_device

    codec = open_named_codec(codec_name, device=open_device(device), dtype=torch.float32)
    return codec.to_latents(codec.encode(torch.from_numpy(image.copy())[None]))[0].numpy()


def _open_torch(checkpoint: Path, config: SampleConfig) -> Opened:
    _need_torch(str(checkpoint), ", or run `ditcli export-onnx` where it is and give --model the folder that it writes")

    from ditcli.codecs.codec import numpy_decoder
    from ditcli.codecs.named import open_named_codec
    from ditcli.denoisers.torch_denoiser import compile_blocks, open_denoiser
    from ditcli.devices import choose_dtype, open_device

    device = open_device(config.device)
    dtype = choose_dtype(config.precision, device)
    adapter = hub.find_checkpoint(config.adapter) if config.adapter and config.model else None
    denoiser, model = open_denoiser(checkpoint, ema=config.ema, adapter=adapter, device=device, dtype=dtype)
    if config.compile:
        compile_blocks(denoiser)
    codec = open_named_codec(config.vae or model.codec, device=device, dtype=dtype)
    _check_codec(codec, denoiser, model)
    return denoiser, numpy_decoder(codec), model


def _open_jax(checkpoint: Path, config: SampleConfig) -> Opened:
    """The network in JAX; checkpoints are read, and latents are decoded, by torch on the CPU."""
    _need_torch(str(checkpoint))
    try:
        import jax  # noqa: F401
    except ModuleNotFoundError as error:
        raise SettingError(
            "backend is 'jax', but JAX is not installed: `pip install 'ditcli[jax]'`, or leave --backend out."
        ) from error
    if config.compile:
        raise SettingError("compile is for the torch backend: jax compiles by itself.")
    if config.precision == "bf16":
        raise SettingError("precision is 'bf16', but the jax backend computes in fp32: leave it out.")
    import torch

    from ditcli.codecs.codec import numpy_decoder
    from ditcli.codecs.named import open_named_codec
    from ditcli.denoisers.jax_denoiser import open_denoiser

    adapter = hub.find_checkpoint(config.adapter) if config.adapter and config.model else None
    denoiser, model = open_denoiser(checkpoint, ema=config.ema, adapter=adapter, device=config.device)
    codec = open_named_codec(config.vae or model.codec, device=torch.device("cpu"), dtype=torch.float32)
    _check_codec(codec, denoiser, model)
    return denoiser, numpy_decoder(codec), model


def _check_codec(codec: Codec, denoiser: Denoiser, model: ModelConfig) -> None:
    shape = codec.latent_shape(model.image_size, model.image_size)
    if shape != denoiser.input_shape:
        raise SettingError(f"vae {codec.name} has latents of {shape}, but the model's are {denoiser.input_shape}.")


def _open_onnx(path: Path, config: SampleConfig) -> Opened:
    from ditcli.codecs.onnx_decoder import decode_pixels, open_decoder
    from ditcli.denoisers.onnx_denoiser import open_denoiser
    from ditcli.sessions import CUDA

    if config.adapter is not None:
        raise SettingError(
            f"adapter is {config.adapter!r}, but an ONNX export's weights are fixed: export the adapter."
        )
    if config.vae is not None:
        raise SettingError(f"vae is {config.vae!r}, but an ONNX export has its own decoder: export it with that --vae.")
    if config.compile:
        raise SettingError("compile is for the torch backend: ONNX Runtime optimises an export as it loads it.")
    if config.precision == "bf16":
        raise SettingError("precision is 'bf16', but an ONNX export has its own: export it with --dtype fp16.")
    denoiser, model, ema = open_denoiser(path, device=config.device)
    if ema != config.ema:
        here, instead = ("averaged", "export it with --no-ema") if ema else ("raw", "sample with --no-ema")
        raise SettingError(f"{path} holds the {here} weights alone: {instead}.")
    if model.codec == "pixels":
        return denoiser, decode_pixels, model
    device = config.device if CUDA in denoiser.session.get_providers() else "cpu"  # it was said once
    return denoiser, open_decoder(path.with_name(DECODER), device=device), model


def _need_torch(what: str, otherwise: str = "") -> None:
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModelNotFoundError(f"{what} needs torch, which is not installed: install it{otherwise}.") from error
