"""The first thing a user runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ditcli.data.folders import open_dataset


def nearest_classes(pictures: np.ndarray, known: np.ndarray, labels: np.ndarray, num_neighbours: int = 5) -> np.ndarray:
    """The class that most of each picture's nearest neighbours are of."""
    distances = (pictures**2).sum(1)[:, None] - 2 * pictures @ known.T + (known**2).sum(1)
    nearest = labels[np.argsort(distances, axis=1)[:, :num_neighbours]]
    return np.array([np.bincount(row, minlength=10).argmax() for row in nearest])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_demo_draws_what_was_asked_for(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("DITCLI_CACHE", str(tmp_path / "cache"))
    done = subprocess.run([sys.executable, "-m", "ditcli", "demo"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grid = tmp_path / done.stdout.strip()
    with Image.open(grid) as picture:
        assert picture.width > 300
        assert picture.height > 600

    dataset = open_dataset("fashion-mnist")
    known = np.stack([dataset.load(i, 28)[:, :, 0] for i in range(len(dataset))]).reshape(-1, 784).astype(np.float64)
    drawn = sorted(grid.parent.glob("*_seed*.png"))
    pictures = np.stack([np.asarray(Image.open(path))[:, :, 0] for path in drawn]).reshape(-1, 784).astype(np.float64)
    asked = np.array([dataset.class_names.index(path.name.split("_seed")[0]) for path in drawn])
    assert len(drawn) == 80
    found = nearest_classes(pictures, known, dataset.labels)
    # On real pictures that classifier is right 8 times in 10: shirts, coats and pullovers are alike.
    right = float((found == asked).mean())
    print(json.dumps({"right": right}))
    assert right >= 0.6
