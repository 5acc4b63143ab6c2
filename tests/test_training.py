"""Training: what is learnt does not depend on how a run is cut, killed, batched or observed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import TINY, run_tiny

from ditcli.codecs.pixels import PixelCodec
from ditcli.config import DiffusionConfig, TrainConfig
from ditcli.data.latents import Latents
from ditcli.devices import choose_dtype, open_device
from ditcli.diffusion.process import Diffusion
from ditcli.errors import CheckpointError, DitcliError, ResumeError
from ditcli.models.weights import load_dit
from ditcli.runs import RunDir, state_file
from ditcli.training.batches import Batches
from ditcli.training.ema import average_of, ema_decay, update_average
from ditcli.training.loop import learning_rate
from ditcli.training.metrics import read_metrics, smooth
from ditcli.training.objective import diffusion_loss
from ditcli.training.record import git_state


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory) -> None:
    os.environ["DITCLI_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["DITCLI_CACHE"]


@pytest.mark.parametrize("schedule", ["linear", "flow"])
def test_n_steps_equal_half_stop_resume_half(tmp_path, schedule):
    whole = run_tiny(tmp_path / "whole", schedule=schedule)
    run_tiny(tmp_path / "halves", schedule=schedule, steps=5)  # neither a row of metrics nor a checkpoint falls on 5
    halves = run_tiny(tmp_path / "halves", schedule=schedule)
    assert [row.step for row in read_metrics(whole.metrics_file)] == [3, 6, 9, 12]
    rows = read_metrics(halves.metrics_file)
    assert [row.step for row in rows] == [3, 5, 6, 9, 12]  # a run's end is a row of its own
    for one, other in zip(_weights(whole), _weights(halves), strict=True):
        assert torch.equal(one, other)


def _weights(run: RunDir) -> list[torch.Tensor]:
    path = run.newest_checkpoint()
    return list(load_file(path).values()) + [v for k, v in load_file(state_file(path)).items() if k != "seconds"]


def test_a_run_of_other_settings_is_refused_with_the_difference(tmp_path):
    run_tiny(tmp_path, steps=1)
    with pytest.raises(ResumeError) as error:
        run_tiny(tmp_path, steps=1, lr=3e-3, width=64)
    assert "lr: 0.001 there, 0.003 now" in str(error.value)
    assert "width: 32 there, 64 now" in str(error.value)
    run_tiny(tmp_path, steps=2, log_every=1, keep_checkpoints=1)  # these change nothing that is learnt


def test_checkpoints_may_be_read_by_whom_the_umask_lets(tmp_path):
    former = os.umask(0o022)
    try:
        path = run_tiny(tmp_path, steps=1).newest_checkpoint()
    finally:
        os.umask(former)
    assert path.stat().st_mode & 0o777 == 0o644


def test_what_is_not_ours_is_left_in_the_run_folder(tmp_path):
    run = run_tiny(tmp_path, steps=4)
    (run.checkpoints / "best.safetensors").write_bytes(b"mine")
    (run.checkpoints / "notes").mkdir()
    state_file(run.checkpoint_file(4)).unlink()  # enough to sample from, not to go on
    run_tiny(tmp_path, steps=2)
    assert {"best.safetensors", "notes", run.checkpoint_file(4).name} <= {p.name for p in run.checkpoints.iterdir()}


def test_a_cosine_cannot_be_stretched_and_a_run_that_never_saved_blocks_nothing(tmp_path):
    run_tiny(tmp_path / "cosine", steps=2, lr_schedule="cosine")
    with pytest.raises(ResumeError, match="steps: 2 there, 4 now"):
        run_tiny(tmp_path / "cosine", steps=4, lr_schedule="cosine")
    (tmp_path / "data").mkdir()
    Image.new("RGB", (28, 28)).save(tmp_path / "data" / "a.png")
    (tmp_path / "data" / "b.png").write_bytes(b"broken")
    options = {"data": str(tmp_path / "data"), "steps": 2}
    with pytest.raises(DitcliError, match=r"b\.png"):
        run_tiny(tmp_path / "run", **options, strict=True)
    assert run_tiny(tmp_path / "run", **options).saved_steps() == [2]  # one picture, and no labels


def test_other_classes_are_other_settings(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (28, 28)).save(tmp_path / "data" / name / "a.png")
    run_tiny(tmp_path / "run", data=str(tmp_path / "data"), steps=1)
    (tmp_path / "data" / "dog").rename(tmp_path / "data" / "owl")
    with pytest.raises(ResumeError, match="owl"):
        run_tiny(tmp_path / "run", data=str(tmp_path / "data"), steps=2)


def test_old_checkpoints_are_removed(tmp_path):
    assert run_tiny(tmp_path / "two", steps=12, keep_checkpoints=2).saved_steps() == [8, 12]
    assert run_tiny(tmp_path / "all", steps=12, keep_checkpoints=0).saved_steps() == [4, 8, 12]


def test_micro_batches_change_nothing_but_rounding(tmp_path):
    whole = run_tiny(tmp_path / "whole", steps=3)
    parts = run_tiny(tmp_path / "parts", steps=3, micro_batch=4)
    for one, other in zip(read_metrics(whole.metrics_file), read_metrics(parts.metrics_file), strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)


@pytest.mark.parametrize("conditioning", ["adaln", "cross-attention", "in-context"])
@pytest.mark.parametrize(("schedule", "prediction"), [("linear", "v"), ("cosine", "x0"), ("flow", "flow")])
def test_every_way_of_conditioning_and_predicting_learns(tmp_path, conditioning, schedule, prediction):
    changes = {"conditioning": conditioning, "schedule": schedule, "prediction": prediction}
    run = run_tiny(tmp_path, steps=60, lr=3e-3, log_every=15, checkpoint_every=60, **changes)
    losses = [row.loss for row in read_metrics(run.metrics_file)]
    assert losses[-1] < 0.9 * losses[0]


def test_bf16_learns_like_fp32(tmp_path):
    fp32 = run_tiny(tmp_path / "fp32", steps=40, log_every=20)
    bf16 = run_tiny(tmp_path / "bf16", steps=40, log_every=20, precision="bf16")
    losses = [[row.loss for row in read_metrics(run.metrics_file)] for run in (fp32, bf16)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=0.03)
    assert {w.dtype for w in load_file(bf16.newest_checkpoint()).values()} == {torch.float32}


def test_a_gradient_that_is_not_finite_changes_no_weight_and_stops_a_run_that_stays_so(tmp_path):
    with pytest.raises(DitcliError, match="not finite"):
        run_tiny(tmp_path, lr=1e30, steps=60)  # the first step blows the weights up


def test_run_folder_explains_itself(tmp_path):
    run = run_tiny(tmp_path / "run", steps=4, sample_every=2, sample_num=2, sample_steps=2)
    assert sorted(p.name for p in run.samples.iterdir()) == ["step-00000002.png", "step-00000004.png"]
    assert run.loss_file.read_bytes().startswith(b"\x89PNG")
    saved = json.loads(run.config_file.read_text())
    assert saved["train"]["lr"] == 1e-3
    assert saved["model"]["class_names"][7] == "sneaker"
    assert saved["versions"]["torch"] == torch.__version__
    assert saved["versions"]["numpy"] == np.__version__
    assert saved["machine"]["device"]
    assert saved["command"]
    assert saved["train"]["seed"] == 0
    assert saved["data"]["images"] == 6620
    assert saved["data"]["bytes"] == 6620 * 28 * 28
    assert len(saved["data"]["fingerprint"]) == 64
    model, config = load_dit(run.newest_checkpoint())
    raw, _ = load_dit(run.newest_checkpoint(), ema=False)
    assert config.step == 4
    assert not torch.equal(model.blocks[0].attn.qkv.weight, raw.blocks[0].attn.qkv.weight)


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_the_commit_of_a_folder_is_known_where_git_keeps_it(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    for name in ("kept", "left-out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("1")
    assert git_state(tmp_path / "kept") is None
    for command in ("init -q", "add kept", "commit -q -m first"):
        subprocess.run([*git, *command.split()], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert git_state(tmp_path / "kept") == commit
    (tmp_path / "kept" / "file").write_text("2")
    assert git_state(tmp_path / "kept") == f"{commit}-dirty"
    assert git_state(tmp_path / "left-out") is None
    assert git_state(tmp_path / "missing") is None


def test_a_truncated_checkpoint_is_a_named_error(tmp_path):
    run = run_tiny(tmp_path, steps=4)
    path = run.newest_checkpoint()
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=path.name):
        load_dit(path)


# The pieces


def some_latents(num: int = 10, flips: int = 1) -> Latents:
    values = np.random.default_rng(0).integers(0, 256, (num, flips, 3, 4, 4), dtype=np.uint8)
    return Latents(values, np.arange(num), ())


def make_batches(latents: Latents, **changes) -> Batches:
    config = TrainConfig.from_dict(TINY | {"batch_size": 4} | changes)
    diffusion = Diffusion(config.diffusion())
    return Batches(latents, PixelCodec(), diffusion, config, num_classes=10, device=torch.device("cpu"))


def test_a_batch_is_a_function_of_seed_and_step():
    batches, others = make_batches(some_latents()), make_batches(some_latents())
    later = others[7]
    for step in (3, 7):
        batch = batches[step]
    for key in ("x0", "eps", "labels"):
        assert torch.equal(getattr(batch, key), getattr(later, key))
    np.testing.assert_array_equal(batch.t, later.t)
    assert not torch.equal(batch.eps, make_batches(some_latents(), seed=1)[7].eps)
    assert not torch.equal(batch.eps, batches[8].eps)


def test_an_epoch_shows_every_picture_once_though_batches_straddle_its_end():
    batches = make_batches(some_latents(10), label_dropout=0.0)
    seen = torch.cat([batches[step].labels for step in range(5)]).tolist()  # two epochs of ten
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


def test_flips_drops_and_times_have_their_chances():
    latents = some_latents(1, flips=1)
    batches = make_batches(latents, batch_size=20_000)
    batch = batches[0]
    straight = torch.from_numpy(latents.moments[0, 0]).float() / 127.5 - 1
    is_straight = (batch.x0 == straight).all(dim=(1, 2, 3))
    is_flipped = (batch.x0 == straight.flip(-1)).all(dim=(1, 2, 3))
    assert (is_straight | is_flipped).all()
    assert abs(is_flipped.float().mean() - 0.5) < 0.02
    assert abs((batch.labels == 10).float().mean() - 0.1) < 0.01
    assert 1 / 1000 <= batch.t.min() < batch.t.max() == 1.0
    assert abs(batch.t.mean() - 0.5) < 0.01
    assert not make_batches(latents, batch_size=100, flip=False)[0].x0.sub(straight).any()


def test_latents_on_disk_give_the_same_batches_as_latents_in_memory(monkeypatch):
    resident = make_batches(some_latents(10, flips=2))
    monkeypatch.setattr("ditcli.training.batches.RESIDENT_SHARE", 0.0)
    on_disk = make_batches(some_latents(10, flips=2))
    assert resident.resident is not None
    assert on_disk.resident is None
    for step in range(3):
        assert torch.equal(resident[step].x0, on_disk[step].x0)


def test_the_loss_of_a_perfect_prediction_is_zero_and_l1_is_l1():
    batches = make_batches(some_latents())
    diffusion, batch = Diffusion(DiffusionConfig(prediction="v")), batches[0]
    target = diffusion.target(batch.x0, batch.eps, batch.t)
    for loss, off, expected in [("mse", 0.0, 0.0), ("mse", 0.5, 0.25), ("l1", 0.5, 0.5)]:
        found = diffusion_loss(lambda x, t, y, off=off: target + off, diffusion, batch, loss)
        torch.testing.assert_close(found, torch.full((4,), expected), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("schedule", ["flow", "linear"])
def test_logit_normal_times_prefer_the_middle(schedule):
    batches = make_batches(some_latents(), schedule=schedule, time_sampling="logit-normal")
    t = batches._times(np.random.default_rng(0), 20_000)
    assert (t > 0).all()
    assert (t <= 1).all()
    inner = t.clip(1e-4, 1 - 1e-4)
    logit = np.log(inner / (1 - inner))
    assert logit.mean() == pytest.approx(0, abs=0.03)
    assert logit.std() == pytest.approx(1, abs=0.03)
    if schedule == "linear":
        np.testing.assert_allclose(t * 1000, np.rint(t * 1000), atol=1e-9)


def test_the_bound_trains_the_variance_alone():
    batch = make_batches(some_latents())[0]
    diffusion = Diffusion(DiffusionConfig(learn_sigma=True))
    output = torch.zeros(4, 6, 4, 4, requires_grad=True)
    diffusion_loss(lambda x, t, y: output, diffusion, batch, "mse").sum().backward()
    with_bound = output.grad.clone()
    output.grad = None
    plain = Diffusion(DiffusionConfig(learn_sigma=False))
    diffusion_loss(lambda x, t, y: output[:, :3], plain, batch, "mse").sum().backward()
    torch.testing.assert_close(with_bound[:, :3], output.grad[:, :3])
    assert with_bound[:, 3:].abs().max() > 0


def test_ema_follows_its_definition_and_warms_up():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    average = average_of(model)
    expected = model.weight.detach().clone()
    for step in range(20):
        with torch.no_grad():
            model.weight.normal_()
        decay = ema_decay(0.9, step, warmup=True)
        assert decay == min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
        update_average(average, model, decay)
    torch.testing.assert_close(average.weight, expected)
    assert ema_decay(0.9, 0, warmup=False) == 0.9


def test_learning_rate_warms_up_and_falls():
    config = TrainConfig.from_dict(TINY | {"lr": 1.0, "warmup_steps": 10, "lr_schedule": "cosine", "steps": 110})
    assert learning_rate(config, 0) == pytest.approx(0.1)
    assert learning_rate(config, 9) == 1.0
    assert learning_rate(config, 60) == pytest.approx(0.5)
    assert learning_rate(config, 109) < 1e-3
    constant = TrainConfig.from_dict(TINY | {"lr": 1.0})
    assert {learning_rate(constant, step) for step in range(12)} == {1.0}


def test_devices_and_precision():
    assert open_device("auto").type in ("cpu", "cuda")
    with pytest.raises(ValueError, match="device is 'tpu'"):
        open_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="--device cpu"):
            open_device("cuda")
    assert choose_dtype("fp32", torch.device("cpu")) == torch.float32
    assert choose_dtype("bf16", torch.device("cpu")) == torch.bfloat16


def test_smoothing_of_a_constant_is_the_constant():
    assert smooth([2.0] * 5) == pytest.approx([2.0] * 5)
