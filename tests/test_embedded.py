"""The model that comes with the package: two runtimes, one copy of its weights, and pictures of what was asked for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import torch
from exports import make_run
from PIL import Image

from ditcli import hub
from ditcli.config import SampleConfig
from ditcli.models.weights import load_dit
from ditcli.runs import DENOISER
from ditcli.sampling import sample

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
FOLDER = hub.EMBEDDED_MODEL.parent


def draw(out: Path, **changes) -> np.ndarray:
    settings = {"model": "demo", "labels": ("sneaker", "bag"), "cfg": 3, "steps": 12, "device": "cpu"} | changes
    samples = sample(SampleConfig.from_dict(settings | {"out": str(out)}))
    return np.stack([np.asarray(Image.open(image.path)) for image in samples.images]).astype(int)


def test_its_graph_reads_the_weights_of_its_checkpoint(tmp_path, monkeypatch):
    """Of a small one, made by the script that makes the embedded one."""
    run = make_run(tmp_path / "run")
    config = json.loads(run.config_file.read_text()) | {"train": {}, "data": {}, "device": "cpu", "versions": {}}
    run.config_file.write_text(json.dumps(config))
    monkeypatch.syspath_prepend(SCRIPTS)
    from embed_model import embed

    embed(run, tmp_path / "demo")
    graph = onnx.load(tmp_path / "demo" / DENOISER, load_external_data=False).graph
    assert sum(len(tensor.raw_data) for tensor in graph.initializer) < 5000
    places = {entry.value for tensor in graph.initializer for entry in tensor.external_data if entry.key == "location"}
    assert places == {hub.SHARED_MODEL}

    by_torch = draw(tmp_path / "a", model=str(tmp_path / "demo" / hub.SHARED_MODEL), labels=(), num=3)
    by_onnx = draw(tmp_path / "b", model=str(tmp_path / "demo"), labels=(), num=3)
    assert by_torch.std() > 20
    assert np.abs(by_torch - by_onnx).max() <= 1
    network, _ = load_dit(tmp_path / "demo" / hub.SHARED_MODEL)
    raw, _ = load_dit(run.newest_checkpoint())
    for name, value in network.state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, raw.state_dict()[name].half().float(), rtol=0, atol=0)
