"""A faster or smaller step is the same step."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import TINY, assert_same_run, run_tiny, start

from ditcli.codecs.pixels import PixelCodec
from ditcli.config import DiTConfig, ModelConfig, TrainConfig
from ditcli.data.latents import Latents
from ditcli.devices import bf16_peak, bf16_peak_of
from ditcli.diffusion.process import Diffusion
from ditcli.errors import SettingError
from ditcli.memory import SHARE_OF_FREE, fitting_micro_batch, free_memory, kept_per_image
from ditcli.models.dit import DiT
from ditcli.models.flops import training_flops
from ditcli.processes import ALONE
from ditcli.runs import RunDir, state_file
from ditcli.training.batches import Batches
from ditcli.training.loop import apply_gradients
from ditcli.training.metrics import read_metrics
from ditcli.training.setup import Setup
from ditcli.training.state import make_optimizer, new_state
from ditcli.training.step import Steps, next_micro_batch


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory) -> None:
    os.environ["DITCLI_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["DITCLI_CACHE"]


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_neither_weights_nor_moments(clip, poison):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step(value: float) -> torch.Tensor:
        model(torch.ones(1, 3)).sum().backward()
        model.weight.grad[0, 0] *= value
        return apply_gradients(optimizer, 1e-2, clip)

    def everything() -> list[torch.Tensor]:
        moments = [value for p in model.parameters() for value in optimizer.state[p].values()]
        return [tensor.clone() for tensor in [*model.state_dict().values(), *moments]]

    assert step(1.0).isfinite()
    before = everything()
    assert not step(poison).isfinite()
    assert all(torch.equal(one, other) for one, other in zip(before, everything(), strict=True))
    step(1.0)
    assert not torch.equal(before[0], model.weight)
    assert model.weight.isfinite().all()


OUT_OF_MEMORY = """
import resource, sys, psutil
from ditcli.config import TrainConfig
from ditcli.training.train import train
settings, out, room = eval(sys.argv[1]), sys.argv[2], int(sys.argv[3])
train(TrainConfig.from_dict(settings | {"out": out + "-first", "steps": 1, "batch_size": 16}))  # now all is loaded
most = psutil.Process().memory_info().vms + room
resource.setrlimit(resource.RLIMIT_AS, (most, most))
train(TrainConfig.from_dict(settings | {"out": out}))
"""


def test_out_of_memory_halves_the_micro_batch_aloud_and_keeps_the_step(tmp_path):
    settings = TINY | {"steps": 2, "batch_size": 6144, "log_every": 1}
    whole = run_tiny(tmp_path / "whole", **settings)
    words = [repr(settings), str(tmp_path / "parts"), str(800_000_000)]
    done = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Out of memory with 6144 images at a time: going on with 3072." in done.stderr
    assert_same_losses(whole, RunDir(tmp_path / "parts"))


# The second of two processes has memory for so many images; each tells how many it took at a time.
LITTLE_MEMORY = """
import os, sys, torch
from pathlib import Path
from ditcli.config import TrainConfig
from ditcli.training import step
from ditcli.training.train import train
settings, most, folder = eval(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
loss = step.diffusion_loss
def loss_of_few(network, diffusion, batch, kind):
    with (folder / os.environ["RANK"]).open("a") as taken:
        print(len(batch.t), file=taken)
    if os.environ["RANK"] == "1" and len(batch.t) > most:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return loss(network, diffusion, batch, kind)
step.diffusion_loss = loss_of_few
train(TrainConfig.from_dict(settings))
"""


@pytest.mark.parametrize(
    ("batch_size", "most", "first", "second"),
    [
        (64, 8, [32, *[8] * 12], [32, 16, 8, *[8] * 12]),
        (15, 99, [7] * 4, [8] * 4),  # no process takes another's smaller part for a limit
    ],
)
def test_what_fits_into_the_smallest_memory_of_several_processes_holds_for_all(
    tmp_path, batch_size, most, first, second
):
    settings = TINY | {"steps": 3, "batch_size": batch_size, "log_every": 1}
    whole, parts = run_tiny(tmp_path / "whole", **settings), RunDir(tmp_path / "parts")
    script = tmp_path / "little_memory.py"
    script.write_text(LITTLE_MEMORY)
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, repr(settings | {"out": str(parts.path)}), str(most), str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = "Out of memory with 32 images at a time in another process: going on with 8."
    assert (told in done.stderr) == (most == 8)
    assert [[int(n) for n in (tmp_path / rank).read_text().split()] for rank in "01"] == [first, second]
    assert_same_losses(whole, parts)


def assert_same_losses(first: RunDir, second: RunDir) -> None:
    rows = [read_metrics(run.metrics_file) for run in (first, second)]
    for one, other in zip(*rows, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_a_step_waits_for_no_gpu(learn_sigma):
    device = torch.device("cuda")
    changes = {"device": "cuda", "learn_sigma": learn_sigma, "clip_grad": 1.0, "batch_size": 4, "micro_batch": 2}
    config = TrainConfig.from_dict(TINY | changes)
    dit = config.dit(input_shape=(3, 4, 4), num_classes=10)
    model = ModelConfig(
        dit=dit, diffusion=config.diffusion(), codec="pixels", image_size=4, class_names=tuple("0123456789")
    )
    setup = Setup(config, model, RunDir(Path("unused")), None, PixelCodec(), device, torch.bfloat16, ALONE)
    moments = np.random.default_rng(0).integers(0, 256, (10, 1, 3, 4, 4), dtype=np.uint8)
    diffusion, latents = Diffusion(model.diffusion), Latents(moments, np.arange(10), ())
    batches = Batches(latents, setup.codec, diffusion, config, num_classes=10, device=device)
    steps = Steps(setup, new_state(config, model, device), batches, diffusion)
    for _ in range(3):
        steps.take()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            steps.take()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert steps.take()[0].isfinite()


def test_micro_batches_divide_the_batch():
    assert [next_micro_batch(12, size) for size in (12, 6, 4, 3, 2)] == [6, 3, 2, 1, 1]
    assert TrainConfig(micro_batch="4", batch_size=8).micro_batch == 4
    assert TrainConfig(micro_batch="auto").micro_batch == "auto"
    for wrong in ("3", "0", "all"):
        with pytest.raises(SettingError, match="micro-batch"):
            TrainConfig(micro_batch=wrong, batch_size=8)


@pytest.mark.parametrize("conditioning", ["adaln-zero", "in-context"])
def test_checkpointed_activations_change_nothing(tmp_path, conditioning):
    plain = run_tiny(tmp_path / "plain", steps=4, conditioning=conditioning)
    again = run_tiny(tmp_path / "again", steps=4, conditioning=conditioning, checkpoint_activations=True)
    assert_same_run(plain, again)


def test_checkpointed_activations_keep_the_inputs_of_blocks_alone():
    kept = {}
    for checkpointed in (False, True):
        network = DiT(WIDE)
        network.checkpoint_activations = checkpointed
        kept[checkpointed] = kept_tensors(network)
    assert kept[True] < 0.25 * kept[False]


WIDE = DiTConfig(input_size=(16, 16), patch_size=2, width=128, depth=4, num_heads=2, num_classes=3)


def kept_tensors(network: DiT, dtype: torch.dtype = torch.float32, images: int = 4) -> int:
    """Bytes that a forward pass on the CPU leaves for the backward pass, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x, t = torch.randn(images, 4, 16, 16), torch.rand(images)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = network(x, t, torch.zeros(images, dtype=torch.long))
    assert output.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("parts", [{}, {"mlp": "swiglu", "rope": True, "qk_norm": True}], ids=["paper", "modern"])
@pytest.mark.parametrize(("dtype", "cast_weights"), [(torch.float32, 0), (torch.bfloat16, 2)])
def test_what_an_image_keeps_is_foreseen(dtype, cast_weights, parts):
    config = dataclasses.replace(WIDE, **parts)
    network = DiT(config)
    matrices = sum(p.numel() for name, p in network.named_parameters() if name.startswith("blocks"))
    measured = (kept_tensors(network, dtype) - cast_weights * matrices) / 4
    # On a CPU attention in bf16 keeps the scores too.
    assert measured < 1.1 * kept_per_image(config, dtype.itemsize) < 1.5 * measured


def test_flops_are_those_of_the_paper():
    """Table 4 of the paper, in billions of multiplications with addition, at 32 x 32 latents."""
    for name, expected in {"S/2": 6.06, "S/8": 0.36, "B/2": 23.01, "B/4": 5.56, "L/2": 80.71, "XL/2": 118.64}.items():
        dit = TrainConfig(model=f"DiT-{name}").dit(input_shape=(4, 32, 32), num_classes=1000)
        with torch.device("meta"):
            flops = training_flops(DiT(dit), dit)
        assert flops / 6e9 == pytest.approx(expected, rel=0.02)


def test_the_peak_is_known_by_the_words_of_a_name():
    assert bf16_peak_of("NVIDIA H200") == bf16_peak_of("NVIDIA H100 80GB HBM3") == 989e12
    assert bf16_peak_of("NVIDIA H100 PCIe") == 756e12
    assert bf16_peak_of("NVIDIA A100-SXM4-80GB") == 312e12
    for unknown in ("NVIDIA RTX A1000 Laptop GPU", "NVIDIA H200 MIG 1g.18gb", "Tesla V100-SXM2-16GB"):
        assert bf16_peak_of(unknown) is None
    assert bf16_peak(torch.device("cpu")) is None


def test_muon_learns_and_goes_on_where_it_stopped(tmp_path):
    settings = {"optimizer": "muon", "lr": 3e-3, "steps": 40, "log_every": 10, "checkpoint_every": 40}
    whole = run_tiny(tmp_path / "whole", **settings)
    losses = [row.loss for row in read_metrics(whole.metrics_file)]
    assert losses[-1] < 0.8 * losses[0]
    run_tiny(tmp_path / "halves", **settings | {"steps": 20})
    assert_same_run(whole, run_tiny(tmp_path / "halves", **settings))
    names = {key.rpartition(".")[0] for key in load_file(state_file(whole.newest_checkpoint())) if "momentum" in key}
    parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert names == {f"optimizer.blocks.{i}.{part}.weight" for i in range(2) for part in parts}


def test_muon_skips_a_gradient_that_is_not_finite_and_needs_matrices():
    config = TrainConfig.from_dict(TINY | {"optimizer": "muon"})
    network = DiT(WIDE)
    optimizer = make_optimizer(network, config)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    apply_gradients(optimizer, 1e-3, 0.0)
    assert all(torch.equal(one, other) for one, other in zip(before, network.parameters(), strict=True))
    network.blocks.requires_grad_(False)
    with pytest.raises(SettingError, match="muon"):
        make_optimizer(network, config)


def test_where_compiling_fails_training_goes_on_without(tmp_path):
    settings = {"steps": 2, "log_every": 1, "checkpoint_every": 2}
    process = start(tmp_path / "compiled", compile=True, environment={"CXX": "no-compiler"}, **settings)
    _, told = process.communicate(timeout=200)
    assert process.returncode == 0, told
    assert "torch.compile does not work here" in told
    assert_same_run(run_tiny(tmp_path / "eager", **settings), RunDir(tmp_path / "compiled"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_compiled_step_is_the_same_step(tmp_path):
    settings = {"steps": 6, "log_every": 1, "checkpoint_every": 3}
    eager = run_tiny(tmp_path / "eager", **settings)
    for name, changes in {"compiled": {}, "again": {"checkpoint_activations": True, "micro_batch": 8}}.items():
        process = start(tmp_path / name, compile=True, **settings | changes)
        _, told = process.communicate(timeout=280)
        assert process.returncode == 0, told
        assert "torch.compile" not in told
        rows = [read_metrics(run.metrics_file) for run in (eager, RunDir(tmp_path / name))]
        for one, other in zip(*rows, strict=True):
            assert one.loss == pytest.approx(other.loss, rel=1e-4)
            assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-3)


def test_the_micro_batch_is_the_largest_divisor_that_fits():
    dit = TrainConfig(model="DiT-XL/2").dit(input_shape=(4, 32, 32), num_classes=1000)
    size = {"device": "cpu", "bytes_per_number": 4, "checkpointed": False}
    for images, expected in {100: 12, 9: 6, 0: 1}.items():  # what others take meanwhile is less than three images
        room = int(images * kept_per_image(dit, 4) / SHARE_OF_FREE)
        assert fitting_micro_batch(dit, 12, reserved=free_memory("cpu") - room, **size) == expected


def test_micro_batch_auto_trains(tmp_path: Path):
    assert run_tiny(tmp_path, steps=2, micro_batch="auto").saved_steps() == [2]


@pytest.mark.parametrize(("changes", "warned"), [({}, True), ({"micro_batch": 1}, False), ({"batch_size": 16}, False)])
def test_a_batch_beyond_the_memory_is_told_before_the_system_kills_the_process(capsys, changes, warned):
    config = TrainConfig.from_dict(TINY | {"batch_size": 10**6} | changes)
    dit = config.dit(input_shape=(3, 28, 28), num_classes=2)
    model = ModelConfig(dit=dit, diffusion=config.diffusion(), codec="pixels", image_size=28, class_names=("a", "b"))
    cpu = torch.device("cpu")
    setup = Setup(config, model, RunDir(Path("unused")), None, PixelCodec(), cpu, torch.float32, ALONE)
    Steps(setup, new_state(config, model, cpu), None, Diffusion(model.diffusion))
    assert ("1000000 images at a time" in capsys.readouterr().err) == warned
