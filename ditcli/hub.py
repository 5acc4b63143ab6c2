"""A model's or codec's name -> files on disk."""

from __future__ import annotations

from pathlib import Path

from ditcli import runs
from ditcli.errors import ModelNotFoundError


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
    """The folder of a VAE: a local one, or a Hub repository's config and weights, fetched once and cached.

    Raises ModelNotFoundError, with what to do instead, for a name that is neither and where there is no network.
    """
    if Path(name).is_dir():
        return Path(name)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ModelNotFoundError(f"there is no folder {name!r}, and a Hub repository is called owner/name.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    instead = "Name a local VAE with --vae FOLDER, or train without one with --pixels."
    try:
        return Path(
            snapshot_download(
                name, allow_patterns=["config.json", "*.safetensors", "vae/config.json", "vae/*.safetensors"]
            )
        )
    except GatedRepoError as error:
        raise ModelNotFoundError(
            f"the Hub repository {name} is gated: accept its terms on its page, then `hf auth login`. {instead}"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(f"there is no folder and no Hub repository {name!r}. {instead}") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelNotFoundError(
            f"the VAE {name} is not in the cache and the Hub cannot be reached. {instead}"
        ) from error
