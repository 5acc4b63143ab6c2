"""Whatever happens to a run, it goes on from its last whole checkpoint as if nothing had."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import TINY, assert_same_run, run_tiny, start

from ditcli.errors import CheckpointError, RunInUseError, SavingError
from ditcli.models.files import read_tensors, write_tensors
from ditcli.models.weights import load_dit
from ditcli.runs import RunDir, state_file
from ditcli.training.metrics import read_metrics
from ditcli.training.writer import Writer


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory):
    os.environ["DITCLI_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["DITCLI_CACHE"]


# Killed


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_kill_9_at_any_moment_loses_at_most_the_steps_since_the_last_checkpoint(tmp_path, kills):
    settings = {"steps": 40 * kills, "checkpoint_every": 8, "keep_checkpoints": 2}
    whole = run_tiny(tmp_path / "whole", **settings)
    killed = RunDir(tmp_path / "killed")
    for moment in np.random.default_rng(kills).uniform(0.0, 0.1, size=kills):
        process = start(killed.path, **settings)
        reached = (killed.saved_steps() or [0])[-1]
        while process.poll() is None and (killed.saved_steps() or [0])[-1] <= reached:
            time.sleep(0.005)  # at least one checkpoint further each time
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        newest = killed.saved_steps()[-1]
        assert newest > reached or newest == settings["steps"]
        assert load_dit(killed.newest_checkpoint())[1].step == newest
    run_tiny(killed.path, **settings)
    assert_same_run(whole, killed)
    for folder in ("", "checkpoints"):  # nothing half-written is left
        names = [sorted(path.name for path in (run.path / folder).iterdir()) for run in (whole, killed)]
        assert names[0] == names[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(tmp_path, number):
    process = start(tmp_path / "run", steps=100_000, checkpoint_every=100_000)
    run = RunDir(tmp_path / "run")
    while process.poll() is None and not read_metrics(run.metrics_file):
        time.sleep(0.02)
    process.send_signal(number)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 130, told
    assert "run the same command again" in told
    assert "Traceback" not in told
    assert run.saved_steps()[-1] >= 3
    assert run.loss_file.is_file()


def test_a_signal_while_pictures_are_drawn_saves_the_step_and_leaves_the_pictures(tmp_path):
    drawing = {"sample_every": 3, "sample_steps": 1000, "sample_num": 100}  # minutes
    process = start(tmp_path / "run", steps=100_000, checkpoint_every=100_000, **drawing)
    run = RunDir(tmp_path / "run")
    while process.poll() is None and not read_metrics(run.metrics_file):
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 130, told
    assert run.saved_steps() == [3]
    assert list(run.samples.iterdir()) == []


def test_half_written_files_are_cleared_and_never_read(tmp_path):
    run = run_tiny(tmp_path / "run", steps=8)
    newest = run.checkpoint_file(8)
    newest.unlink()  # as if killed between the state and the averaged weights
    (run.checkpoints / f".{newest.name}.4194300.partial").write_bytes(b"half")
    (run.path / ".metrics.csv.4194300.partial").write_bytes(b"half")
    assert run.saved_steps() == [4]
    resumed = run_tiny(tmp_path / "run", steps=8)
    assert_same_run(run_tiny(tmp_path / "whole", steps=8), resumed)
    assert not [path for path in run.path.rglob("*") if "partial" in path.name]


# Two at once


def test_a_second_process_is_refused_and_a_dead_one_holds_nothing(tmp_path):
    process = start(tmp_path / "run", steps=100_000, checkpoint_every=4)
    run = RunDir(tmp_path / "run")
    while process.poll() is None and not run.saved_steps():
        time.sleep(0.02)
    before = run.config_file.read_bytes()
    with pytest.raises(RunInUseError, match=f"process {process.pid} on {os.uname().nodename}"):
        run_tiny(run.path)
    assert run.config_file.read_bytes() == before
    process.kill()
    process.communicate()
    run_tiny(run.path, steps=run.saved_steps()[-1] + 1)
    assert not (run.path / ".lock").exists()


def test_a_lock_leaves_no_folder_of_a_run_that_never_began(tmp_path):
    run = RunDir(tmp_path / "runs" / "run")
    with run.lock():
        with pytest.raises(RunInUseError, match=str(os.getpid())), RunDir(run.path).lock():
            pass
        assert (run.path / ".lock").is_file()
    assert not run.path.exists()


# A full disk


def test_a_checkpoint_that_cannot_be_written_stops_the_run_and_keeps_the_former(tmp_path):
    run = run_tiny(tmp_path / "run", steps=4, log_every=4)
    before = {path.name: path.read_bytes() for path in run.checkpoints.iterdir()}
    process = start(run.path, steps=8, log_every=4, file_size=100_000)  # the system refuses to write files beyond that
    _, told = process.communicate(timeout=120)
    assert process.returncode == 1, told
    assert "the checkpoint of step 8 could not be written" in told
    assert "Make room and run the same command again" in told
    assert "Traceback" not in told
    assert {path.name: path.read_bytes() for path in run.checkpoints.iterdir()} == before
    settings = {"steps": 8, "log_every": 4}
    assert_same_run(run_tiny(tmp_path / "whole", **settings), run_tiny(run.path, **settings))


@pytest.fixture
def small_disk(tmp_path) -> Path:
    """A file system with room for one checkpoint, but not for two."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "none", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("when", ["stop", "go-on"])
def test_on_a_full_disk_a_run_stops_or_goes_on_as_told(tmp_path, small_disk, when, capsys):
    run, settings = RunDir(small_disk / "run"), {"when_disk_full": when, "log_every": 1}
    with pytest.raises(SavingError, match=r"the checkpoint of step (8|12) could not be written") as error:
        run_tiny(run.path, **settings)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == [
        "step-00000004.safetensors",
        "step-00000004.state.safetensors",
    ]
    assert load_dit(run.checkpoint_file(4))[1].step == 4
    if when == "go-on":
        assert "Warning: the checkpoint of step 8 could not be written" in capsys.readouterr().err
        assert "of step 12" in str(error.value)
        assert read_metrics(run.metrics_file)[-1].step == 12
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    assert_same_run(run_tiny(tmp_path / "whole", log_every=1), run_tiny(run.path, **settings))


# What was written is what is read


def flip(path: Path, byte: int) -> None:
    with path.open("r+b") as file:
        file.seek(byte, os.SEEK_SET if byte >= 0 else os.SEEK_END)
        value = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([value ^ 1]))


def test_a_flipped_bit_is_a_named_error_which_offers_the_checkpoint_before(tmp_path):
    run = run_tiny(tmp_path / "run")
    former, newest = run.checkpoint_file(8), run.checkpoint_file(12)
    flip(state_file(newest), -1000)
    with pytest.raises(CheckpointError, match=state_file(newest).name) as error:
        run_tiny(run.path, steps=16)
    remove = f"rm {newest} {state_file(newest)}"
    assert f"`{remove}` and the same command again" in str(error.value)
    flip(newest, -1000)
    with pytest.raises(CheckpointError, match=f"`ditcli sample --model {former}`"):
        load_dit(newest)
    subprocess.run(remove.split(), check=True)
    assert_same_run(run_tiny(tmp_path / "whole", steps=16), run_tiny(run.path, steps=16))
    flip(run.checkpoint_file(12), -1000)  # now that of step 8 is not before the newest, but before its former
    flip(run.checkpoint_file(16), -1000)
    with pytest.raises(CheckpointError, match=f"--model {former}"):
        load_dit(run.checkpoint_file(16))
    flip(former, -1000)
    with pytest.raises(CheckpointError, match="no whole checkpoint before it"):
        load_dit(run.checkpoint_file(16))


def test_no_flipped_bit_changes_what_is_read(tmp_path):
    path, tensors = tmp_path / "a.safetensors", {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(7)}
    write_tensors(path, tensors, {"config": '{"step": 8}'})
    whole = path.read_bytes()
    read = {name: value.tolist() for name, value in tensors.items()}
    for byte in range(len(whole)):
        flip(path, byte)
        try:
            found = {name: value.tolist() for name, value in read_tensors(path).items()}
        except CheckpointError:
            continue
        finally:
            path.write_bytes(whole)
        assert found == read, byte
    assert {name: value.tolist() for name, value in read_tensors(path).items()} == read


def test_a_hash_goes_with_a_copy_and_files_without_one_are_read(tmp_path):
    run = run_tiny(tmp_path / "run", steps=4)
    path = tmp_path / "copy.safetensors"
    shutil.copy(run.newest_checkpoint(), path)
    model, _ = load_dit(path)
    flip(path, -1000)
    with pytest.raises(CheckpointError, match=r"copy\.safetensors is damaged \(its SHA-256"):
        load_dit(path)
    with safe_open(run.newest_checkpoint(), framework="pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key != "ditcli-sha256"}
    save_file(load_file(run.newest_checkpoint()), path, metadata)  # as an older version wrote it
    assert torch.equal(load_dit(path)[0].blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)


# Written beside the steps


def test_copies_stay_as_they_were_while_the_writer_writes_and_training_goes_on():
    value, seen, begin = torch.zeros(3), [], threading.Event()
    with Writer() as writer:
        for step in range(3):
            copies = writer.copy({"a": value.fill_(step)})
            writer.submit(lambda copies=copies: (begin.wait(10), seen.append(copies["a"].tolist())))
            value.fill_(-1.0)
            begin.set()
        writer.finish()
    assert seen == [[0.0] * 3, [1.0] * 3, [2.0] * 3]


def test_what_goes_wrong_in_the_thread_reaches_the_run():
    def fail(error: Exception) -> None:
        raise error

    with Writer() as writer:
        writer.submit(lambda: fail(SavingError("no room.")))
        with pytest.raises(SavingError, match=r"no room\. Make room"):
            writer.wait()
        writer.submit(lambda: fail(ZeroDivisionError()))
        with pytest.raises(ZeroDivisionError):
            writer.finish()


def test_a_wait_that_a_signal_breaks_off_is_made_up_for():
    def leave(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    def fail() -> None:
        go_on.wait(60)
        raise SavingError("no room.")

    go_on, former = threading.Event(), signal.signal(signal.SIGALRM, leave)
    try:
        with Writer() as writer:
            writer.submit(fail)
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with pytest.raises(KeyboardInterrupt):
                writer.copy({"a": torch.zeros(3)})
            go_on.set()
            with pytest.raises(SavingError, match="no room"):
                writer.copy({"a": torch.zeros(3)})
    finally:
        signal.signal(signal.SIGALRM, former)


def test_going_on_is_told_and_ends_well_if_a_later_checkpoint_is_written(capsys):
    def fail() -> None:
        raise SavingError("no room.")

    with Writer("go-on") as writer:
        writer.submit_checkpoint(1, fail)
        writer.wait()
        assert capsys.readouterr().err == "Warning: no room. Going on.\n"
        writer.submit_checkpoint(2, lambda: None)
        writer.submit(fail)  # is no checkpoint
        writer.finish()
        writer.submit_checkpoint(3, fail)
        writer.submit(lambda: None)
        with pytest.raises(SavingError):
            writer.finish()
        writer.submit(lambda: fail.missing)
        with pytest.raises(AttributeError):
            writer.wait()


@pytest.mark.slow
def test_training_does_not_wait_for_a_slow_disk(tmp_path):
    """A checkpoint of 200 MB on this disk takes longer than a step; steps beside it are hardly longer than others."""
    settings = {"width": 384, "depth": 6, "num_heads": 6, "steps": 12, "checkpoint_every": 6, "log_every": 1}
    run = run_tiny(tmp_path / "run", **TINY | settings)
    seconds = np.diff([row.seconds for row in read_metrics(run.metrics_file)])
    assert seconds[6:9].max() < 3 * np.median(seconds[:5])
