"""Gradients that are not finite, and losses that jump: counted, gone back from, and told of."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TINY, assert_same_run, run_tiny
from torch import Tensor

from ditcli.codecs.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from ditcli.codecs.folder import save_codec
from ditcli.codecs.pixels import PixelCodec
from ditcli.config import EncodeConfig, TrainConfig
from ditcli.data.latents import Latents
from ditcli.diffusion.process import Diffusion
from ditcli.encoding import encode
from ditcli.errors import DitcliError
from ditcli.models.files import read_tensors
from ditcli.runs import RunDir, state_file
from ditcli.training.batches import Batches
from ditcli.training.loop import Loop
from ditcli.training.metrics import Row, read_metrics, smooth
from ditcli.training.power_ema import snapshot_file, snapshot_steps
from ditcli.training.setup import prepare
from ditcli.training.state import load_state, restore
from ditcli.training.trouble import Skips, mean_of_finite, spike
from ditcli.training.watching import Watcher
from ditcli.training.writer import Writer


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory):
    os.environ["DITCLI_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["DITCLI_CACHE"]


@dataclass
class Toy:
    """A training whose gradient is not finite at some steps of some orders of the data."""

    run: RunDir
    bad: set[tuple[int, int]]  # (order, step)
    step: int = 0
    order: int = 0
    seconds: float = 0.0
    losses: list[Tensor] = field(default_factory=list)

    def take_step(self) -> tuple[Tensor, Tensor]:
        loss = torch.tensor([math.nan if (self.order, self.step) in self.bad else 1.0 + self.order])
        self.losses.append(loss)
        self.step += 1
        return loss[0], 2 * loss[0]

    def save(self) -> None:
        for path in (state_file(self.run.checkpoint_file(self.step)), self.run.checkpoint_file(self.step)):
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps([self.step, self.order]))

    def go_back(self, checkpoint: Path) -> None:
        self.step, self.order = json.loads(checkpoint.read_text())
        self.order += 1
        self.losses = []

    def train(self, **changes) -> list[Row]:
        self.run.path.mkdir()
        config = TrainConfig.from_dict(TINY | {"steps": 40, "log_every": 4, "checkpoint_every": 8} | changes)
        watcher = Watcher(config, self.run, self.step, active=False)
        with Writer() as writer:
            parts = {"take_step": self.take_step, "save": self.save, "go_back": self.go_back, "draw": lambda: None}
            Loop(config=config, run=self.run, state=self, writer=writer, watcher=watcher, **parts).train()
        return read_metrics(self.run.metrics_file)


def test_steps_are_skipped_and_counted_and_their_loss_is_left_out(tmp_path, capsys):
    rows = Toy(RunDir(tmp_path / "run"), {(0, 1), (0, 4), (0, 5), (0, 6), (0, 7)}).train()
    assert [row.step for row in rows] == list(range(4, 41, 4))
    assert [row.skipped for row in rows] == [1, 4] + [0] * 8
    assert [row.loss for row in rows if row.step != 8] == [1.0] * 9
    assert math.isnan(rows[1].loss)
    assert {row.smoothed for row in rows} == {1.0}
    assert "going back" not in capsys.readouterr().err


def test_after_many_in_a_row_the_run_goes_back_and_on_in_another_order(tmp_path, capsys):
    toy = Toy(RunDir(tmp_path / "run"), {(0, step) for step in range(10, 40)})
    rows = toy.train()
    told = capsys.readouterr().err
    assert "11 times in a row up to step 21: going back to step 8, and on with the data in another order" in told
    assert [(row.step, row.loss, row.skipped) for row in rows] == [
        (step, 1.0 if step <= 8 else 2.0, 0) for step in range(4, 41, 4)
    ]
    assert toy.run.saved_steps() == [8, 16, 24, 32, 40]  # none while steps were skipped


def test_a_run_that_went_further_may_go_back_again(tmp_path, capsys):
    bad = {(0, step) for step in range(10, 40)} | {(1, step) for step in range(30, 40)}
    toy = Toy(RunDir(tmp_path / "run"), bad | {(1, 29)})
    assert toy.train()[-1].loss == 3.0
    assert capsys.readouterr().err.count("going back to step") == 2


def test_a_run_that_fails_again_stops_with_advice(tmp_path):
    toy = Toy(RunDir(tmp_path / "run"), {(order, step) for order in range(9) for step in range(10, 40)})
    with pytest.raises(DitcliError, match=r"as before from the checkpoint of step 8, up to step 21\..* lower --lr"):
        toy.train()
    assert toy.order == 1
    with pytest.raises(DitcliError, match=r"in a row up to step 11\."):  # before its first checkpoint
        Toy(RunDir(tmp_path / "other"), {(0, step) for step in range(40)}).train()


def test_a_jump_of_the_loss_is_noted(tmp_path, capsys):
    rows = [Row(step, 1.0, 1.0, 0, 0, 0, 0, 0, 0) for step in range(6)]
    assert spike(rows) is None
    for loss, jump in ((1.9, None), (3.0, 3.0), (math.nan, None)):
        assert spike([*rows[:-1], Row(6, loss, 1.0, 0, 0, 0, 0, 0, 0)]) == jump
    assert spike([*rows[:3], Row(6, 3.0, 1.0, 0, 0, 0, 0, 0, 0)]) is None  # so early it means nothing


def test_counts_and_means_leave_out_what_is_not_finite():
    skips = Skips()
    for norm in (1.0, math.inf, math.nan, 2.0, math.nan):
        skips.add(torch.tensor(norm))
    skips.read()
    assert (skips.in_a_row, skips.since_row) == (1, 3)
    losses = [torch.tensor(values) for values in ([1.0, 2.0], [math.nan, math.nan], [3.0, 6.0])]
    assert mean_of_finite(losses) == [2.0, 4.0]
    assert mean_of_finite([torch.tensor(4.0)]) == [4.0]
    assert smooth([math.nan, 1.0, math.nan, 1.0])[1:] == pytest.approx([1.0] * 3)


def test_a_state_goes_back_to_the_bit_and_keeps_its_order(tmp_path):
    settings = {"steps": 8, "out": str(tmp_path / "run")}
    run = run_tiny(tmp_path / "run", steps=8)
    setup = prepare(TrainConfig.from_dict(TINY | settings))
    rest = (setup.config, setup.model, setup.device, None)
    state, former = load_state(run.checkpoint_file(8), *rest), load_state(run.checkpoint_file(4), *rest)
    model = state.model
    restore(state, run.checkpoint_file(4))
    state.order = 1
    assert state.model is model
    assert (state.step, former.order) == (4, 0)
    expected, found = former.tensors(), state.tensors()
    assert found.pop("order") == 1 + expected.pop("order")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert "order" in read_tensors(state_file(run.checkpoint_file(8)))


def test_another_order_shows_every_picture_once_an_epoch_too():
    latents = Latents(np.zeros((10, 1, 3, 4, 4), np.uint8), np.arange(10), ())
    config = TrainConfig.from_dict(TINY | {"batch_size": 5, "label_dropout": 0.0})
    diffusion = Diffusion(config.diffusion())
    batches = Batches(latents, PixelCodec(), diffusion, config, num_classes=10, device=torch.device("cpu"))
    seen, first = [], batches[0]
    for order in range(3):
        batches.order = order
        seen.append(torch.cat([batches[0].labels, batches[1].labels]).tolist())
        assert sorted(seen[-1]) == list(range(10))
        assert torch.equal(batches[0].eps, first.eps) == (order == 0)
    assert seen[0] != seen[1] != seen[2] != seen[0]


def encoded_pictures(tmp_path: Path) -> tuple[np.ndarray, dict[str, object]]:
    """The latents of eight pictures, open for writing, and the settings that train on them."""
    torch.manual_seed(0)
    save_codec(AutoencoderKL(AutoencoderKLConfig(block_out_channels=(8, 16), norm_num_groups=4)), tmp_path / "vae")
    (tmp_path / "pictures").mkdir()
    for i in range(8):
        Image.new("RGB", (32, 32), (30 * i, 100, 200)).save(tmp_path / "pictures" / f"{i}.png")
    folders = {"data": str(tmp_path / "pictures"), "vae": str(tmp_path / "vae"), "out": str(tmp_path / "latents")}
    encode(EncodeConfig.from_dict(folders | {"image_size": 32, "flip": False, "device": "cpu", "precision": "fp32"}))
    settings = {"data": str(tmp_path / "latents"), "pixels": False, "flip": False, "model": "DiT-S/8", "image_size": 32}
    settings |= {"batch_size": 2, "log_every": 4}
    return np.load(tmp_path / "latents" / "moments.npy", mmap_mode="r+"), settings


def test_a_damaged_latent_costs_the_steps_that_see_it_and_nothing_more(tmp_path):
    moments, settings = encoded_pictures(tmp_path)
    moments[3] = np.nan
    moments.flush()
    run = run_tiny(tmp_path / "run", **settings, steps=16)
    rows = read_metrics(run.metrics_file)
    assert [row.skipped for row in rows] == [1] * 4  # an epoch has four steps
    assert all(math.isfinite(row.loss) for row in rows)
    assert all(value.isfinite().all() for value in read_tensors(run.newest_checkpoint()).values())


def test_a_run_that_gave_up_goes_on_as_if_nothing_had_been_once_the_cause_is_gone(tmp_path, capsys):
    moments, settings = encoded_pictures(tmp_path)
    settings |= {"checkpoint_every": 8, "ema_snapshot_every": 4}
    whole = run_tiny(tmp_path / "whole", **settings, steps=24)
    run, former = run_tiny(tmp_path / "run", **settings, steps=8), moments.copy()
    moments[:] = np.nan
    moments.flush()
    with pytest.raises(DitcliError, match="as before from the checkpoint of step 8, up to step 19"):
        run_tiny(run.path, **settings, steps=24)
    assert capsys.readouterr().err.count("going back to step 8, and on with the data in another order") == 1
    assert run.saved_steps() == [8]
    moments[:] = former
    moments.flush()
    run_tiny(run.path, **settings, steps=24)
    assert_same_run(whole, run)
    for step in snapshot_steps(whole):
        one, other = (read_tensors(snapshot_file(each, step)) for each in (whole, run))
        assert all(torch.equal(one[name], other[name]) for name in one)
