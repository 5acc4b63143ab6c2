"""Make the embedded model, ditcli/models/demo, of a run of `ditcli train`: scripts/train_embedded.sh calls it.

    python scripts/embed_model.py runs/embedded

Three files. `model.safetensors` is a checkpoint with the averaged weights in fp16. `denoiser.onnx` is the graph alone:
its weights are the bytes of that checkpoint, so that both runtimes draw from what is stored once. `config.json` has the
run's settings and the score of its samples: the share of them that a classifier by the five nearest of the embedded
pictures reads as what was asked for, beside its share of right answers for those pictures (each without itself).
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file

from ditcli import hub
from ditcli.config import ExportConfig, SampleConfig
from ditcli.data.folders import open_dataset
from ditcli.denoisers.opening import open_model
from ditcli.export import compare, denoiser_part, export_onnx
from ditcli.models.files import write_tensors
from ditcli.models.weights import load_dit
from ditcli.runs import DENOISER, FORMAT, RunDir, read_model_config
from ditcli.sampling import draw

MAX_BYTES = 6_000_000
PER_CLASS, CFG, STEPS = 40, 3.0, 50  # of the score


def embed(run: RunDir, folder: Path) -> None:
    """The three files of a run's last checkpoint, or none where they are too large or the runtimes differ."""
    checkpoint = run.newest_checkpoint()
    config = read_model_config(checkpoint)
    with tempfile.TemporaryDirectory() as partial:
        weights = Path(partial) / hub.SHARED_MODEL
        halves = {name: value.half() for name, value in load_file(checkpoint).items()}
        write_tensors(weights, halves, {"format": FORMAT, "config": json.dumps(config.to_dict())})
        export_onnx(ExportConfig(model=str(weights), out=f"{partial}/onnx"))
        graph = onnx.load(f"{partial}/onnx/{DENOISER}")
        share_weights(graph, weights)
        onnx.save(graph, f"{partial}/{DENOISER}")
        network, _ = load_dit(weights)
        difference = compare(Path(partial) / DENOISER, denoiser_part(network, config), "fp32")
        assert difference < 1e-4, f"ONNX Runtime differs from torch by {difference}"
        size = sum((Path(partial) / name).stat().st_size for name in (hub.SHARED_MODEL, DENOISER))
        assert size <= MAX_BYTES, f"{size:,} bytes are more than {MAX_BYTES:,}"
        settings = run.read_config()
        facts = {key: settings[key] for key in ("train", "model", "data", "device", "versions")}
        facts["model"]["step"] = config.step
        (Path(partial) / "config.json").write_text(json.dumps(facts, indent=2) + "\n")
        folder.mkdir(exist_ok=True)
        for name in (hub.SHARED_MODEL, DENOISER, "config.json"):
            shutil.copyfile(f"{partial}/{name}", folder / name)
    print(f"{folder}: {size:,} bytes, ONNX Runtime within {difference:.1e} of torch")


def share_weights(model: onnx.ModelProto, weights: Path) -> None:
    """Let each weight of the graph be the fp16 bytes of the same one in the safetensors file beside it.

    The exporter keeps a weight or stores its transpose; a runtime turns both into fp32 once, when it loads them. The
    file's format: the header's length as 8 bytes, the header in JSON with each tensor's offsets behind it, the tensors.
    """
    raw = weights.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    places = json.loads(raw[8:start])
    tensors = {name: value.numpy() for name, value in load_file(weights).items()}
    graph, nodes, kept = model.graph, [], []
    for initializer in graph.initializer:
        value = numpy_helper.to_array(initializer)
        same = (name for name, tensor in tensors.items() if is_same(value, tensor) or is_same(value, tensor.T))
        name = next(same, None) if value.dtype == np.float32 and value.size > 1 else None
        if name is None:
            kept.append(initializer)
            continue
        tensor = tensors.pop(name)
        half = TensorProto(name=f"{name}.half", data_type=TensorProto.FLOAT16, dims=tensor.shape)
        half.data_location = TensorProto.EXTERNAL
        begin, end = places[name]["data_offsets"]
        for key, text in {"location": weights.name, "offset": start + begin, "length": end - begin}.items():
            half.external_data.add(key=key, value=str(text))
        kept.append(half)
        turned = not is_same(value, tensor)
        whole = f"{name}.whole" if turned else initializer.name
        nodes.append(helper.make_node("Cast", [half.name], [whole], to=TensorProto.FLOAT))
        if turned:
            nodes.append(helper.make_node("Transpose", [whole], [initializer.name]))
    assert not tensors, f"the graph has no {', '.join(tensors)}"
    nodes += graph.node
    for field, values in ((graph.initializer, kept), (graph.node, nodes)):
        del field[:]
        field.extend(values)


def is_same(value: np.ndarray, half: np.ndarray) -> bool:
    return value.shape == half.shape and bool((value == half.astype(np.float32)).all())


def score(denoiser_file: Path) -> dict[str, float | int]:
    """How many of the model's samples, and of the pictures it learnt from, are read as what they are meant to be."""
    denoiser, decode, model = open_model(denoiser_file, SampleConfig())
    asked = np.repeat(np.arange(len(model.class_names)), PER_CLASS)
    seeds = list(range(PER_CLASS)) * len(model.class_names)
    images = draw(denoiser, decode, labels=list(asked), seeds=seeds, cfg=CFG, steps=STEPS, batch_size=50)
    drawn = np.stack([image[:, :, 0].ravel() for image in images]).astype(np.float64)
    dataset = open_dataset("fashion-mnist")
    known = np.stack([dataset.load(i, 28)[:, :, 0].ravel() for i in range(len(dataset))]).astype(np.float64)
    assert dataset.labels is not None
    return {
        "samples": len(drawn),
        "cfg": CFG,
        "steps": STEPS,
        "read_as_asked": round(float((nearest_classes(drawn, known, dataset.labels) == asked).mean()), 4),
        "real_read_as_labelled": round(
            float((nearest_classes(known, known, dataset.labels, itself=True) == dataset.labels).mean()), 4
        ),
    }


def nearest_classes(
    pictures: np.ndarray, known: np.ndarray, labels: np.ndarray, *, num: int = 5, itself: bool = False
) -> np.ndarray:
    """The class that most of each picture's nearest neighbours are of; with `itself` all but the very nearest count."""
    distances = (pictures**2).sum(1)[:, None] - 2 * pictures @ known.T + (known**2).sum(1)
    nearest = labels[np.argsort(distances, axis=1)[:, int(itself) : num + int(itself)]]
    return np.array([np.bincount(row, minlength=labels.max() + 1).argmax() for row in nearest])


def main(run: Path, folder: Path) -> None:
    embed(RunDir(run), folder)
    config_file = folder / "config.json"
    facts = json.loads(config_file.read_text()) | {"score": score(folder / DENOISER)}
    config_file.write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts["score"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else hub.EMBEDDED_MODEL.parent)
