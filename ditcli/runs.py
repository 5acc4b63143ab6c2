"""The run folder: what lies where, and which checkpoint is the newest. Free of torch."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO, TypeVar

from safetensors import SafetensorError, safe_open

from ditcli.config import ModelConfig, VaeConfig, suggest
from ditcli.errors import CheckpointError, ModelNotFoundError, RunInUseError
from ditcli.progress import say

RUNS = Path("runs")
FORMAT = "ditcli-1"
VAE_FORMAT = "ditcli-vae-1"
# What `ditcli export-onnx` writes into a folder.
DENOISER, DECODER = "denoiser.onnx", "decoder.onnx"
SHARED_CODEC = "./vae"
AnyConfig = TypeVar("AnyConfig", ModelConfig, VaeConfig)


@dataclass(frozen=True)
class RunDir:
    """`config.json`, `metrics.csv`, `loss.png`, `samples/`, `checkpoints/` and the best weights of one training run.

    A checkpoint of step 1000 is `step-00001000.safetensors`, the averaged weights with the whole config, beside
    `step-00001000.state.safetensors`, what training needs to go on. The first is written last, so where it is both are.
    """

    path: Path

    @property
    def config_file(self) -> Path:
        return self.path / "config.json"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.csv"

    @property
    def scores_file(self) -> Path:
        return self.path / "scores.csv"

    @property
    def best_file(self) -> Path:
        return self.path / "best.safetensors"

    @property
    def loss_file(self) -> Path:
        return self.path / "loss.png"

    @property
    def report_file(self) -> Path:
        return self.path / "report.html"

    @property
    def animation_file(self) -> Path:
        """The sample grids one after the other."""
        return self.path / "progress.gif"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def vae(self) -> Path:
        """Of a run of `train-vae`: the newest averaged weights as a folder that diffusers opens."""
        return self.path / "vae"

    @property
    def validation_file(self) -> Path:
        """Of a run of `train-vae`: how well held-out pictures are reconstructed."""
        return self.path / "validation.csv"

    def sample_files(self) -> dict[int, Path]:
        """The grids of samples by their steps, oldest first."""
        names = [(re.fullmatch(r"step-(\d+)\.png", path.name), path) for path in _files(self.samples)]
        return dict(sorted((int(name[1]), path) for name, path in names if name))

    def last_change(self) -> float:
        """When numbers were last written, or the run begun, in seconds since 1970."""
        return max(file.stat().st_mtime for file in (self.config_file, self.metrics_file) if file.is_file())

    def checkpoint_file(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08}.safetensors"

    def saved_steps(self) -> list[int]:
        """Steps whose checkpoint is whole, oldest first."""
        return [step for step in self.model_steps() if state_file(self.checkpoint_file(step)).is_file()]

    def model_steps(self) -> list[int]:
        """Steps whose averaged weights are there, oldest first: enough to sample, not to go on training."""
        names = [re.fullmatch(r"step-(\d+)\.safetensors", path.name) for path in _files(self.checkpoints)]
        return sorted(int(name[1]) for name in names if name)

    def newest_checkpoint(self) -> Path:
        """The last checkpoint that can be sampled from; ModelNotFoundError where none was written yet."""
        steps = self.model_steps()
        if not steps:
            raise ModelNotFoundError(f"{self.path} has no checkpoint yet: let `ditcli train` reach its first.")
        return self.checkpoint_file(steps[-1])

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder, which is made where it is not there, for training in this process alone.

        The system lets go of it when the process ends, however that comes about. Raises RunInUseError, which names
        process and host, where another process holds it.
        """
        file = _hold(self.path)
        try:
            yield
        finally:
            Path(file.name).unlink(missing_ok=True)
            with suppress(OSError):
                self.path.rmdir()  # where nothing came of it
            file.close()

    def read_config(self) -> dict[str, Any]:
        """What `config.json` holds: `train`, `model`, `data` and `versions`."""
        try:
            values = json.loads(self.config_file.read_text())
            if not isinstance(values, dict):
                raise ValueError("not an object")
        except ValueError as error:
            raise CheckpointError(f"{self.config_file} is damaged ({error}).") from error
        return values


def state_file(checkpoint: Path) -> Path:
    """The training state beside a checkpoint."""
    return checkpoint.with_suffix(".state.safetensors")


def export_folder(checkpoint: Path) -> Path:
    """Where a checkpoint's ONNX export lies: `onnx` in its run, or beside a file that is in none."""
    run = checkpoint.parent.parent
    return run / "onnx" if is_run(run) else checkpoint.with_name(f"{checkpoint.stem}-onnx")


def is_run(path: Path) -> bool:
    """Whether a folder is a run's."""
    return (path / "config.json").is_file() and (path / "checkpoints").is_dir()


def is_vae_run(path: Path) -> bool:
    return is_run(path) and (path / "vae").is_dir()


def find_runs(root: Path = RUNS) -> list[RunDir]:
    """The runs in `root`, the one that was last at work first."""
    paths = [path for path in root.iterdir() if is_run(path)] if root.is_dir() else []
    return sorted((RunDir(path) for path in paths), key=lambda run: run.last_change(), reverse=True)


def find_run(name: str | None = None, root: Path = RUNS) -> RunDir:
    """A run by its path or by its name in `root`, without a name the newest; ModelNotFoundError where there is none."""
    if name is None:
        runs = find_runs(root)
        if not runs:
            raise ModelNotFoundError(f"there is no run in {root}/: begin one with `ditcli train --data FOLDER`.")
        return runs[0]
    for path in (Path(name).expanduser(), root / name):
        if is_run(path):
            return RunDir(path)
    known = [run.path.name for run in find_runs(root)]
    raise ModelNotFoundError(
        f"{name} is no run: a run is a folder with config.json and checkpoints/.{suggest(name, known)}"
    )


def newest_run(root: Path = RUNS) -> RunDir:
    """The run in `root` whose checkpoint was written last; ModelNotFoundError where there is none."""
    runs = [RunDir(path) for path in root.iterdir() if is_run(path) and not is_vae_run(path)] if root.is_dir() else []
    ready = [run for run in runs if run.model_steps()]
    if not ready:
        raise ModelNotFoundError(
            f"there is no trained model in {root}/: train one with `ditcli train --data FOLDER`, or give --model."
        )
    return max(ready, key=lambda run: run.newest_checkpoint().stat().st_mtime_ns)


def is_checkpoint(path: Path) -> bool:
    """Whether this is a checkpoint of ours, of a DiT or a VAE; False for the files of others and for damaged ones."""
    try:
        with safe_open(path, framework="np") as file:
            return (file.metadata() or {}).get("format") in (FORMAT, VAE_FORMAT)
    except (SafetensorError, OSError):
        return False


def read_model_config(checkpoint: Path) -> ModelConfig:
    """The config in a checkpoint's metadata; CheckpointError for any other file."""
    return parse_model_config(checkpoint, _read_metadata(checkpoint))


def read_vae_config(checkpoint: Path) -> VaeConfig:
    """The config in the metadata of a VAE's checkpoint; CheckpointError for any other file."""
    return _parse(checkpoint, _read_metadata(checkpoint), VaeConfig, VAE_FORMAT)


def parse_model_config(path: Path, metadata: Mapping[str, str]) -> ModelConfig:
    """The config in the metadata of a checkpoint or an ONNX export; CheckpointError for any other file's.

    A codec that was shared together with the checkpoint, `./vae`, is given as the path that it has here.
    """
    if metadata.get("format") == VAE_FORMAT:
        raise CheckpointError(f"{path} is of a VAE: give its run to --vae, and a DiT trained with it to --model.")
    config = _parse(path, metadata, ModelConfig, FORMAT)
    return replace(config, codec=str(path.parent / config.codec)) if config.codec == SHARED_CODEC else config


def _read_metadata(checkpoint: Path) -> dict[str, str]:
    try:
        with safe_open(checkpoint, framework="np") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{checkpoint} is no checkpoint of ditcli, or a damaged one ({error}).") from error


def _parse(path: Path, metadata: Mapping[str, str], config_class: type[AnyConfig], expected: str) -> AnyConfig:
    if metadata.get("format") != expected:
        raise CheckpointError(f"{path} was not written by ditcli: its metadata does not say format {expected}.")
    try:
        return config_class.from_dict(json.loads(metadata["config"]))
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has a config that this version does not understand: {error}") from error


def _hold(run: Path) -> TextIO:
    """The lock file, opened and locked, and with a note of who holds it."""
    while True:
        run.mkdir(parents=True, exist_ok=True)
        file = (run / ".lock").open("a+")
        try:
            _lock(file, run)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(file.name)):
                break
        except FileNotFoundError:  # the process that held it has removed it since it was opened
            pass
        except BaseException:
            file.close()
            raise
        file.close()
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def _lock(file: TextIO, run: Path) -> None:
    if sys.platform == "win32":
        return  # has no such locks
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        other = file.read() or "another process"
        raise RunInUseError(
            f"{run} is being trained by {other}: wait for it, stop it, or give another --out."
        ) from error
    except OSError as error:
        say(f"Note: {run} cannot be locked ({error.strerror}), so do not train there from two processes at once.")


def _files(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []
