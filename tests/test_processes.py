"""Several processes make what one makes: the same losses, files and numbers, as the real command starts them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ditcli.cli.options import share
from ditcli.codecs.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from ditcli.codecs.folder import save_codec
from ditcli.codecs.pixels import PixelCodec
from ditcli.config import EncodeConfig, SampleConfig, TrainConfig
from ditcli.data.latents import Latents
from ditcli.devices import open_device
from ditcli.diffusion.process import Diffusion
from ditcli.encoding import encode
from ditcli.errors import SettingError
from ditcli.processes import Processes, join
from ditcli.runs import RunDir, state_file
from ditcli.sampling import sample
from ditcli.training.batches import Batches
from ditcli.training.metrics import DiffusionRow, read_metrics
from ditcli.training.power_ema import snapshot_file
from ditcli.training.setup import check_batch
from ditcli.training.train import train

LAUNCHER = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TINY = {
    "pixels": True,
    "image_size": 16,
    "model": "DiT-S/4",
    "width": 32,
    "depth": 2,
    "num_heads": 2,
    "batch_size": 15,
    "micro_batch": 5,  # of which one process has 8 images to compute in two parts, and the other 7
    "steps": 9,
    "lr": 1e-3,
    "log_every": 1,
    "checkpoint_every": 3,
    "sample_every": 6,
    "sample_num": 3,
    "sample_steps": 2,
    "precision": "fp32",
    "device": "cpu",
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of coloured noise, and a file that is no picture."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(23):
        path = folder / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    (folder / "b" / "05x.png").write_bytes(b"not a picture")
    return folder


@pytest.fixture(scope="module")
def alone(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """The run of a single process."""
    return train_alone(tmp_path_factory.mktemp("alone"), pictures)


def train_alone(folder: Path, pictures: Path, **changes) -> RunDir:
    os.environ["DITCLI_CACHE"] = str(folder / "cache")
    try:
        return train(TrainConfig.from_dict(TINY | {"data": str(pictures), "out": str(folder / "run")} | changes))
    finally:
        del os.environ["DITCLI_CACHE"]


def words(values: dict[str, object]) -> list[str]:
    options = {f"--{key.replace('_', '-')}": value for key, value in values.items()}
    return [key if value is True else f"{key}={value}" for key, value in options.items()]


def start(folder: Path, *module: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *module],
        env=os.environ | {"OMP_NUM_THREADS": "1", "DITCLI_CACHE": str(folder / "cache")},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def train_words(folder: Path, pictures: Path, **changes) -> list[str]:
    return [
        "ditcli",
        "train",
        "--preset",
        "paper",
        *words(TINY | {"data": str(pictures), "out": str(folder / "run")} | changes),
    ]


def train_together(folder: Path, pictures: Path, **changes) -> tuple[RunDir, str]:
    process = start(folder, *train_words(folder, pictures, devices=2, **changes))
    printed, told = process.communicate()
    assert process.returncode == 0, told
    assert printed == f"{folder / 'run'}\n"
    return RunDir(folder / "run"), told


def assert_same_curve(run: RunDir, other: RunDir) -> None:
    """Losses, at every noise level too, and gradient norms."""
    names = ["loss", "grad_norm", *(f"loss_noise_{k}" for k in range(1, 9))]
    rows, others = (read_metrics(r.metrics_file, DiffusionRow) for r in (run, other))
    assert [row.step for row in rows] == [row.step for row in others]
    for row, expected in zip(rows, others, strict=True):
        for name in names:
            value, other_value = getattr(row, name), getattr(expected, name)
            assert value == (other_value and pytest.approx(other_value, rel=1e-5)), (row.step, name)


def assert_same_files(run: RunDir, other: RunDir, step: int) -> None:
    """Checkpoints of the same names and shapes, and the same grid of pictures but for rounding."""
    paths = run.checkpoint_file(step), other.checkpoint_file(step)
    for found, expected in (paths, tuple(state_file(path) for path in paths)):
        shapes = [{key: tuple(value.shape) for key, value in load_file(path).items()} for path in (found, expected)]
        assert shapes[0] == shapes[1]
    assert_same_weights(*paths)
    grids = [np.asarray(Image.open(r.samples / f"step-{step:08}.png")).astype(int) for r in (run, other)]
    assert np.abs(grids[0] - grids[1]).max() <= 1


def assert_same_weights(found: Path, expected: Path) -> None:
    weights, others = load_file(found), load_file(expected)
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, others[name], rtol=1e-3, atol=1e-5)


def test_two_processes_train_as_one_and_one_goes_on(alone, pictures, tmp_path):
    run, told = train_together(tmp_path, pictures, steps=6)
    assert told.count("Training 0.1 M parameters on 2 x cpu in fp32") == 1
    assert told.count("\n  b/05x.png: ") == 1  # the pictures are encoded by both
    assert_same_files(run, alone, 6)
    assert_same_curve(train_alone(tmp_path, pictures), alone)


def test_sharded_weights_train_as_whole_ones_from_a_checkpoint_and_to_one(alone, pictures, tmp_path):
    even = {"batch_size": 16, "micro_batch": 4, "clip_grad": 0.1, "ema_snapshot_every": 6}
    whole = train_alone(tmp_path / "whole", pictures, **even)
    train_alone(tmp_path, pictures, steps=3, **even)
    run, told = train_together(tmp_path, pictures, steps=6, shard=True, checkpoint_activations=True, **even)
    assert told.count("from step 3") == 1
    assert_same_files(run, whole, 6)
    assert_same_weights(snapshot_file(run, 6), snapshot_file(whole, 6))
    assert_same_curve(train_alone(tmp_path, pictures, **even), whole)


@pytest.mark.slow
@pytest.mark.parametrize("conditioning", ["adaln-zero", "cross-attention"])  # the latter has weights in its norms
def test_sharded_weights_train_in_bf16_as_whole_ones(pictures, tmp_path, conditioning):
    settings = {"batch_size": 16, "steps": 3, "sample_every": 0, "precision": "bf16", "conditioning": conditioning}
    settings |= {"micro_batch": 4, "mlp": "swiglu", "rope": True}
    whole = train_alone(tmp_path / "whole", pictures, **settings)
    run, _ = train_together(tmp_path, pictures, shard=True, **settings)
    losses = [[row.loss for row in read_metrics(each.metrics_file)] for each in (run, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def until(condition, process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_process_is_started_again_and_goes_on_from_the_last_checkpoint(pictures, tmp_path):
    run = RunDir(tmp_path / "run")
    settings = train_words(tmp_path, pictures, steps=100_000, sample_every=0)
    process = start(tmp_path, *LAUNCHER, "--max-restarts", "1", "-m", "--", *settings)
    until(lambda: run.saved_steps() and len(read_metrics(run.metrics_file)) > 4, process)
    ranks = {child.environ().get("RANK"): child for child in psutil.Process(process.pid).children()}
    ranks["1"].kill()
    ranks["1"].wait()
    ranks["0"].wait()
    reached = run.saved_steps()[-1]
    until(lambda: run.saved_steps()[-1] > reached, process)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate()
    assert f"Going on with {run.path} from step {reached:,}." in told
    assert told.count("and saved; to go on, run the same command again") == 1
    steps = [row.step for row in read_metrics(run.metrics_file)]
    assert steps == list(range(1, run.saved_steps()[-1] + 1))  # all processes stopped in the same step


@pytest.mark.slow
def test_a_signal_to_the_command_and_an_error_are_told_once_with_their_exit_codes(pictures, tmp_path):
    run = RunDir(tmp_path / "run")
    process = start(tmp_path, *train_words(tmp_path, pictures, steps=100_000, sample_every=0, devices=2))
    until(lambda: len(read_metrics(run.metrics_file)) > 2, process)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate()
    assert process.returncode == 130
    assert told.count("Finishing the step and saving") == told.count("stopped at step") == 1
    assert "Traceback" not in told
    process = start(tmp_path, *train_words(tmp_path, tmp_path / "nowhere", devices=2))
    _, told = process.communicate()
    assert process.returncode == 1
    assert told.startswith("Error: there is no folder")
    assert len(told.splitlines()) == 1


@pytest.mark.slow
def test_encode_and_sample_write_what_one_process_writes(alone, pictures, tmp_path, monkeypatch):
    """Both commands in the same processes, which take long to start."""
    torch.manual_seed(0)
    save_codec(AutoencoderKL(AutoencoderKLConfig(block_out_channels=(8, 16), norm_num_groups=4)), tmp_path / "vae")
    encoding = {"data": str(pictures), "vae": str(tmp_path / "vae"), "image_size": 16, "batch_size": 3, "shard_size": 7}
    encoding |= {"reconstruct": True, "lpips": "none", "precision": "fp32", "device": "cpu"}
    drawing = {"model": str(alone.path), "num": 19, "steps": 2, "device": "cpu"}
    script = tmp_path / "commands.py"
    script.write_text(
        "import json, sys\nfrom ditcli.cli.main import cli\n"
        "for words in json.loads(sys.argv[1]):\n    cli.main(words, standalone_mode=False)\n"
    )
    commands = [
        ["encode", *words(encoding | {"out": "together"})],
        ["sample", *words(drawing | {"out": "folder", "grid": True})],
        ["sample", *words(drawing | {"out": "samples.npz"})],
    ]
    process = start(tmp_path, *LAUNCHER, str(script), json.dumps(commands))
    _, told = process.communicate()
    assert process.returncode == 0, told
    monkeypatch.chdir(tmp_path)
    (tmp_path / "expected").mkdir()
    encode(EncodeConfig.from_dict(encoding | {"out": "expected/together"}))
    sample(SampleConfig.from_dict(drawing | {"out": "expected/folder", "grid": True}))
    sample(SampleConfig.from_dict(drawing | {"out": "expected/samples.npz"}))
    expected = [path for path in (tmp_path / "expected").rglob("*") if path.is_file()]
    assert len(expected) > 60
    found = [tmp_path / path.relative_to(tmp_path / "expected") for path in expected]
    assert [str(f) for e, f in zip(expected, found, strict=True) if e.suffix != ".npz" and not same(e, f)] == []
    archives = [np.load(folder / "samples.npz") for folder in (tmp_path, tmp_path / "expected")]
    for name in ("arr_0", "arr_1"):
        np.testing.assert_array_equal(archives[0][name], archives[1][name])


def same(expected: Path, found: Path) -> bool:
    return found.read_bytes() == expected.read_bytes()


# The pieces


def test_parts_follow_each_other_and_differ_by_one_at_most():
    for num in (1, 2, 3, 7):
        parts = [Processes(rank, num).part(20) for rank in range(num)]
        assert [i for part in parts for i in part] == list(range(20))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_parts_of_a_batch_make_the_batch():
    values = np.random.default_rng(0).integers(0, 256, (10, 1, 3, 4, 4), dtype=np.uint8)
    latents = Latents(values, np.arange(10), ())
    config = TrainConfig.from_dict(TINY | {"data": "a", "micro_batch": None})

    def batches(processes: Processes) -> Batches:
        diffusion, cpu = Diffusion(config.diffusion()), torch.device("cpu")
        return Batches(latents, PixelCodec(), diffusion, config, num_classes=10, device=cpu, processes=processes)

    whole, parts = batches(Processes())[4], [batches(Processes(rank, 4))[4] for rank in range(4)]
    for key in ("x0", "eps", "labels"):
        assert torch.equal(torch.cat([getattr(part, key) for part in parts]), getattr(whole, key))
    np.testing.assert_array_equal(np.concatenate([part.t for part in parts]), whole.t)


def test_what_the_processes_cannot_share_is_refused(monkeypatch):
    config = TrainConfig.from_dict(TINY | {"data": "a"})
    with pytest.raises(SettingError, match="batch-size is 15, but must be at least 16"):
        check_batch(config, Processes(0, 16))
    with pytest.raises(SettingError, match="with --shard must be a multiple of the 2 processes"):
        check_batch(TrainConfig.from_dict(TINY | {"data": "a", "shard": True}), Processes(0, 2))
    check_batch(config, Processes(0, 2))
    for name, value in {"LOCAL_RANK": "1", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingError, match="device is 'cuda:1', but 2 processes need one each"):
        join("cuda:1")
    with pytest.raises(SettingError, match="devices is 4, but torchrun started 2 processes here"):
        share(4, "cpu")
    share(2, "cpu")  # the same, in each of them
    assert open_device("cpu").index is None


def test_one_of_several_ends_without_the_interpreters_end():
    """In which threads of torch's may abort it."""
    code = "import ditcli.processes as p; print('said', end=''); p.leave(3); print(', and on', end='')"
    several = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    for environment, expected in ((several, (3, "said")), ({}, (0, "said, and on"))):
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == expected
