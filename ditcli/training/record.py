"""What a run was made with, for its config.json: command, versions, machine, code and data."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import ditcli
from ditcli.data.folders import ImageDataset
from ditcli.doctor.machine import cpu_name

PACKAGES = ("torch", "numpy", "safetensors", "pillow", "huggingface-hub")


def describe_run(device: torch.device) -> dict[str, Any]:
    """The command as it was given, the versions of what computes, and where; the code's commit if it is a checkout."""
    versions = {"ditcli": ditcli.__version__, "python": platform.python_version()}
    versions |= {name: metadata.version(name) for name in PACKAGES}
    cuda = device.type == "cuda"
    if cuda:
        versions |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    return {
        "command": sys.argv,
        "device": str(device),
        "machine": {
            "device": torch.cuda.get_device_name(device) if cuda else cpu_name(),
            "host": platform.node(),
            "system": platform.platform(),
        },
        "versions": versions,
        "git": git_state(Path(ditcli.__file__).parent),
    }


def describe_data(dataset: ImageDataset, folder: Path) -> dict[str, Any]:
    """How many pictures of how many bytes, and a hash of what they are; the folder's commit if git has it."""
    return {
        "layout": dataset.layout,
        "images": len(dataset),
        "bytes": dataset.num_bytes(),
        "classes": list(dataset.class_names),
        "fingerprint": dataset.fingerprint(),
        "git": git_state(folder),
    }


def git_state(folder: Path) -> str | None:
    """The commit of a folder that git keeps, with `-dirty` where files were changed since; None for any other."""
    git = ["git", "--no-optional-locks", "-C", str(folder)]
    try:
        for command in ("ls-files --error-unmatch .", "describe --always --dirty --abbrev=40 --exclude=*"):
            done = subprocess.run([*git, *command.split()], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
