"""TensorBoard, Weights & Biases and Trackio, offline: what they keep of a run, and that none of them can stop it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ditcli.config import TrainConfig
from ditcli.errors import SettingError
from ditcli.images import write_png
from ditcli.runs import RunDir
from ditcli.training.loggers import open_loggers

# What a run tells its loggers; in a process of its own, since they start threads and change what is global.
TELL = """
import sys
import numpy as np
from dataclasses import fields
from pathlib import Path
from ditcli.config import TrainConfig
from ditcli.images import write_png
from ditcli.runs import RunDir
from ditcli.training.loggers import open_loggers
from ditcli.training.metrics import DiffusionRow
run, first, *names = sys.argv[1:]
run, first = RunDir(Path(run)), int(first)
run.samples.mkdir(parents=True, exist_ok=True)
loggers = open_loggers(TrainConfig(data="fashion-mnist", log=tuple(names)), run, first)
for step in (first + 2, first + 4):
    known = {"step": step, "loss": 0.5 / step, "loss_noise_8": 0.25}
    row = DiffusionRow(**{field.name: known.get(field.name) for field in fields(DiffusionRow)})
    write_png(run.samples / f"step-{step:08}.png", np.full((20, 30, 3), step * 20, np.uint8))
    for logger in loggers:
        logger.log(row)
        logger.log_score(step, "FID of 9 samples", 12.5)
        logger.log_image(step, run.samples / f"step-{step:08}.png")
for logger in loggers:
    logger.close()
print([logger.name for logger in loggers if logger.backend])
"""


def tell(run: Path, *names: str, first: int = 0, **environment: str) -> str:
    """Tell loggers of two rows; what was said on stderr. They are all still there at the end."""
    words = [sys.executable, "-c", TELL, str(run), str(first), *names]
    told = subprocess.run(words, env=os.environ | environment, capture_output=True, text=True, timeout=200)
    assert told.returncode == 0, told.stderr
    assert told.stdout.strip().splitlines()[-1] == str(list(names)), told.stderr
    return told.stderr


def test_tensorboard_has_numbers_and_pictures_of_a_run_that_went_on(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra `tensorboard`")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tell(tmp_path, "tensorboard")
    tell(tmp_path, "tensorboard", first=2)  # step 4 again, and 6
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {event.step: event.value for event in events.Scalars("train/loss")} == pytest.approx(
        {2: 0.25, 4: 0.125, 6: 0.5 / 6}
    )
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6]
    assert events.Scalars("train/loss_noise_8")[0].value == 0.25
    assert "train/loss_noise_1" not in events.Tags()["scalars"]
    assert events.Scalars("score/FID of 9 samples")[0].value == 12.5
    assert [(picture.step, picture.width, picture.height) for picture in events.Images("samples")] == [
        (2, 30, 20),
        (4, 30, 20),
        (6, 30, 20),
    ]


def test_wandb_keeps_a_run_offline(tmp_path):
    pytest.importorskip("wandb", reason="needs the extra `wandb`")
    tell(tmp_path, "wandb", WANDB_MODE="offline")
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    (record,) = folder.glob("run-*.wandb")
    assert b"train/loss" in record.read_bytes()
    assert b"FID of 9 samples" in record.read_bytes()
    assert len(list((folder / "files" / "media" / "images").glob("samples_*.png"))) == 2
    assert (tmp_path / ".log-id").read_text() in record.name


def test_trackio_keeps_a_run_on_this_machine(tmp_path):
    pytest.importorskip("trackio", reason="needs the extra `trackio`")
    store = tmp_path / "store"
    tell(tmp_path / "run", "trackio", TRACKIO_DIR=str(store))
    code = (
        "import json; from trackio.sqlite_storage import SQLiteStorage as S; (run,) = S.get_runs('ditcli'); "
        "print(json.dumps([run, S.get_logs('ditcli', run)], default=str))"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"TRACKIO_DIR": str(store)}, capture_output=True, text=True
    )
    name, logs = json.loads(told.stdout.splitlines()[-1])
    assert name == (tmp_path / "run" / ".log-id").read_text()
    assert [log["step"] for log in logs if "train/loss" in log] == [2, 4]
    assert [log["train/loss"] for log in logs if "train/loss" in log] == [0.25, 0.125]
    assert len([log for log in logs if "samples" in log]) == 2


def test_all_at_once(tmp_path):
    for name in ("tensorboard", "wandb", "trackio"):
        pytest.importorskip(name, reason=f"needs the extra `{name}`")
    told = tell(tmp_path, "tensorboard", "wandb", "trackio", WANDB_MODE="offline", TRACKIO_DIR=str(tmp_path / "store"))
    assert "failed" not in told


def test_a_logger_that_cannot_write_is_let_go_and_the_others_go_on(tmp_path, capsys):
    pytest.importorskip("tensorboard", reason="needs the extra `tensorboard`")
    run = RunDir(tmp_path)
    run.samples.mkdir()
    (tmp_path / "tensorboard").write_text("a file where the logger wants its folder")
    (logger,) = open_loggers(TrainConfig(log=("tensorboard",)), run, 0)
    assert logger.backend is None
    told = capsys.readouterr().err
    assert "--log tensorboard failed (FileExistsError" in told or "--log tensorboard failed (NotADirectoryError" in told
    assert "the run goes on without it" in told
    logger.log_score(2, "FID", 0.5)
    logger.log_image(2, run.samples / "none.png")
    logger.close()
    assert capsys.readouterr().err == ""  # said once


def test_a_picture_that_is_not_there_lets_a_logger_go(tmp_path, capsys):
    pytest.importorskip("tensorboard", reason="needs the extra `tensorboard`")
    write_png(tmp_path / "a.png", np.zeros((4, 4, 3), np.uint8))
    (logger,) = open_loggers(TrainConfig(log=("tensorboard",)), RunDir(tmp_path), 0)
    logger.log_image(1, tmp_path / "a.png")
    assert logger.backend
    logger.log_image(2, tmp_path / "b.png")
    assert logger.backend is None
    assert "the run goes on" in capsys.readouterr().err


def test_names_and_packages_are_checked_before_anything_is_done(tmp_path):
    with pytest.raises(SettingError, match=r"log is \('tensorbord',\).*Did you mean 'tensorboard'"):
        TrainConfig(log=("tensorbord",))
    missing = "import sys; sys.modules['wandb'] = None; from ditcli.training.loggers import check_loggers; "
    code = f"{missing}check_loggers(('wandb',))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'ditcli[wandb]'" in told.stderr
