"""An extractor by the name that users give it, and the public Inception weights, fetched once."""

from __future__ import annotations

import urllib.request
from pathlib import Path

import torch

from ditcli.config import FidResize
from ditcli.data.latents import cache_folder
from ditcli.errors import DitcliError, SettingError
from ditcli.evaluation import inception
from ditcli.evaluation.dinov2 import Dinov2Features
from ditcli.evaluation.features import Extractor, OnnxFeatures, file_sha256
from ditcli.files import replacing
from ditcli.hub import find_dinov2
from ditcli.progress import progress, say

DINOV2 = "facebook/dinov2-large"  # the size of dgm-eval
SECONDS_TO_ANSWER = 20


def open_extractor(
    features: str, *, weights: str | None = None, resize: FidResize | None = None, device: torch.device | str = "cpu"
) -> Extractor:
    """`inception` or `dinov2`, with the weights named or the public ones, or the ONNX file of that name."""
    if features == "inception":
        path = find_weights(weights) if weights else fetch_weights()
        return inception.InceptionFeatures(path, resize=resize or "torch-fidelity", device=device)
    if features == "dinov2":
        return Dinov2Features(find_dinov2(weights or DINOV2), device=device)
    path = Path(features).expanduser()
    if not path.is_file():
        raise SettingError(
            f"features is {features!r}, but must be inception, dinov2 or an ONNX file, and there is no such file."
        )
    return OnnxFeatures(path)


def find_weights(name: str) -> Path:
    """A file of weights, or OWNER/REPOSITORY/FILE on the Hub, fetched once and cached."""
    path = Path(name).expanduser()
    if path.exists() or name.count("/") < 2 or name.startswith((".", "/", "~")):
        return path  # whose absence the reader reports
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    owner, repository, file = name.split("/", 2)
    try:
        return Path(hf_hub_download(f"{owner}/{repository}", file))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DitcliError(f"weights {name!r} is no file here, and the Hub does not give it: {reason}") from error


def fetch_weights() -> Path:
    """The public Inception weights: ours or another tool's in the cache, else downloaded and checked.

    DitcliError where no server gives them.
    """
    here = weights_at_hand()
    if here:
        return here
    ours = _our_weights()
    ours.parent.mkdir(parents=True, exist_ok=True)
    reasons = []
    for url in inception.PUBLIC_URLS:
        say(f"Fetching the Inception weights of 2015-12-05 (91 MB) from {url}")
        try:
            with replacing(ours) as partial:
                _download(url, partial)
                found = file_sha256(partial)
                if found != inception.PUBLIC_SHA256:
                    raise ValueError(f"another file, with sha256 {found[:16]}")
            return ours
        except (OSError, ValueError) as error:  # URLError and a broken connection are OSErrors
            reasons.append(f"{url}: {getattr(error, 'reason', None) or error}")
    raise DitcliError(
        f"the Inception weights cannot be fetched ({'; '.join(reasons)}). Bring {inception.PUBLIC_NAME} from another "
        "machine and give it with --weights, or score in other features with --features FILE.onnx."
    )


def weights_at_hand() -> Path | None:
    """The public Inception weights where they are on this machine, whole; nothing is fetched."""
    # Where pytorch-fid and torch-fidelity keep them, each under the name of its server.
    theirs = [Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2] for url in inception.PUBLIC_URLS]
    whole = (path for path in (_our_weights(), *theirs) if path.is_file())
    return next((path for path in whole if file_sha256(path) == inception.PUBLIC_SHA256), None)


def _our_weights() -> Path:
    return cache_folder() / "weights" / inception.PUBLIC_NAME


def _download(url: str, path: Path) -> None:
    with urllib.request.urlopen(url, timeout=SECONDS_TO_ANSWER) as answer, path.open("wb") as file:
        total = int(answer.headers.get("Content-Length", 0))
        with progress("downloading bytes", total) as advance:
            while block := answer.read(1 << 20):
                file.write(block)
                advance(len(block), "")
