"""What a sampler's steps buy, and what a backend's calls cost; Markdown tables on stdout.

    python scripts/bench_sampling.py samplers --model runs/celeba-dit-s-2-128 --features features.onnx
    python scripts/bench_sampling.py backends --vae madebyollin/taesd

`samplers` draws the same pictures with every sampler at 5, 10, 20 and 50 steps: seconds per image, and for those that
solve the ODE the difference from Heun's method with 1000 steps, as mean absolute pixel error and, with --features, as
distance in features, in units of the mean distance between two of the reference pictures. Features are those of an ONNX
file from N x 3 x 224 x 224 in [0, 1] to N x D.

`backends` draws with a DiT-S/2 of random weights on latents of 4 x 32 x 32, 50 guided DDIM steps and a decoder: torch
eager, compiled and in bf16, ONNX Runtime where `ditcli export-onnx` is there, and diffusers' DiT pipeline with the same
weights. Candidates take turns, so that what else the machine does hits all alike; numbers are medians.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ditcli import hub
from ditcli.codecs.codec import numpy_decoder
from ditcli.codecs.named import open_named_codec
from ditcli.config import ModelConfig, TrainConfig
from ditcli.denoisers.forecast import cache_blocks
from ditcli.denoisers.torch_denoiser import as_denoiser, cast_products, compile_blocks, open_denoiser
from ditcli.devices import open_device
from ditcli.diffusion.denoiser import Denoiser
from ditcli.diffusion.guidance import guide
from ditcli.diffusion.samplers import time_grid
from ditcli.drawing import Decode, choose_sampler, generate
from ditcli.models.dit import DiT
from ditcli.runs import DECODER, DENOISER, RunDir
from ditcli.starts import Start
from ditcli.training.checkpoints import save_checkpoint

CPU = open_device("cpu")  # which keeps the memory that tensors leave, for diffusers too
STOCHASTIC = ("ddpm", "dpm++2m-sde")
CALLS = {"heun": 2, "midpoint": 2, "rk4": 4}
SAMPLERS = ("ddim", "lms", "dpm++2m", "unipc", "heun", "midpoint", "rk4", *STOCHASTIC)


def tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def images(
    denoiser: Denoiser,
    decode: Decode,
    name: str,
    steps: int,
    *,
    labels: list[int],
    cfg: float,
    batch: int,
    shift: float = 1.0,
) -> np.ndarray:
    """uint8 (N, H, W, 3), image k with seed k."""
    drawings = generate(
        guide(denoiser, cfg),
        decode,
        choose_sampler(name),
        time_grid(denoiser.diffusion.schedule, steps, shift=shift),
        labels=labels,
        starts=[Start(seed) for seed in range(len(labels))],
        batch_size=batch,
    )
    return np.stack([drawing.image for drawing in drawings])


def bench_samplers(args: argparse.Namespace) -> None:
    checkpoint = hub.find_checkpoint(args.model)
    denoiser, model = open_denoiser(checkpoint, device=CPU)
    decode = numpy_decoder(open_named_codec(model.codec, device=CPU))
    labels = [k % max(len(model.class_names), 1) for k in range(args.num)]
    settings = {"labels": labels, "cfg": args.cfg, "batch": args.batch_size}
    most = denoiser.diffusion.schedule.num_steps or 1000
    tell(f"Reference: {args.num} images, Heun with {min(most, 1000)} steps.")
    reference = images(denoiser, decode, "heun", min(most, 1000), **settings)
    distance = feature_distance(args.features, reference) if args.features else None
    cached, _ = open_denoiser(checkpoint, device=CPU)
    cached_denoiser = cache_blocks(cached, 3)

    print(f"{checkpoint.parent.parent.name}, step {model.step:,}; {args.num} images, cfg {args.cfg:g}")
    print(f"\n| sampler | steps | calls | s/image | pixel error |{' feature distance |' if distance else ''}")
    print(f"|---|---|---|---|---|{'---|' if distance else ''}")
    variants = ["ddim --cache 3", "unipc --cache 3"]
    if model.diffusion.schedule == "flow":
        variants += [f"{name} --shift 2" for name in ("ddim", "lms", "unipc")]
    for name in (*SAMPLERS, *variants):
        shift = 2.0 if "--shift" in name else 1.0
        for steps in args.steps:
            network: Denoiser = cached_denoiser if "cache" in name else denoiser
            began = time.perf_counter()
            found = images(network, decode, name.split()[0], steps, shift=shift, **settings)
            seconds = (time.perf_counter() - began) / args.num
            row = f"| {name} | {steps} | {calls(name, steps, model)} | {seconds:.3f} |"
            if name in STOCHASTIC:
                row += " – |" * (2 if distance else 1)
            else:
                row += f" {np.abs(found.astype(int) - reference).mean():.2f} |"
                row += f" {distance(found):.3f} |" if distance else ""
            print(row, flush=True)


def calls(name: str, steps: int, model: ModelConfig) -> int:
    """Network calls of an image: the last step of a Runge-Kutta method is Euler's on a discrete schedule."""
    if "cache" in name:
        return steps if steps < 4 else 3 + (steps - 3) // 3
    per_step = CALLS.get(name.split()[0], 1)
    to_data = model.diffusion.schedule == "flow" and model.diffusion.prediction != "x0"
    return steps * per_step - (0 if to_data else per_step - 1)


def feature_distance(path: str, reference: np.ndarray) -> Callable[[np.ndarray], float]:
    """Mean distance of pictures from the reference's, over the mean distance between two of those."""
    import onnxruntime as ort

    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])

    def features(pictures: np.ndarray) -> np.ndarray:
        large = [np.asarray(Image.fromarray(p).resize((224, 224), Image.Resampling.BICUBIC)) for p in pictures]
        batch = np.stack(large).transpose(0, 3, 1, 2).astype(np.float32) / 255
        return session.run(None, {session.get_inputs()[0].name: batch})[0]

    expected = features(reference)
    between = np.linalg.norm(expected[:, None] - expected[None], axis=-1)
    unit = between.sum() / (len(expected) * (len(expected) - 1))
    return lambda pictures: float(np.linalg.norm(features(pictures) - expected, axis=-1).mean() / unit)


def bench_backends(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    settings = TrainConfig(model=args.size)
    dit = settings.dit(input_shape=(4, 32, 32), num_classes=1000)
    network = DiT(dit).eval()
    with torch.no_grad():
        for parameter in network.parameters():  # fresh blocks are the identity
            parameter += 0.02 * torch.randn_like(parameter)
    names = tuple(f"class-{i}" for i in range(1000))
    model = ModelConfig(dit=dit, diffusion=settings.diffusion(), codec=args.vae, image_size=256, class_names=names)
    decode = numpy_decoder(open_named_codec(args.vae, device=CPU))
    labels = list(range(args.num))

    def ours(denoiser: Denoiser, decode: Decode = decode) -> Callable[[], np.ndarray]:
        return lambda: images(denoiser, decode, "ddim", args.steps[-1], labels=labels, cfg=4.0, batch=args.num)

    fp32 = as_denoiser(network, model, dtype=torch.float32)
    narrow = copy.deepcopy(network)
    cast_products(narrow)
    bf16 = as_denoiser(narrow, model, dtype=torch.bfloat16)
    decode_bf16 = numpy_decoder(open_named_codec(args.vae, device=CPU, dtype=torch.bfloat16))
    fp32_compiled, bf16_compiled = (replace(d, module=copy.deepcopy(d.module)) for d in (fp32, bf16))
    compile_blocks(fp32_compiled)
    compile_blocks(bf16_compiled)
    candidates = {
        "torch fp32": ours(fp32),
        "torch fp32, compiled": ours(fp32_compiled),
        "torch bf16": ours(bf16, decode_bf16),
        "torch bf16, compiled": ours(bf16_compiled, decode_bf16),
    }
    with tempfile.TemporaryDirectory() as folder:
        candidates |= onnx_candidates(Path(folder), network, model, ours)
        candidates["diffusers fp32"] = diffusers_pipeline(network, args, labels)
        first = {}
        for name, draw in list(candidates.items()):
            try:
                first[name] = draw()
            except Exception as error:
                tell(f"{name} is left out: {str(error).splitlines()[0]}")
                del candidates[name]
        times: dict[str, list[float]] = {name: [] for name in candidates}
        for _ in range(args.rounds):
            for name, draw in candidates.items():
                began = time.perf_counter()
                draw()
                times[name].append((time.perf_counter() - began) / args.num)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    print(f"{args.size}, 4 x 32 x 32 latents, {args.steps[-1]} guided DDIM steps, {torch.get_num_threads()} threads")
    print("\n| backend | s/image | images/s | to diffusers | pixel difference to torch fp32 |\n|---|---|---|---|---|")
    for name, seconds in medians.items():
        speed = f"{medians['diffusers fp32'] / seconds:.2f}x" if "diffusers fp32" in medians else "–"
        difference = np.abs(first[name].astype(int) - first["torch fp32"]).mean()
        shown = "–" if name.startswith("diffusers") else f"{difference:.3f}"  # its frequencies and norms differ
        print(f"| {name} | {seconds:.3f} | {1 / seconds:.3f} | {speed} | {shown} |")


def onnx_candidates(
    folder: Path, network: DiT, model: ModelConfig, ours: Callable[[Denoiser, Decode], Callable[[], np.ndarray]]
) -> dict[str, Callable[[], np.ndarray]]:
    """ONNX Runtime, its decoder too, on exports of opset 20 and 23, where ditcli can export."""
    try:
        from ditcli.codecs.onnx_decoder import open_decoder
        from ditcli.config import ExportConfig
        from ditcli.denoisers.onnx_denoiser import open_denoiser as open_onnx
        from ditcli.export import export_onnx
    except ImportError as error:
        tell(f"ONNX Runtime is left out: {error}")
        return {}
    run = RunDir(folder / "run")
    checkpoint = save_checkpoint(run, model, network, {}, keep=1)
    found = {}
    for opset in (20, 23):
        out = folder / str(opset)
        export_onnx(ExportConfig(model=str(checkpoint), out=str(out), opset=opset))
        denoiser, decode = open_onnx(out / DENOISER, device="cpu")[0], open_decoder(out / DECODER, device="cpu")
        found[f"ONNX fp32, opset {opset}"] = ours(denoiser, decode)
    return found


def diffusers_pipeline(network: DiT, args: argparse.Namespace, labels: list[int]) -> Callable[[], np.ndarray]:
    """diffusers' pipeline with our weights under its names."""
    from diffusers import AutoencoderTiny, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    config, weights = network.config, network.state_dict()
    transformer = DiTTransformer2DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.width // config.num_heads,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_layers=config.depth,
        sample_size=config.input_size[0],
        patch_size=config.patch_size,
        num_embeds_ada_norm=config.num_classes,
    )
    transformer.load_state_dict(to_diffusers(weights, config.depth), strict=True)
    vae = AutoencoderTiny.from_pretrained(str(hub.find_codec(args.vae)))
    pipeline = DiTPipeline(transformer=transformer.eval(), vae=vae.float(), scheduler=DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)

    def draw() -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        drawn = pipeline(
            labels, guidance_scale=4.0, num_inference_steps=args.steps[-1], generator=generator, output_type="np"
        )
        return (drawn.images * 255).round().astype(np.uint8)

    return draw


def to_diffusers(weights: dict[str, Any], depth: int) -> dict[str, Any]:
    """Weights under the original DiT's names -> under those of DiTTransformer2DModel."""
    found = {}
    for kind in ("weight", "bias"):
        found[f"pos_embed.proj.{kind}"] = weights[f"x_embedder.proj.{kind}"]
        found[f"proj_out_1.{kind}"] = weights[f"final_layer.adaLN_modulation.1.{kind}"]
        found[f"proj_out_2.{kind}"] = weights[f"final_layer.linear.{kind}"]
        for i in range(depth):
            ours, theirs = f"blocks.{i}", f"transformer_blocks.{i}"
            for part, tensor in zip("qkv", weights[f"{ours}.attn.qkv.{kind}"].chunk(3), strict=True):
                found[f"{theirs}.attn1.to_{part}.{kind}"] = tensor
            for source, target in [
                (f"{ours}.attn.proj", f"{theirs}.attn1.to_out.0"),
                (f"{ours}.mlp.fc1", f"{theirs}.ff.net.0.proj"),
                (f"{ours}.mlp.fc2", f"{theirs}.ff.net.2"),
                (f"{ours}.adaLN_modulation.1", f"{theirs}.norm1.linear"),
                ("t_embedder.mlp.0", f"{theirs}.norm1.emb.timestep_embedder.linear_1"),
                ("t_embedder.mlp.2", f"{theirs}.norm1.emb.timestep_embedder.linear_2"),
            ]:
                found[f"{target}.{kind}"] = weights[f"{source}.{kind}"]
    table = weights["y_embedder.embedding_table.weight"]
    for i in range(depth):
        found[f"transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table.weight"] = table
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    samplers = commands.add_parser("samplers")
    samplers.add_argument("--model", help="run folder or checkpoint (default: the newest run)")
    samplers.add_argument("--features", help="ONNX file of features")
    samplers.add_argument("--num", type=int, default=16)
    samplers.add_argument("--cfg", type=float, default=2.0)
    samplers.add_argument("--batch-size", type=int, default=16)
    backends = commands.add_parser("backends")
    backends.add_argument("--vae", default="madebyollin/taesd", help="an AutoencoderTiny, local or on the Hub")
    backends.add_argument("--size", default="DiT-S/2")
    backends.add_argument("--num", type=int, default=2)
    backends.add_argument("--rounds", type=int, default=3)
    for command in (samplers, backends):
        command.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20, 50])
    args = parser.parse_args()
    bench_samplers(args) if args.command == "samplers" else bench_backends(args)


if __name__ == "__main__":
    main()
