"""Room on the disks, and the way to the Hub."""

from __future__ import annotations

import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from ditcli.doctor.findings import Finding, error, ok, warning
from ditcli.hub import cache_folder

SECONDS = 5.0
# A checkpoint of DiT-XL/2 with its training state takes 10.8 GB, one of DiT-S/2 half a GB.
LITTLE, TOO_LITTLE = 20e9, 1e9


def check_disk() -> Iterator[Finding]:
    """The working folder, where runs go, ditcli's cache and the folder of temporary files."""
    places = {
        "disk": (Path.cwd(), "Change to another folder, or give --out."),
        "cache": (cache_folder(), "Set DITCLI_CACHE to a folder that is."),
        "temporary": (Path(tempfile.gettempdir()), "Set TMPDIR to a folder that is."),
    }
    for name, (folder, remedy) in places.items():
        there = next(place for place in (folder, *folder.resolve().parents) if place.is_dir())
        free = shutil.disk_usage(there).free
        found = f"{folder}, {free / 1e9:,.1f} GB free"
        try:
            with tempfile.TemporaryFile(dir=there) as file:
                file.write(b"x")
        except OSError as problem:
            yield error(name, f"{folder} is not writable: {problem.strerror}", remedy)
            continue
        if free < TOO_LITTLE:
            yield error(name, found, f"Make room, {remedy[0].lower()}{remedy[1:]}")
        elif free < LITTLE:
            yield warning(name, found, "Checkpoints of large models take 10 GB each: see --keep-checkpoints.")
        else:
            yield ok(name, found)


def check_hub() -> Iterator[Finding]:
    """Whether the Hub answers, and what of it is cached."""
    try:
        from huggingface_hub import constants, scan_cache_dir
        from huggingface_hub.errors import CacheNotFound
    except ModuleNotFoundError:
        yield warning("hub", "huggingface-hub is not installed: local models only", "`pip install huggingface-hub`")
        return
    try:
        cached = scan_cache_dir()
        what = f"{len(cached.repos)} repositories, {cached.size_on_disk / 1e9:,.1f} GB"
    except CacheNotFound:
        what = "nothing yet"
    yield ok("hub cache", f"{constants.HF_HUB_CACHE}, {what}")
    if constants.HF_HUB_OFFLINE:
        yield warning("hub", "HF_HUB_OFFLINE=1 is set: only what is cached is found", "Unset it to fetch models.")
        return
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD", headers={"User-Agent": "ditcli"})
    try:
        with urllib.request.urlopen(request, timeout=SECONDS):
            pass
    except urllib.error.HTTPError as problem:
        if problem.code >= 500:
            yield warning("hub", f"{constants.ENDPOINT} answers {problem.code}", "Try again later.")
            return
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "reason", problem)
        remedy = "Local models work. To fetch others see to the network, HTTPS_PROXY and HF_ENDPOINT."
        yield warning("hub", f"{constants.ENDPOINT} cannot be reached: {reason}", remedy)
        return
    yield ok("hub", f"{constants.ENDPOINT} answers")
