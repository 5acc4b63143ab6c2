"""A model's or codec's name -> files on disk: a run, a file, a folder, or a Hub repository fetched into its cache.

Hub names are `owner/name`, `owner/name@revision` and `owner/name:subfolder` (or a file). The client is huggingface_hub:
it shows progress, resumes, caches, and honours HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE=1.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ditcli import runs
from ditcli.errors import CheckpointError, ModelNotFoundError
from ditcli.progress import say

# What a folder of diffusers may call its weights, in the order in which they are tried.
WEIGHTS_NAMES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.bin",
)
SHARED_MODEL = "model.safetensors"  # what `ditcli push` calls the checkpoint
# The trained model that comes with the package, and its name. `scripts/train_embedded.sh` makes it.
EMBEDDED = "demo"
EMBEDDED_MODEL = Path(__file__).parent / "models" / "demo" / SHARED_MODEL
LOOSE = (".safetensors", ".pt", ".pth")

# (file names, what to call the folder) -> those needed, the main one first
Choose = Callable[[set[str], str], list[str]]


@dataclass(frozen=True)
class HubName:
    repo: str
    revision: str | None = None
    inside: str = ""  # a subfolder, or a file

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """None for what cannot be a Hub name."""
        match = re.fullmatch(r"([\w][\w.-]*/[\w][\w.-]*)(?:@([^:@]+))?(?::([^:]+))?", name)
        return cls(match[1], match[2], (match[3] or "").strip("/")) if match else None

    def __str__(self) -> str:
        revision, inside = self.revision and f"@{self.revision}", self.inside and f":{self.inside}"
        return f"{self.repo}{revision or ''}{inside}"


def cache_folder() -> Path:
    """`$DITCLI_CACHE`, or `ditcli` in the user's cache folder."""
    if "DITCLI_CACHE" in os.environ:
        return Path(os.environ["DITCLI_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ditcli"


def find_checkpoint(name: str | None) -> Path:
    """The file or diffusers folder that a name leads to; None: the newest run's last checkpoint.

    A name is a run folder or a run's name in `runs/`, a file, a folder with a model (of `ditcli export-onnx` too, whose
    `denoiser.onnx` it leads to), a Hub repository, or `demo`, the embedded model unless a run, a file or an export
    has that name. Raises ModelNotFoundError with what to do.
    """
    if name is None:
        return runs.newest_run().newest_checkpoint()
    for path in (Path(name).expanduser(), runs.RUNS / name):
        if path.is_file():
            return path
        if runs.is_run(path):
            return runs.RunDir(path).newest_checkpoint()
        if (path / runs.DENOISER).is_file():
            return path / runs.DENOISER
        if path.is_dir() and name != EMBEDDED:  # it may be where somebody keeps samples
            return _entry(path, choose_model(_names_in(path), str(path)))
    if name == EMBEDDED:
        return EMBEDDED_MODEL
    return _fetch(name, choose_model, "a run, a checkpoint file, a folder with a model, or ")


def find_codec(name: str) -> Path:
    """The folder of a VAE: a local one, a run of `train-vae` (also by name), a pipeline, or a Hub repository's.

    Raises ModelNotFoundError, with what to do instead.
    """
    local = _local_codec(name)
    if local:
        return local
    try:
        return _fetch(name, choose_codec, "a VAE's folder or run, or ").parent
    except ModelNotFoundError as error:
        raise ModelNotFoundError(
            f"{error} For the VAE, name a local one with --vae FOLDER, or train without one with --pixels."
        ) from error


def lasting_codec_name(name: str) -> str:
    """The name that leads to the same codec from any folder and at any time: of a Hub repository with its commit."""
    return name if name == "pixels" else portable_name(_local_codec(name) or find_codec(name))


def is_pinned(lasting: str, name: str) -> bool:
    """Whether `lasting` names a commit of the Hub repository, and the place in it, that `name` does."""
    pinned, wanted = HubName.parse(lasting), HubName.parse(name)
    if pinned is None or wanted is None or pinned.revision is None:
        return False
    return pinned.repo == wanted.repo and wanted.inside in ("", pinned.inside)


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
    try:
        return _fetch(name, choose_weights, "a folder of LPIPS weights, or ").parent
    except ModelNotFoundError as error:
        raise ModelNotFoundError(f"{error} {instead}") from error


def find_dinov2(name: str) -> Path:
    """The folder of a DINOv2 as transformers writes it: a local one, or a Hub repository's.

    Raises ModelNotFoundError that says how to bring the files where there is no network.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        choose_transformer({path.name for path in folder.iterdir() if path.is_file()}, str(folder))
        return folder
    if folder.exists():
        raise ModelNotFoundError(
            f"weights is {name!r}, a file, but DINOv2's are a folder with config.json and {SHARED_MODEL}."
        )
    bring = f"or bring its config.json and {SHARED_MODEL} in a folder and give that with --weights FOLDER"
    local = f"a folder with config.json and {SHARED_MODEL}, or "
    return _fetch(name, choose_transformer, local, again=f"run the same command again, {bring}").parent


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


def find_any(name: str) -> Path:
    """What `find_checkpoint` finds, or the config.json of a repository that is a VAE alone."""

    def choose(names: set[str], folder: str) -> list[str]:
        is_codec = "model_index.json" not in names and {"config.json", *WEIGHTS_NAMES[:1]} <= names
        return choose_codec(names, folder) if is_codec else choose_model(names, folder)

    return _fetch(name, choose, "")


def portable_name(path: Path) -> str:
    """What leads to a file or folder from anywhere: `owner/name@commit` for one in the Hub's cache, else its path."""
    absolute = Path(os.path.abspath(path))
    match = re.search(r"/models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})(?:/(.+))?$", absolute.as_posix())
    return str(HubName(f"{match[1]}/{match[2]}", match[3], match[4] or "")) if match else str(absolute)


def weights_in(names: Iterable[str]) -> str | None:
    """The weights among a folder's names."""
    present = set(names)
    return next((name for name in WEIGHTS_NAMES if name in present), None)


def choose_model(names: set[str], folder: str) -> list[str]:
    """What of a folder makes a model: a shared checkpoint, a diffusers pipeline, or the only loose file of weights."""
    if "model_index.json" in names:
        needed = ["model_index.json", "transformer/config.json", "scheduler/scheduler_config.json"]
        return needed + _weights(names, "transformer/", folder) + _vae(names, folder)
    if SHARED_MODEL in names:
        return [SHARED_MODEL] + (_vae(names, folder) if "vae/config.json" in names else [])
    loose = sorted(name for name in names if "/" not in name and name.endswith(LOOSE))
    if len(loose) > 1:
        raise ModelNotFoundError(f"{folder} holds several models ({_listed(loose)}): name one of these files.")
    if not loose:
        raise ModelNotFoundError(
            f"{folder} holds no model: neither a run (config.json beside checkpoints/) nor {SHARED_MODEL}, a diffusers "
            f"pipeline (model_index.json) or one .pt file. It holds {_listed(sorted(names)) or 'nothing'}."
        )
    return loose


def choose_codec(names: set[str], folder: str) -> list[str]:
    """What of a folder makes a VAE: its config and weights, at the top or in vae/."""
    return _vae(names, folder, "" if "vae/config.json" not in names and "config.json" in names else "vae/")


def choose_transformer(names: set[str], folder: str) -> list[str]:
    """The two files of a network of Hugging Face's transformers."""
    needed = ["config.json", SHARED_MODEL]
    missing = [name for name in needed if name not in names]
    if missing:
        raise ModelNotFoundError(
            f"{folder} has no {' and no '.join(missing)}, as a folder of DINOv2 weights must; "
            f"it holds {_listed(sorted(names)) or 'nothing'}."
        )
    return needed


def choose_weights(names: set[str], folder: str) -> list[str]:
    """All loose weights of a folder."""
    found = sorted(name for name in names if "/" not in name and name.endswith(LOOSE))
    if not found:
        raise ModelNotFoundError(f"{folder} holds no weights. It holds {_listed(sorted(names)) or 'nothing'}.")
    return found


def _vae(names: set[str], folder: str, below: str = "vae/") -> list[str]:
    if f"{below}config.json" not in names:
        raise ModelNotFoundError(f"{folder} holds no VAE: there is no {below}config.json.")
    return [f"{below}config.json", *_weights(names, below, folder)]


def _weights(names: set[str], below: str, folder: str) -> list[str]:
    found = weights_in(name.removeprefix(below) for name in names if name.startswith(below))
    if found is None:
        raise ModelNotFoundError(f"{folder} has no {below}{WEIGHTS_NAMES[0]}.")
    return [below + found]


def _entry(folder: Path, needed: list[str]) -> Path:
    """What stands for a model: the folder of a pipeline, else the file."""
    return folder if needed[0] == "model_index.json" else folder / needed[0]


def _names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def _listed(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


# The Hub


def _fetch(name: str, choose: Choose, local: str, again: str | None = None) -> Path:
    """The files of a Hub repository that `choose` picks, on disk. `again`: what to do once there is a network."""
    wanted = HubName.parse(name)
    if wanted is None or name.startswith(f"{runs.RUNS}/"):
        raise ModelNotFoundError(
            f"there is no {name!r}: give {local}a Hub repository as owner/name, owner/name@revision or "
            "owner/name:subfolder."
        )
    from huggingface_hub import snapshot_download

    with _explained(wanted):
        files = _list_files(wanted)
        if files is None:
            return _from_cache(wanted, choose, again or f"run `ditcli pull {wanted}`")
        picked = _pick(files, choose, wanted)
        missing = [name for name in picked if not _is_cached(wanted.repo, name, files[name].commit)]
        if missing:
            size = sum(files[name].size for name in missing)
            say(f"Fetching {len(missing)} files of {wanted.repo} ({size / 1e6:,.1f} MB) into the cache.")
        patterns = [_escape(name) for name in picked]
        snapshot = Path(snapshot_download(wanted.repo, revision=wanted.revision, allow_patterns=patterns))
    for file in missing:
        _check_hash(snapshot / file, files[file], wanted.repo)
    return _entry_in(snapshot, picked, wanted)


def _entry_in(snapshot: Path, picked: list[str], wanted: HubName) -> Path:
    folder = snapshot / wanted.inside
    if wanted.inside and picked == [wanted.inside]:
        return folder
    return _entry(folder, [name.removeprefix(f"{wanted.inside}/") for name in picked])


def _pick(names: Iterable[str], choose: Choose, wanted: HubName) -> list[str]:
    """The needed files, by their whole names; a file that was named itself is all that is needed."""
    everything = set(names)
    if wanted.inside in everything:
        return [wanted.inside]
    below = f"{wanted.inside}/" if wanted.inside else ""
    inside = {name.removeprefix(below) for name in everything if name.startswith(below)}
    if not inside:
        raise ModelNotFoundError(
            f"the Hub repository {wanted.repo} has no {wanted.inside!r}; it holds {_listed(sorted(everything))}."
        )
    return [below + name for name in choose(inside, str(wanted))]


@dataclass(frozen=True)
class _Remote:
    commit: str
    size: int
    digest: str  # SHA-256 of a large file, git's SHA-1 of a small one


def _list_files(wanted: HubName) -> dict[str, _Remote] | None:
    """The repository's files as the Hub lists them; None where it cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
    from huggingface_hub.hf_api import RepoFile

    api = HfApi()
    try:
        commit = api.model_info(wanted.repo, revision=wanted.revision).sha
        tree = api.list_repo_tree(wanted.repo, recursive=True, revision=commit)
        return {
            entry.path: _Remote(commit or "", entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id)
            for entry in tree
            if isinstance(entry, RepoFile)
        }
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code >= 500:
            return None
        raise
    except (HTTPError, OfflineModeIsEnabled, ConnectionError, TimeoutError):
        return None


def _from_cache(wanted: HubName, choose: Choose, again: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        snapshot = Path(
            snapshot_download(
                wanted.repo, revision=wanted.revision, local_files_only=True, allow_patterns=["a name that no file has"]
            )
        )
        return _entry_in(snapshot, _pick(_names_in(snapshot), choose, wanted), wanted)
    except (OSError, ModelNotFoundError) as error:
        raise ModelNotFoundError(
            f"{wanted} is not in the cache, or not all of it, and the Hub cannot be reached: "
            + ("HF_HUB_OFFLINE=1 is set. Unset it" if _is_offline() else "connect to the network")
            + f" and {again}."
        ) from error


@contextmanager
def _explained(wanted: HubName) -> Iterator[None]:
    """The client's errors as sentences."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo = wanted.repo
    try:
        yield
    except GatedRepoError as error:
        raise ModelNotFoundError(
            f"the Hub repository {repo} is gated: accept its terms on its page, then `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise ModelNotFoundError(f"the Hub repository {repo} has no revision {wanted.revision!r}.") from error
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"there is no file, folder, run or Hub repository {repo!r}: check the name, or `hf auth login` where it is "
            "private."
        ) from error
    except HFValidationError as error:
        raise ModelNotFoundError(f"{str(wanted)!r} is no name of a Hub repository: {error}") from error
    except (LocalEntryNotFoundError, HTTPError, ConnectionError, TimeoutError) as error:
        raise ModelNotFoundError(
            f"the connection to the Hub broke while fetching {wanted} ({_first_line(error)}): run the same command "
            "again."
        ) from error
    except OSError as error:
        raise ModelNotFoundError(f"{wanted} could not be written to the Hub's cache ({error}).") from error


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _is_cached(repo: str, name: str, commit: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repo, name, revision=commit), str)


def _check_hash(path: Path, remote: _Remote, repo: str) -> None:
    """The client compares sizes alone. A file with other bytes than the Hub names is taken out of the cache again."""
    digest: Any = hashlib.sha256()
    if len(remote.digest) == 40:
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)  # as git names a file
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    if digest.hexdigest() != remote.digest:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise CheckpointError(
            f"{path.name} of {repo} arrived damaged: its hash is not the one that the Hub names. It was removed; run "
            "the same command again."
        )


def _escape(name: str) -> str:
    """A pattern that matches one name alone."""
    return re.sub(r"([\[*?])", r"[\1]", name)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
