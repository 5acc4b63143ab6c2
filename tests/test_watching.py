"""What a user sees of a run: its numbers, curves, pictures, report and loggers, none of which may stop it."""

from __future__ import annotations

import csv
import io
import math
import os
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TINY as SMALLEST

from ditcli.cli import main
from ditcli.config import FindLrConfig, TrainConfig
from ditcli.errors import DitcliError, SettingError
from ditcli.progress import sparkline
from ditcli.runs import RunDir, state_file
from ditcli.training.find_lr import RangeTest, find_lr
from ditcli.training.metrics import DiffusionRow, read_metrics
from ditcli.training.objective import by_noise_level
from ditcli.training.train import train

TINY = SMALLEST | {"steps": 8, "log_every": 2}
OLD_COLUMNS = ["step", "loss", "lr", "grad_norm", "images_per_second", "seconds"]


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory) -> None:
    os.environ["DITCLI_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["DITCLI_CACHE"]


def run_tiny(out: Path, **changes) -> RunDir:
    return train(TrainConfig.from_dict(TINY | {"out": str(out)} | changes))


# Numbers


def test_losses_by_noise_level_are_means_whatever_the_batches():
    rng = np.random.default_rng(0)
    losses, t = rng.random(64).astype(np.float32), rng.integers(1, 1001, 64) / 1000
    t[:3] = 0.125, 0.1250001, 1.0  # the last of a level, the first of the next, and pure noise
    whole = by_noise_level(torch.from_numpy(losses), t)
    parts = [by_noise_level(torch.from_numpy(losses[i : i + 16]), t[i : i + 16]) for i in range(0, 64, 16)]
    torch.testing.assert_close(torch.stack(parts).mean(dim=0), whole)
    assert whole[0].item() == pytest.approx(losses.mean())
    columns = DiffusionRow.parts(whole[1:].tolist())
    for k in range(1, 9):
        inside = losses[(t > (k - 1) / 8) & (t <= k / 8)]
        assert columns[f"loss_noise_{k}"] == pytest.approx(inside.mean(), rel=1e-5)
    assert DiffusionRow.parts([0.0] * 16)["loss_noise_3"] is None  # no image of that level


def test_metrics_have_all_columns_and_the_levels_make_up_the_loss(tmp_path):
    run = run_tiny(tmp_path, batch_size=64)
    with run.metrics_file.open() as file:
        lines = list(csv.DictReader(file))
    assert [line["step"] for line in lines] == ["2", "4", "6", "8"]
    assert lines[0].keys() >= {*OLD_COLUMNS, "smoothed", "memory_gb", "score", "loss_noise_1", "loss_noise_8"}
    assert lines[0]["score"] == ""
    assert lines[0]["smoothed"] == lines[0]["loss"]
    for row in read_metrics(run.metrics_file, DiffusionRow):
        levels = [level for level in row.noise_levels if level is not None]
        assert len(levels) == 8
        assert min(levels) < row.loss < max(levels)
        assert 0.01 < row.memory_gb < 100


def test_files_of_older_versions_are_read_and_half_a_line_is_not(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text(
        "step,loss,lr,grad_norm,images_per_second,seconds\r\n50,1.5,1e-4,0.5,100.0,3.0\r\n100,1.25,1e-4,0.4,1"
    )
    (row,) = read_metrics(path, DiffusionRow)
    assert (row.step, row.loss, row.seconds) == (50, 1.5, 3.0)
    assert (row.smoothed, row.score, row.noise_levels) == (None, None, [None] * 8)
    path.write_text(
        "step,loss,lr,grad_norm,images_per_second,seconds\r\n50,1.5,1e-4,0.5,100.0,3.0\r\n100,1.25,1e-4,0.4,1,2"
    )
    assert len(read_metrics(path)) == 1  # a number that may have lost its end
    path.write_text("")
    assert read_metrics(path) == []


def test_a_run_of_an_older_version_goes_on_to_the_same_weights(tmp_path):
    whole = run_tiny(tmp_path / "whole")
    old = run_tiny(tmp_path / "old", steps=5, checkpoint_every=5, log_every=3)
    rows = read_metrics(old.metrics_file)
    with old.metrics_file.open("w", newline="") as file:
        csv.writer(file).writerow(OLD_COLUMNS)
    for row in rows:
        with old.metrics_file.open("a", newline="") as file:
            csv.writer(file).writerow([getattr(row, name) for name in OLD_COLUMNS])
    state = state_file(old.newest_checkpoint())
    tensors = load_file(state)
    tensors["losses"] = torch.tensor([1.5, 1.25])  # one number a step
    save_file(tensors, state)  # and no hash

    again = run_tiny(tmp_path / "old", log_every=7)
    weights = [load_file(run.newest_checkpoint()) for run in (whole, again)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    found = read_metrics(again.metrics_file, DiffusionRow)
    assert [row.step for row in found] == [3, 5, 7, 8]
    assert found[0].noise_levels == [None] * 8
    expected = [1.5, 1.25] + [
        row.loss for row in read_metrics(run_tiny(tmp_path / "each", log_every=1).metrics_file)[5:7]
    ]
    assert found[2].loss == pytest.approx(np.mean(expected), rel=1e-5)
    assert not math.isnan(found[2].loss)


# Rates


def test_the_suggested_rate_is_a_tenth_of_the_best_whatever_the_noise():
    rates = np.geomspace(1e-6, 1e-1, 100).tolist()
    valley = [1 - 0.6 * math.exp(-((math.log10(rate) + 2) ** 2)) for rate in rates]  # lowest at 1e-2
    assert RangeTest(rates, valley).suggested == pytest.approx(1e-3, rel=0.1)
    noisy = np.array(valley) + np.random.default_rng(0).normal(0, 0.03, 100)
    assert RangeTest(rates, noisy.tolist()).suggested == pytest.approx(1e-3, rel=0.5)
    flat = RangeTest([1e-3, 1e-2, 1e-1], [2.0, 2.0, 2.0])
    assert flat.smoothed == pytest.approx([2.0] * 3)


def test_lr_auto_is_a_run_with_the_rate_that_is_found_and_goes_on_with_it(tmp_path, monkeypatch, capsys):
    automatic = run_tiny(tmp_path / "auto", steps=4, lr="auto", log_every=4)
    assert automatic.path.joinpath("lr.png").read_bytes().startswith(b"\x89PNG")
    lr = automatic.read_config()["train"]["lr"]
    assert 1e-5 < lr < 1e-1
    capsys.readouterr()
    run_tiny(tmp_path / "auto", lr="auto", log_every=4)
    assert "testing rates" not in capsys.readouterr().err  # what was found before
    given = run_tiny(tmp_path / "given", lr=lr, log_every=4)
    weights = [load_file(run.newest_checkpoint()) for run in (automatic, given)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])

    monkeypatch.chdir(tmp_path)
    decisive = {key: value for key, value in TINY.items() if key not in ("pixels", *FindLrConfig.WITHOUT_EFFECT)}
    words = [f"--{key.replace('_', '-')}={value}" for key, value in decisive.items()]
    monkeypatch.setattr(sys, "argv", ["ditcli", "find-lr", "--preset", "paper", "--pixels", *words])
    with pytest.raises(SystemExit) as stop:
        main.run()
    told = capsys.readouterr()
    assert not stop.value.code, told.err
    assert float(told.out) == lr
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["lr.png"]


def test_a_loss_that_never_falls_has_no_rate(tmp_path):
    with pytest.raises(DitcliError, match=r"the loss fell at no rate from 10 to 100: give a lower --min-lr"):
        find_lr(
            TrainConfig.from_dict(TINY), FindLrConfig(min_lr=10, max_lr=100, num_rates=20, out=str(tmp_path / "lr.png"))
        )
    assert not (tmp_path / "lr.png").exists()


@pytest.mark.parametrize("value", ["fast", "0", "-1e-3"])
def test_a_rate_that_is_none_is_refused(value):
    with pytest.raises(SettingError, match=r"lr is .*, but must be (a positive number, or auto|positive)"):
        TrainConfig(lr=value)


def test_what_find_lr_leaves_out_are_settings_of_a_training():
    assert set(FindLrConfig.WITHOUT_EFFECT) <= {field.name for field in fields(TrainConfig)}


def test_a_sparkline_is_for_terminals_that_show_it(monkeypatch):
    class Terminal(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "__stderr__", Terminal(io.BytesIO(), encoding="utf-8"))
    assert sparkline([4.0, 3.0, 2.0, 1.0]) == "█▆▃▁"
    assert sparkline([1.0]) == ""
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert len(sparkline([*range(1000), math.nan])) == 10
    monkeypatch.setattr(sys, "__stderr__", Terminal(io.BytesIO(), encoding="ascii"))
    assert sparkline([2.0, 1.0]) == ""
    monkeypatch.setattr(sys, "__stderr__", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    assert sparkline([2.0, 1.0]) == ""
