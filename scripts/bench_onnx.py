"""Time one network call of a DiT-S/2 on latents of 4 x 32 x 32 in torch and in ONNX Runtime, on the CPU.

    python scripts/bench_onnx.py                  # torch eager fp32 and bf16; ONNX fp32 of opset 20 and 23, and fp16
    python scripts/bench_onnx.py --options        # ONNX fp32 under other session options
    python scripts/bench_onnx.py --start          # `ditcli sample` of a small pixel model, from start to first picture

Weights are random and none of them zero. Candidates take turns, so that what else the machine does hits all alike;
numbers are medians.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch

from ditcli.config import DEMO, ExportConfig, ModelConfig, TrainConfig
from ditcli.denoisers.onnx_denoiser import OnnxDenoiser, open_denoiser
from ditcli.denoisers.torch_denoiser import TorchDenoiser, as_denoiser
from ditcli.export import export_onnx
from ditcli.models.dit import DiT
from ditcli.runs import RunDir
from ditcli.sessions import num_threads
from ditcli.training.checkpoints import save_checkpoint

Call = Callable[[], object]


def random_run(folder: Path, settings: TrainConfig, shape: tuple[int, int, int], num_classes: int) -> RunDir:
    """A run folder whose only checkpoint has random weights."""
    torch.manual_seed(0)
    dit = settings.dit(input_shape=shape, num_classes=num_classes)
    network = DiT(dit)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    names = tuple(f"class-{i}" for i in range(num_classes))
    model = ModelConfig(dit=dit, diffusion=settings.diffusion(), codec="pixels", image_size=shape[1], class_names=names)
    run = RunDir(folder)
    save_checkpoint(run, model, network, {}, keep=1)
    run.config_file.write_text("{}")
    return run


def calls(denoisers: dict[str, TorchDenoiser | OnnxDenoiser], batch: int) -> dict[str, Call]:
    """One network call of each at the same input."""
    rng = np.random.default_rng(0)
    made: dict[str, Call] = {}
    for name, denoiser in denoisers.items():
        x_t = denoiser.from_numpy(rng.standard_normal((batch, *denoiser.input_shape), dtype=np.float32))
        labels = denoiser.from_numpy(np.zeros(batch, dtype=np.int64))
        made[name] = lambda d=denoiser, x=x_t, y=labels: d(x, 0.5, y)
    return made


def median_times(candidates: dict[str, Call], rounds: int) -> dict[str, float]:
    """Seconds of each, in turns."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for call in candidates.values():
        call()
    for _ in range(rounds):
        for name, call in candidates.items():
            began = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def print_table(denoisers: dict[str, TorchDenoiser | OnnxDenoiser], batches: list[int], rounds: int) -> None:
    print(f"torch {torch.__version__}, onnxruntime {ort.__version__}, {num_threads()} threads, medians of {rounds}")
    print("| | " + " | ".join(f"batch {batch}, ms" for batch in batches) + " |\n|---|" + "---|" * len(batches))
    rows = [median_times(calls(denoisers, batch), rounds) for batch in batches]
    for name in denoisers:
        print(f"| {name} | " + " | ".join(f"{1000 * row[name]:.1f}" for row in rows) + " |")


def backends(folder: Path, run: RunDir) -> dict[str, TorchDenoiser | OnnxDenoiser]:
    """The runtimes that are compared."""
    from ditcli.models.weights import load_dit

    module, model = load_dit(run.newest_checkpoint())
    denoisers: dict[str, TorchDenoiser | OnnxDenoiser] = {
        f"torch eager {name}": as_denoiser(module, model, dtype=dtype)
        for name, dtype in [("fp32", torch.float32), ("bf16", torch.bfloat16)]
    }
    for dtype, opset in [("fp32", 20), ("fp32", 23), ("fp16", 23)]:
        out = folder / f"{dtype}-{opset}"
        config = ExportConfig(model=str(run.path), out=str(out), dtype=dtype, opset=opset)
        path = export_onnx(config).files[0]
        denoisers[f"ONNX {dtype}, opset {opset}"] = open_denoiser(path, device="cpu")[0]
    return denoisers


def session_options(folder: Path, run: RunDir) -> dict[str, OnnxDenoiser]:
    """ONNX Runtime under other options than those it is run with, one at a time."""
    path = export_onnx(ExportConfig(model=str(run.path), out=str(folder / "options"))).files[0]
    denoiser = open_denoiser(path, device="cpu")[0]

    def changed(change: Callable[[ort.SessionOptions], None]) -> OnnxDenoiser:
        options = ort.SessionOptions()
        options.intra_op_num_threads = num_threads()
        change(options)
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return replace(denoiser, session=session)

    level = ort.GraphOptimizationLevel
    return {
        "as ditcli sets them": denoiser,
        "1 thread": changed(lambda o: setattr(o, "intra_op_num_threads", 1)),
        "threads by default": changed(lambda o: setattr(o, "intra_op_num_threads", 0)),
        "no spinning": changed(lambda o: o.add_session_config_entry("session.intra_op.allow_spinning", "0")),
        "no arena": changed(lambda o: setattr(o, "enable_cpu_mem_arena", False)),
        "no memory pattern": changed(lambda o: setattr(o, "enable_mem_pattern", False)),
        "optimisation: none": changed(lambda o: setattr(o, "graph_optimization_level", level.ORT_DISABLE_ALL)),
        "optimisation: basic": changed(lambda o: setattr(o, "graph_optimization_level", level.ORT_ENABLE_BASIC)),
        "optimisation: extended": changed(lambda o: setattr(o, "graph_optimization_level", level.ORT_ENABLE_EXTENDED)),
        "parallel branches": changed(lambda o: setattr(o, "execution_mode", ort.ExecutionMode.ORT_PARALLEL)),
        "denormals as zero": changed(lambda o: o.add_session_config_entry("session.set_denormal_as_zero", "1")),
    }


def start_times(folder: Path, rounds: int) -> dict[str, float]:
    """Seconds of whole processes that draw one picture of a model of the demo's size: one step, and the default 50."""
    run = random_run(folder / "demo", TrainConfig.from_dict(DEMO), (3, 28, 28), 10)
    export_onnx(ExportConfig(model=str(run.path)))

    def command(model: Path, steps: int) -> Call:
        words = ["sample", "--model", model, "--labels", "3", "--steps", steps, "--device", "cpu", "--out", folder]
        line = [sys.executable, "-m", "ditcli", *map(str, words)]
        return lambda: subprocess.run(line, check=True, capture_output=True)

    models = {"torch": run.path, "ONNX": run.path / "onnx"}
    return median_times(
        {f"{name}, {steps} steps": command(path, steps) for name, path in models.items() for steps in (1, 50)}, rounds
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[2, 16], help="2 is one image with guidance")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--options", action="store_true")
    parser.add_argument("--start", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(num_threads())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if arguments.start:
            for name, seconds in start_times(folder, arguments.rounds).items():
                print(f"| {name} | {seconds:.2f} s |")
            return
        run = random_run(folder / "run", TrainConfig(data="x", model="DiT-S/2"), (4, 32, 32), 2)
        made = session_options(folder, run) if arguments.options else backends(folder, run)
        print_table(dict(made), arguments.batch, arguments.rounds)


if __name__ == "__main__":
    main()
