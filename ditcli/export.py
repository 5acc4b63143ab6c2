"""A trained model as ONNX files that need no torch: the network, and the decoder of its codec."""

from __future__ import annotations

import copy
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.export import Dim

import ditcli
from ditcli import hub
from ditcli.codecs.codec import Autoencoder
from ditcli.codecs.folder import read_autoencoder
from ditcli.config import ExportConfig, ExportDtype, ModelConfig
from ditcli.errors import DitcliError, SettingError
from ditcli.models.dit import DiT, TimestepEmbedder
from ditcli.models.weights import load_dit
from ditcli.progress import say
from ditcli.runs import DECODER, DENOISER, FORMAT, export_folder
from ditcli.sessions import open_session

# The largest difference from torch in fp32 that a file may have; outputs are of about unit variance.
BOUNDS: dict[ExportDtype, float] = {"fp32": 1e-4, "fp16": 1e-2}
# Bytes of weights above which they go into a file of their own: a protobuf message ends at 2 GiB.
EXTERNAL_ABOVE = 1_900_000_000
# Modules of a denoiser that compute in fp32 in an fp16 export too: sums of squares, and sines of numbers up to 1000.
KEPT_IN_FP32 = (nn.LayerNorm, TimestepEmbedder)

Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class Part:
    """A network to write. All its inputs vary along the batch, those of four axes in height and width too."""

    file: str
    network: nn.Module
    inputs: Callable[[Shape], dict[str, Tensor]]  # random ones, of which the first has that shape (N, C, H, W)
    output: str
    shape: Shape  # of the example that is traced
    multiple: int  # of which height and width must be one
    half: bool  # whether an fp16 file computes in fp16, too, or keeps its weights so


@dataclass(frozen=True)
class Export:
    """What `export_onnx` wrote, and each file's largest difference from torch."""

    files: tuple[Path, ...]
    differences: tuple[float, ...]


def export_onnx(config: ExportConfig) -> Export:
    """Write `denoiser.onnx` and, unless the model works on pixels, `decoder.onnx`, with the model's config in them.

    Each runs in ONNX Runtime and in torch on random inputs of three shapes. A file that differs by more than `BOUNDS`
    is removed, with a DitcliError that says by how much; files of a former export stay until all new ones are whole.
    """
    checkpoint = hub.find_checkpoint(config.model)
    if checkpoint.suffix == ".onnx":
        raise SettingError(f"model is {config.model!r}, which is an ONNX export already: give the run it came from.")
    if checkpoint == hub.EMBEDDED_MODEL and config.out is None:
        raise SettingError(
            "out is left out, but the embedded model has no run folder to write into: give --out FOLDER."
        )
    network, model = load_dit(checkpoint, ema=config.ema)
    parts = [denoiser_part(network, model)]
    if model.codec != "pixels":
        parts.append(decoder_part(read_autoencoder(hub.find_codec(config.vae or model.codec)), model))
    elif config.vae is not None:
        raise SettingError(f"vae is {config.vae!r}, but {checkpoint} works on pixels, without a VAE: leave it out.")
    metadata = {
        "format": FORMAT,
        "config": json.dumps(model.to_dict()),
        "dtype": config.dtype,
        "ema": json.dumps(config.ema),
        "ditcli": ditcli.__version__,
        "torch": torch.__version__,
    }
    out = Path(config.out) if config.out else export_folder(checkpoint)
    say(f"Exporting {checkpoint} (step {model.step:,}) in {config.dtype}.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out, prefix=".export-") as partial:
            differences = [_write_and_compare(part, Path(partial), config, metadata) for part in parts]
            files = [_publish(Path(partial), out, part.file) for part in parts]
    except OSError as error:
        raise DitcliError(f"the export could not be written to {out} ({error.strerror or error}).") from error
    return Export(tuple(files), tuple(differences))


def denoiser_part(network: DiT, model: ModelConfig) -> Part:
    """x_t (N, C, H, W), t (N,), the network's time, and labels (N,) -> output (N, C or 2C, H, W)."""

    def inputs(shape: Shape) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        return {
            "x_t": torch.randn(shape, generator=generator),
            "t": model.diffusion.num_timesteps * torch.rand(shape[0], generator=generator),
            "labels": torch.randint(0, model.dit.num_classes + 1, (shape[0],), generator=generator),
        }

    # Tracing takes an axis of one token for a constant.
    height, width = (max(side, 2 * model.dit.stride) for side in model.dit.input_size)
    shape = (2, model.dit.in_channels, height, width)
    return Part(DENOISER, network, inputs, "output", shape, model.dit.stride, half=True)


def decoder_part(autoencoder: Autoencoder, model: ModelConfig) -> Part:
    """latents (N, C, h, w) -> images (N, 3, H, W) in about [-1, 1].

    Decoders compute in fp32 always: in fp16 that of TAESD is off by 1.3e-2, that of SDXL is known to overflow, and they
    run once where the denoiser runs at every step.
    """

    def inputs(shape: Shape) -> dict[str, Tensor]:
        return {"latents": torch.randn(shape, generator=torch.Generator().manual_seed(0))}

    shape = (2, autoencoder.config.latent_channels, *model.dit.input_size)
    return Part(DECODER, Decoder(autoencoder.float()).eval(), inputs, "images", shape, 1, half=False)


class Decoder(nn.Module):
    """The decoder of an autoencoder, from latents as the diffusion model has them."""

    def __init__(self, autoencoder: Autoencoder):
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, latents: Tensor) -> Tensor:
        config = self.autoencoder.config
        return self.autoencoder.decode(latents / config.scaling_factor + (config.shift_factor or 0.0))


def _write_and_compare(part: Part, folder: Path, config: ExportConfig, metadata: dict[str, str]) -> float:
    _write(part, folder, config, metadata)
    difference, bound = compare(folder / part.file, part, config.dtype), BOUNDS[config.dtype]
    say(f"{part.file}: the largest difference from torch is {difference:.1e}; {bound:g} is allowed.")
    if not difference <= bound:  # it may be NaN
        other = "--dtype fp32" if config.dtype == "fp16" else "another --opset or version of onnxruntime"
        raise DitcliError(
            f"{part.file} in {config.dtype} differs from torch by {difference:.2g}, of {bound:g} allowed, and was "
            f"removed: export it with {other}."
        )
    return difference


def compare(path: Path, part: Part, dtype: ExportDtype) -> float:
    """The largest difference between ONNX Runtime, on the CPU, and torch in fp32, over three shapes.

    On a CPU ONNX Runtime computes much of an fp16 file in fp32. What a GPU will round, or lose to infinity, torch shows
    in fp16: there the difference is the larger of the two.
    """
    session = open_session(path, "cpu")
    half = halve(part.network) if dtype == "fp16" and part.half else None
    _, channels, h, w = part.shape
    more = part.multiple
    differences = []
    for shape in [(1, channels, h, w), (3, channels, h, w + more), (2, channels, h + more, w)]:
        inputs = part.inputs(shape)
        (found,) = session.run(None, {name: array.numpy() for name, array in inputs.items()})
        with torch.inference_mode():
            expected = part.network(*inputs.values()).numpy()
            rounded = half(*inputs.values()).numpy() if half else expected
        differences += [np.abs(found - expected).max(), np.abs(rounded - expected).max()]
    return float(np.max(differences))  # NaN where one is


def _write(part: Part, folder: Path, config: ExportConfig, metadata: dict[str, str]) -> None:
    """Trace the network and save it, its weights in a file beside where they are large."""
    inputs = part.inputs(part.shape)
    batch, height, width = Dim("batch"), Dim("height"), Dim("width")
    axes = tuple({0: batch, 2: height, 3: width} if array.ndim == 4 else {0: batch} for array in inputs.values())
    half = config.dtype == "fp16"
    network = halve(part.network) if half and part.half else part.network
    with _quiet_exporter():
        program = torch.onnx.export(
            network,
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=[part.output],
            dynamic_shapes=axes,
            opset_version=config.opset,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    graph = program.model.graph
    shape = graph.outputs[0].shape
    assert shape is not None
    assert not any(isinstance(shape[axis], int) for axis in (0, 2, 3)), f"fixed in tracing: {shape}"
    if half and part.half:
        _softmax_in_fp32(graph)
    elif half:
        _store_in_fp16(graph)
    for node in graph:
        node.metadata_props.clear()  # where in our source it comes from, with the paths of this machine
    program.model.metadata_props.update(metadata)
    weights = sum(value.const_value.nbytes for value in graph.initializers.values() if value.const_value is not None)
    program.save(folder / part.file, external_data=weights > EXTERNAL_ABOVE)


def halve(network: nn.Module) -> nn.Module:
    """A copy with weights in fp16 and float32 inputs and outputs.

    Modules of `KEPT_IN_FP32` compute in fp32. So does what adds to the positions, which are fp32: the residual stream.
    """
    network = copy.deepcopy(network).half()
    for module in network.modules():
        if isinstance(module, KEPT_IN_FP32):
            module.float()
            module.register_forward_pre_hook(lambda _, inputs: tuple(array.float() for array in inputs))
            module.register_forward_hook(lambda _, inputs, output: output.half())
    network.register_forward_pre_hook(lambda _, inputs: (inputs[0].half(), *inputs[1:]))
    network.register_forward_hook(lambda _, inputs, output: output.float())
    return network


def _softmax_in_fp32(graph: ir.Graph) -> None:
    """Attention sums its weights in fp32, in the node of opset 23 as in the softmax of the sets before."""
    for node in list(graph):
        if node.op_type == "Attention":
            node.attributes.add(ir.AttrInt64("softmax_precision", ir.DataType.FLOAT))
        elif node.op_type == "Softmax":
            (half,) = node.outputs
            up = ir.node("Cast", [node.inputs[0]], {"to": ir.DataType.FLOAT})
            softmax = ir.node("Softmax", up.outputs, dict(node.attributes))
            down = ir.node("Cast", softmax.outputs, {"to": ir.DataType.FLOAT16})
            ir.convenience.replace_nodes_and_values(graph, node, [node], [up, softmax, down], [half], down.outputs)


def _store_in_fp16(graph: ir.Graph) -> None:
    """Weights in fp16, which a runtime turns into fp32 once, when it loads them."""
    first = graph[0]
    for name, weight in list(graph.initializers.items()):
        if weight.const_value is None or weight.dtype != ir.DataType.FLOAT or weight.const_value.size < 2:
            continue
        del graph.initializers[name]
        tensor = ir.tensor(weight.const_value.numpy().astype(np.float16), name=name)
        half = ir.Value(name=name, shape=weight.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(half)
        cast = ir.node("Cast", [half], {"to": ir.DataType.FLOAT})
        ir.convenience.replace_all_uses_with(weight, cast.outputs[0])
        graph.insert_before(first, cast)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep what the exporter says of packages we do not need, and of its own insides, from the terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _publish(partial: Path, out: Path, file: str) -> Path:
    """Move a file, after its weights if they have one of their own, to where it is found."""
    for name in (f"{file}.data", file):
        if not (partial / name).is_file():
            (out / name).unlink(missing_ok=True)  # of a former export, which was larger
            continue
        with (partial / name).open("rb") as written:
            os.fsync(written.fileno())
        (partial / name).replace(out / name)
    return out / file
