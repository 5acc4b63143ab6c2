"""What users install: the wheel, the source archive, and the executables, used as somebody who has nothing else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path

import pytest

import ditcli

ROOT = Path(__file__).resolve().parents[1]
PYTHON = f"python{sys.version_info[0]}.{sys.version_info[1]}"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """The wheel and the source archive."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,), (archive,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, archive


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that other users may look into, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_the_wheel_holds_types_pictures_and_the_model(built):
    wheel, _ = built
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        facts = Parser().parsestr(archive.read(f"ditcli-{ditcli.__version__}.dist-info/METADATA").decode())
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "ditcli").rglob("*.py")}
    assert sources <= names
    data = ("data/fashion_mnist/train-images-idx3-ubyte.gz", "data/fashion_mnist/LICENSE")
    model = ("models/demo/model.safetensors", "models/demo/denoiser.onnx", "models/demo/config.json")
    assert {f"ditcli/{name}" for name in ("py.typed", *data, *model)} <= names
    assert not [name for name in names if name.startswith(("tests/", "scripts/"))]
    assert (facts["Name"], facts["Version"], facts["License-Expression"]) == ("ditcli", ditcli.__version__, "MIT")
    assert "Typing :: Typed" in facts.get_all("Classifier")
    assert facts.get_payload() == (ROOT / "README.md").read_text()
    assert wheel.stat().st_size < 10_000_000


def test_the_source_archive_holds_what_the_wheel_is_built_of_and_the_tests(built):
    _, source = built
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "tests/test_shipping.py"} <= names
    assert {"scripts/constraints.txt", "ditcli/py.typed"} <= names
    assert not [name for name in names if name.startswith((".", "build", "dist", "runs")) and name != ".gitignore"]


def others_may_run(file: Path) -> bool:
    return all(part.stat().st_mode & 0o001 for part in (file, *file.parents))


def smoke_test(executable: Path, runtime: str, pythons: list[Path]) -> None:
    """As another user, where one of these interpreters is everybody's."""
    user = [] if any(map(others_may_run, pythons)) else ["--user", ""]
    command = [sys.executable, ROOT / "scripts" / "smoke_test.py", executable, "--runtime", runtime, *user]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("what", [0, 1], ids=["wheel", "sdist"])
def test_it_installs_into_a_clean_environment_without_torch(built, what, public):
    """With the packages that the README names for that."""
    named = re.search(r"^    pip install (onnxruntime .+)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert named
    venv.create(public / "venv", with_pip=True)
    pip = [public / "venv" / "bin" / "python", "-m", "pip", "install", "--quiet"]
    environment = os.environ | {"PIP_CONSTRAINT": str(ROOT / "scripts" / "constraints.txt")}
    subprocess.run([*pip, *named[1].split()], env=environment, check=True)
    subprocess.run([*pip, "--no-deps", built[what]], env=environment, check=True)
    smoke_test(public / "venv" / "bin" / "ditcli", "onnx", [Path(sys.executable).resolve()])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("runtime", ["onnx", "torch"])
def test_one_file_serves_another_user(runtime):
    words = [] if runtime == "torch" else ["--runtime", "onnx"]
    environment = os.environ | {"PYTHON": str(Path(sys.executable).resolve())}
    subprocess.run(["bash", ROOT / "scripts" / "build_executable.sh", *words], env=environment, check=True)
    executable = ROOT / "dist" / ("ditcli" if runtime == "torch" else "ditcli-onnx")
    pythons = [Path(folder) / PYTHON for folder in os.get_exec_path()]
    smoke_test(executable, runtime, [python for python in pythons if python.is_file()])
    if runtime == "onnx":
        assert executable.stat().st_size < 100_000_000
