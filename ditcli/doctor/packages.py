"""Python, and the versions of the packages against what ditcli needs and what its tests ran with."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import ditcli
from ditcli.doctor.findings import Finding, error, ok, warning

PACKAGE = Path(ditcli.__file__).parent
# In a wheel beside the code, in a checkout where the scripts are.
PINS = (PACKAGE / "constraints.txt", PACKAGE.parent / "scripts" / "constraints.txt")
# Either will do, and a machine has at most one of them.
SAME = {"onnxruntime-gpu": "onnxruntime", "onnxruntime": "onnxruntime-gpu"}


def check_python() -> Iterator[Finding]:
    version = platform.python_version()
    yield ok("python", f"{version} on {platform.system()} {platform.machine()}, {sys.executable}")
    yield ok("ditcli", f"{ditcli.__version__}, {PACKAGE}")


def check_packages() -> Iterator[Finding]:
    """Each requirement of ditcli: there, in its range, and as tested."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    try:
        requirements = [Requirement(text) for text in metadata.requires("ditcli") or ()]
    except metadata.PackageNotFoundError:
        yield warning("packages", "ditcli is run from its source", "Install it: `pip install -e .` in its folder.")
        return
    pins, missing, others, fitting = read_pins(), [], [], 0
    for requirement in requirements:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        name = requirement.name
        version = installed(name) or installed(SAME.get(name, name))
        if version is None:
            missing.append(name)
        elif not requirement.specifier.contains(version, prereleases=True):
            wanted = f"{name}{requirement.specifier}"
            yield error("packages", f"{name} is {version}, but {wanted} is needed", f"`pip install '{wanted}'`")
        elif name in pins and Version(version).public != pins[name]:
            others.append(f"{name} {version} ({pins[name]})")
        else:
            fitting += 1
    if missing:
        left = "sampling from exported models works without them" if "torch" in missing else "what needs them fails"
        yield warning("packages", f"not installed: {', '.join(missing)}; {left}", f"`pip install {' '.join(missing)}`")
    if others:
        found = f"{fitting} as tested, but others than the tested ones are {', '.join(others)}"
        yield warning("packages", found, f"If something fails: `pip install -c {pins_file()} ditcli`.")
    else:
        yield ok("packages", f"{fitting} required, in the versions of the tests")


def installed(name: str) -> str | None:
    """The version of a package, None where it is not there."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def pins_file() -> Path:
    return next(path for path in PINS if path.is_file())


def read_pins() -> dict[str, str]:
    """Package -> the version that the tests ran with."""
    lines = [line.partition("#")[0].strip() for line in pins_file().read_text().splitlines()]
    pairs = [line.partition("==") for line in lines if "==" in line]
    return {name.strip().lower().replace("_", "-"): version.strip() for name, _, version in pairs}
