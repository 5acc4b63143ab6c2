"""Many pictures as one .npz in the layout of ADM's evaluation suite, written so that a killed run can go on."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ditcli.errors import ResumeError
from ditcli.files import replacing, write_text

FACTS = "ditcli.json"


class PictureArchive:
    """`arr_0`, uint8 (N, H, W, 3), and `arr_1`, int64 (N,), where pictures have labels; facts beside them as JSON.

    Pictures are appended to a hidden file beside `path`, each whole before the next, and `finish` makes the .npz of it:
    whatever kills the process, the next one goes on after the last whole picture. Raises ResumeError where `path` was
    made, or begun, with other facts.
    """

    def __init__(self, path: Path, *, num: int, labels: Sequence[int] | None, facts: dict[str, Any]):
        self.path, self.num, self.labels = path, num, labels
        self.facts = json.loads(json.dumps(facts | {"num": num}))
        self._pixels = path.with_name(f".{path.name}.pixels")
        self._begun = path.with_name(f".{path.name}.json")
        self.shape: tuple[int, ...] | None = None
        self.done = self._find()

    def _find(self) -> int:
        """How many pictures are already there."""
        if self.path.exists():
            try:
                with zipfile.ZipFile(self.path) as file:
                    self._compare(json.loads(file.read(FACTS)), self.path)
            except (zipfile.BadZipFile, KeyError, ValueError) as error:
                raise ResumeError(
                    f"{self.path} exists and is not ditcli's: remove it or give another --out."
                ) from error
            return self.num
        if not self._begun.exists():
            self._pixels.unlink(missing_ok=True)
            return 0
        begun = json.loads(self._begun.read_text())
        self._compare(begun["facts"], self._begun)
        self.shape = tuple(begun["shape"])
        size = int(np.prod(self.shape))
        done = self._pixels.stat().st_size // size if self._pixels.exists() else 0
        if done:
            os.truncate(self._pixels, done * size)
        return done

    def _compare(self, facts: dict[str, Any], where: Path) -> None:
        changed = [key for key in self.facts.keys() | facts.keys() if self.facts.get(key) != facts.get(key)]
        if changed:
            differences = ", ".join(
                f"{key}: {facts.get(key)} there, {self.facts.get(key)} now" for key in sorted(changed)
            )
            raise ResumeError(
                f"{where} was made with other settings ({differences}): remove it, or give another --out."
            )

    def append(self, image: np.ndarray) -> None:
        """The next picture, uint8 (H, W, 3); all are of one shape."""
        if self.shape is None:
            self.shape = image.shape
            write_text(self._begun, json.dumps({"facts": self.facts, "shape": image.shape}))
        assert image.shape == self.shape
        assert image.dtype == np.uint8
        with self._pixels.open("ab", buffering=0) as file:
            file.write(np.ascontiguousarray(image).data)
        self.done += 1

    def finish(self) -> Path:
        """Pack what was appended into the .npz, which appears whole or not at all."""
        if self.path.exists():
            return self.path
        assert self.shape is not None
        assert self.done == self.num
        with replacing(self.path) as partial, zipfile.ZipFile(partial, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file, self._pixels.open("rb") as pixels:
                header = {"descr": "|u1", "fortran_order": False, "shape": (self.num, *self.shape)}
                np.lib.format.write_array_header_1_0(file, header)
                shutil.copyfileobj(pixels, file, 1 << 24)
            if self.labels is not None:
                with archive.open("arr_1.npy", "w") as file:
                    np.lib.format.write_array(file, np.array(self.labels, dtype=np.int64))
            archive.writestr(FACTS, json.dumps(self.facts, indent=2))
        self._begun.unlink()
        self._pixels.unlink()
        return self.path
