"""Use a `ditcli` as somebody would who has nothing else: as another user, from another folder, without a network.

    python scripts/smoke_test.py dist/ditcli
    python scripts/smoke_test.py dist/ditcli-onnx --runtime onnx
    python scripts/smoke_test.py .venv/bin/ditcli --user ""

The file is copied into a folder that nobody may write to. Started by root it runs as `--user`. Prints a line with the
seconds of each step, and ends with exit code 1 at the first that fails.
"""

from __future__ import annotations

import argparse
import os
import pwd
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TINY = "--pixels --image-size 28 --model DiT-S/4 --width 32 --depth 2 --num-heads 2 --batch-size 16 --sample-every 0"
TRAIN = f"train --data fashion-mnist {TINY} --steps 6 --device cpu"
MOST_SECONDS_OF_HELP = 0.15  # of the processor: others may be using the machine


class User:
    """Somebody with a home, a folder to work in and the executable in a folder that is read-only."""

    def __init__(self, executable: Path, place: Path, name: str):
        self.identity = pwd.getpwnam(name) if name else None
        self.home, self.work, self.bin = place / "home", place / "work", place / "bin"
        for folder in (self.home, self.work, self.bin):
            folder.mkdir()
            if self.identity:
                os.chown(folder, self.identity.pw_uid, self.identity.pw_gid)
        place.chmod(0o755)
        self.executable = self.bin / executable.name
        shutil.copy(executable, self.executable)
        self.executable.chmod(0o555)
        self.bin.chmod(0o555)

    def run(self, words: str, *, fails: bool = False) -> subprocess.CompletedProcess[str]:
        """The executable with these words; AssertionError with what it said where its exit code is not 0."""
        kept = {key: value for key, value in os.environ.items() if key in ("PATH", "LANG", "OMP_NUM_THREADS")}
        uid, gid = (self.identity.pw_uid, self.identity.pw_gid) if self.identity else (None, None)
        began = time.perf_counter()
        done = subprocess.run(
            [self.executable, *words.split()],
            cwd=self.work,
            env=kept | {"HOME": str(self.home), "HF_HUB_OFFLINE": "1"},
            user=uid,
            group=gid,
            extra_groups=[] if self.identity else None,
            capture_output=True,
            text=True,
        )
        print(f"{time.perf_counter() - began:8.2f} s  ditcli {words}", flush=True)
        assert bool(done.returncode) == fails, done.stdout + done.stderr
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def pictures(self, words: str) -> list[Path]:
        """What a command that draws has written."""
        paths = [self.work / line for line in self.run(words).stdout.split()]
        assert paths
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
        return paths


def check(executable: Path, place: Path, *, runtime: str, user: str) -> None:
    somebody = User(executable, place, user)
    version = somebody.run("--version").stdout  # the first start may unpack
    assert version.startswith("ditcli, version "), version
    assert "export-onnx" in somebody.run("--help").stdout
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    somebody.run("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < MOST_SECONDS_OF_HELP, f"{seconds:.3f} s of the processor for --help"

    assert len(somebody.pictures("sample --model demo --labels sneaker bag --cfg 3")) == 2
    if runtime == "onnx":
        told = somebody.run(TRAIN, fails=True).stderr
        assert "torch" in told, told
        return
    by_torch = "sample --model demo --labels bag --cfg 3 --backend torch --out torch"
    assert len(somebody.pictures(by_torch)) == 1
    somebody.run(f"{TRAIN} --out runs/one --num-workers 2")
    somebody.run(f"{TRAIN} --out runs/two --devices 2")
    somebody.pictures("sample --model runs/two --labels sneaker --steps 4")
    (denoiser,) = somebody.run("export-onnx --model runs/one").stdout.split()
    assert (somebody.work / denoiser).is_file()
    somebody.pictures("sample --model runs/one/onnx --labels sneaker --steps 4 --out onnx")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("executable", type=Path)
    parser.add_argument("--runtime", choices=("torch", "onnx"), default="torch")
    parser.add_argument("--user", default="nobody" if os.getuid() == 0 else "")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            check(arguments.executable, Path(folder), runtime=arguments.runtime, user=arguments.user)
        except AssertionError as failure:
            sys.exit(f"failed: {failure}")
        finally:
            (Path(folder) / "bin").chmod(0o755)
