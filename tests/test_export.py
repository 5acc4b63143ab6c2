"""ONNX files against the networks they were made of, and what they hold.

An export takes seconds, so that most of them are made once and vary in several things at a time.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import pytest
import torch
from exports import DIT, KL, PIXELS, TINY, make_latent_run, make_run
from onnx import TensorProto, numpy_helper
from test_dit import MODERN

import ditcli
from ditcli import export as exporting
from ditcli.codecs.autoencoder_kl import AutoencoderKL
from ditcli.codecs.folder import read_autoencoder, save_codec
from ditcli.config import Conditioning, ExportConfig, ModelConfig, SampleConfig
from ditcli.errors import DitcliError, SettingError
from ditcli.export import export_onnx
from ditcli.images import load_square
from ditcli.models.weights import load_dit
from ditcli.runs import RunDir
from ditcli.sampling import sample
from ditcli.sessions import open_session

# With each way of conditioning something else that an export may be asked for.
CHANGES = {
    "adaln-zero": {},
    "adaln": {"opset": 20},
    "cross-attention": {"ema": False},
    "in-context": {"opset": 21},  # and weights in a file of their own
}


@dataclass(frozen=True)
class Exported:
    run: RunDir
    path: Path


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> dict[str, Exported]:
    made = {}
    for conditioning, changes in CHANGES.items():
        parts = {} if conditioning == "adaln" else MODERN
        dit = dataclasses.replace(DIT, conditioning=conditioning, **parts)
        run = make_run(tmp_path_factory.mktemp(conditioning), dataclasses.replace(PIXELS, dit=dit))
        with pytest.MonkeyPatch.context() as patch:
            if conditioning == "in-context":
                patch.setattr(exporting, "EXTERNAL_ABOVE", 1000)
            made[conditioning] = Exported(run, export_onnx(ExportConfig(model=str(run.path), **changes)).files[0])
    return made


@pytest.fixture(scope="module")
def fp16(exported, tmp_path_factory) -> Exported:
    """The model of `exported["adaln-zero"]`, into a folder with what a larger export has left."""
    run, out = exported["adaln-zero"].run, tmp_path_factory.mktemp("fp16")
    (out / "denoiser.onnx.data").write_text("former")
    return Exported(run, export_onnx(ExportConfig(model=str(run.path), out=str(out), dtype="fp16")).files[0])


@pytest.fixture(scope="module")
def latent(tmp_path_factory) -> Exported:
    """A denoiser and the decoder beside it, in fp16 and opset 20."""
    run = make_latent_run(tmp_path_factory.mktemp("latent"), TINY)
    return Exported(run, export_onnx(ExportConfig(model=str(run.path), dtype="fp16", opset=20)).files[0])


def run_onnx(path: Path, **arrays: torch.Tensor) -> torch.Tensor:
    (output,) = open_session(path, "cpu").run(None, {name: array.numpy() for name, array in arrays.items()})
    assert output.dtype == np.float32
    return torch.from_numpy(output)


def difference(exported: Exported, *, ema: bool = True) -> float:
    """The largest difference from torch, at shapes that the exporter has not seen."""
    network, model = load_dit(exported.run.newest_checkpoint(), ema=ema)
    generator = torch.Generator().manual_seed(3)
    largest = 0.0
    for num, height, width in [(1, 2, 2), (5, 4, 14), (2, 16, 6), (4, 8, 8)]:
        x_t = torch.randn(num, model.dit.in_channels, height, width, generator=generator)
        t, labels = torch.linspace(0, 999, num), torch.arange(num) % 3
        with torch.no_grad():
            expected = network(x_t, t, labels)
        assert expected.abs().max() > 0.1
        largest = max(largest, (run_onnx(exported.path, x_t=x_t, t=t, labels=labels) - expected).abs().max().item())
    return largest


def decoder_difference(decoder: Path, vae: Path) -> float:
    network = read_autoencoder(vae).float()
    largest = 0.0
    for shape in [(1, 4, 3, 5), (3, 4, 8, 2)]:
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = network.decode(latents / network.config.scaling_factor + (network.config.shift_factor or 0.0))
        largest = max(largest, (run_onnx(decoder, latents=latents) - expected).abs().max().item())
    return largest


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.parametrize("conditioning", get_args(Conditioning))
def test_every_way_of_conditioning_equals_torch_at_every_shape(exported, conditioning):
    ema = CHANGES[conditioning].get("ema", True)
    assert difference(exported[conditioning], ema=ema) < 1e-5
    assert difference(exported[conditioning], ema=not ema) > 1e-2  # the other weights of the checkpoint
    onnx.checker.check_model(exported[conditioning].path, full_check=True)


def test_an_export_lies_in_its_run(exported):
    run, path = exported["adaln-zero"].run, exported["adaln-zero"].path
    assert path == run.path / "onnx" / "denoiser.onnx"
    assert list(path.parent.iterdir()) == [path]


def test_attention_is_one_node_from_opset_23_on(exported):
    for conditioning, version in [("adaln-zero", 23), ("adaln", 20), ("cross-attention", 23), ("in-context", 21)]:
        path = exported[conditioning].path
        attentions = DIT.depth * (2 if conditioning == "cross-attention" else 1)
        nodes = operators(path)
        wanted = (attentions, 0) if version >= 23 else (0, attentions)
        assert (nodes.count("Attention"), nodes.count("Softmax")) == wanted
        assert {entry.version for entry in onnx.load(path).opset_import if entry.domain == ""} == {version}


def test_large_weights_have_a_file_of_their_own(exported, fp16):
    path = exported["in-context"].path
    assert sorted(file.name for file in path.parent.iterdir()) == ["denoiser.onnx", "denoiser.onnx.data"]
    assert path.stat().st_size < exported["adaln-zero"].path.stat().st_size / 2
    assert list(fp16.path.parent.iterdir()) == [fp16.path]  # a small export clears what a large one left


def test_fp16_is_close_to_fp32_and_half_its_size(fp16, exported):
    assert 1e-6 < difference(fp16) < 1e-2
    weights = [
        sum(numpy_helper.to_array(tensor).nbytes for tensor in onnx.load(path).graph.initializer)
        for path in (fp16.path, exported["adaln-zero"].path)
    ]
    network, _ = load_dit(fp16.run.newest_checkpoint())
    in_fp32 = sum(parameter.nbytes for parameter in network.t_embedder.parameters())
    assert weights[0] == pytest.approx((weights[1] - in_fp32) / 2 + in_fp32, rel=0.02)


@pytest.mark.parametrize("name", ["fp16", "latent"])  # of opset 23 and of 20
def test_fp16_keeps_norms_softmax_and_time_in_fp32(name, request):
    model = onnx.shape_inference.infer_shapes(onnx.load(request.getfixturevalue(name).path))
    kinds = {value.name: value.type.tensor_type.elem_type for value in [*model.graph.value_info, *model.graph.input]}
    weights = {value.name: value.data_type for value in model.graph.initializer}
    kinds |= weights
    attentions = 0
    for node in model.graph.node:
        if node.op_type in ("LayerNormalization", "Softmax", "Sin", "Cos"):
            assert kinds[node.input[0]] == TensorProto.FLOAT, node.name
        if node.op_type == "Attention":
            assert {a.name: a.i for a in node.attribute}["softmax_precision"] == TensorProto.FLOAT
        attentions += node.op_type in ("Attention", "Softmax")
    assert attentions == DIT.depth
    assert {kind for key, kind in weights.items() if "t_embedder.mlp" in key} == {TensorProto.FLOAT}
    assert {kind for key, kind in weights.items() if "blocks." in key and "_norm" not in key} == {TensorProto.FLOAT16}
    assert {kind for key, kind in weights.items() if "_norm" in key} <= {TensorProto.FLOAT}


def test_weights_are_stored_once(exported):
    network, _ = load_dit(exported["adaln-zero"].run.newest_checkpoint())
    path = exported["adaln-zero"].path
    arrays = [numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer]
    parameters = sum(parameter.nbytes for parameter in network.parameters())
    assert parameters <= sum(array.nbytes for array in arrays) < 1.01 * parameters
    large = [array.tobytes() for array in arrays if array.nbytes > 256]
    assert len(set(large)) == len(large)
    assert path.stat().st_size < parameters + 60_000


def test_a_file_describes_itself_and_nothing_of_the_machine_it_was_made_on(exported):
    path = exported["adaln-zero"].path
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    modern = dataclasses.replace(PIXELS, dit=dataclasses.replace(DIT, **MODERN))
    assert ModelConfig.from_dict(json.loads(metadata["config"])) == modern
    assert (metadata["dtype"], metadata["ema"]) == ("fp32", "true")
    assert str(Path(ditcli.__file__).parent).encode() not in path.read_bytes()


def test_a_file_that_differs_is_removed_and_the_former_one_stays(tmp_path):
    run = make_run(tmp_path / "run", scale=1e6)  # in fp16 some of its weights are infinite
    out = tmp_path / "out"
    out.mkdir()
    (out / "denoiser.onnx").write_text("former")
    with pytest.raises(DitcliError, match=r"differs from torch by (nan|inf).*--dtype fp32"):
        export_onnx(ExportConfig(model=str(run.path), out=str(out), dtype="fp16"))
    assert [path.read_text() for path in out.iterdir()] == ["former"]


def test_the_decoder_equals_torch(latent):
    assert latent.path.with_name("decoder.onnx").is_file()
    assert difference(latent) < 1e-2
    assert 1e-6 < decoder_difference(latent.path.with_name("decoder.onnx"), latent.run.path.parent / "vae") < 1e-2


def test_the_decoder_of_another_vae(latent, tmp_path, caplog):
    torch.manual_seed(1)
    save_codec(AutoencoderKL(KL), tmp_path / "kl")
    config = ExportConfig(model=str(latent.run.path), vae=str(tmp_path / "kl"), out=str(tmp_path / "out"))
    _, decoder = export_onnx(config).files
    assert decoder_difference(decoder, tmp_path / "kl") < 1e-5
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_published_pipeline_exports_and_draws_the_same_picture(tmp_path, shared):
    """Its conventions, of frequencies, norms and time grid, go along."""
    pipeline = str(shared / "golden" / "diffusers_pipeline")
    exported = export_onnx(ExportConfig(model=pipeline, out=str(tmp_path / "onnx")))
    assert max(exported.differences) < 1e-4
    pictures = []
    for model in (pipeline, str(tmp_path / "onnx")):
        out = str(tmp_path / Path(model).name / "out")
        drawn = sample(SampleConfig(model=model, labels=("tench",), steps=10, out=out, device="cpu"))
        pictures.append(load_square(Path(drawn.images[0].path), 64).astype(int))
    assert np.abs(pictures[0] - pictures[1]).mean() < 1


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 1e-4), ("fp16", 1e-2)])
def test_real_decoders(latent, tmp_path, shared, dtype, bound):
    for vae in ("weights/taesd", "golden/autoencoderkl"):
        out = str(tmp_path / vae)
        config = ExportConfig(model=str(latent.run.path), vae=str(shared / vae), out=out, dtype=dtype)
        assert decoder_difference(export_onnx(config).files[1], shared / vae) < bound


def test_refusals(exported, tmp_path):
    run, path = exported["adaln-zero"].run, exported["adaln-zero"].path
    with pytest.raises(SettingError, match="opset is 19, but must be 20, 21, 22 or 23"):
        ExportConfig(opset=19)
    with pytest.raises(SettingError, match="is an ONNX export already"):
        export_onnx(ExportConfig(model=str(path.parent)))
    with pytest.raises(SettingError, match="works on pixels"):
        export_onnx(ExportConfig(model=str(run.path), vae="owner/vae"))
    (tmp_path / "file").write_text("")
    with pytest.raises(DitcliError, match="could not be written"):
        export_onnx(ExportConfig(model=str(run.path), out=str(tmp_path / "file" / "out")))
