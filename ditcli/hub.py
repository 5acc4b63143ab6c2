"""A model's or codec's name -> files on disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ditcli import runs
from ditcli.errors import ModelNotFoundError


def cache_folder() -> Path:
    """`$DITCLI_CACHE`, or `ditcli` in the user's cache folder."""
    if "DITCLI_CACHE" in os.environ:
        return Path(os.environ["DITCLI_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ditcli"


def find_checkpoint(name: str | None) -> Path:
    """The checkpoint that a run folder, a checkpoint file or a run's name in `runs/` leads to; None: the newest run.

    A folder of `ditcli export-onnx` leads to its `denoiser.onnx`.
    """
    if name is None:
        return runs.newest_run().newest_checkpoint()
    for path in (Path(name), runs.RUNS / name):
        if path.is_file():
            return path
        if runs.is_run(path):
            return runs.RunDir(path).newest_checkpoint()
        if (path / runs.DENOISER).is_file():
            return path / runs.DENOISER
    if Path(name).is_dir():
        raise ModelNotFoundError(
            f"{name} is a folder, but not a run: it has neither config.json beside checkpoints/ nor {runs.DENOISER}."
        )
    raise ModelNotFoundError(f"there is no model {name!r}: give a run folder or a checkpoint file.")


def find_codec(name: str) -> Path:
    """The folder of a VAE: a local one, a run of `train-vae` (also by name), or a Hub repository's, fetched once.

    Raises ModelNotFoundError, with what to do instead, for a name that is neither and where there is no network.
    """
    local = _local_codec(name)
    if local:
        return local
    patterns = ("config.json", "*.safetensors", "vae/config.json", "vae/*.safetensors")
    return _fetch(name, "VAE", patterns, "Name a local VAE with --vae FOLDER, or train without one with --pixels.")


def lasting_codec_name(name: str) -> str:
    """The name that leads to the same codec from any folder."""
    local = _local_codec(name) if name != "pixels" else None
    return str(local.resolve()) if local else name


def find_lpips(name: str | None) -> Path:
    """The file or folder of LPIPS weights: a local one, a Hub repository's, or None: `lpips/` in the cache folder.

    Raises ModelNotFoundError that says which files are missing and how to go on without.
    """
    instead = "Or go on without LPIPS: --lpips none."
    if name is None:
        folder = cache_folder() / "lpips"
        if not folder.is_dir():
            raise ModelNotFoundError(
                f"LPIPS needs its weights, and there is no folder {folder}: put squeezenet1_1-b8a52dc0.pth of "
                "torchvision and squeeze.pth of the lpips package (weights/v0.1) there, or name a folder with "
                f"--lpips FOLDER. {instead}"
            )
        return folder
    if Path(name).exists():
        return Path(name)
    return _fetch(name, "LPIPS weights", ("*.safetensors", "*.pth"), instead)


def _local_codec(name: str) -> Path | None:
    for path in (Path(name), runs.RUNS / name):
        if runs.is_run(path) and not (path / "vae" / "config.json").is_file():
            found = "has no VAE yet: let `ditcli train-vae` reach its first checkpoint"
            raise ModelNotFoundError(
                f"{path} {found if runs.is_vae_run(path) else 'is the run of a DiT, not of a VAE'}."
            )
        if path.is_dir():
            return path
    return None


def _fetch(name: str, what: str, patterns: Sequence[str], instead: str) -> Path:
    """A Hub repository's files, fetched once and cached."""
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ModelNotFoundError(f"there is no folder {name!r}, and a Hub repository is called owner/name. {instead}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except GatedRepoError as error:
        raise ModelNotFoundError(
            f"the Hub repository {name} is gated: accept its terms on its page, then `hf auth login`. {instead}"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(f"there is no folder and no Hub repository {name!r}. {instead}") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelNotFoundError(
            f"the {what} {name} is not in the cache and the Hub cannot be reached. {instead}"
        ) from error
