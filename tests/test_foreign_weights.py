"""Published weights: outputs equal those of the implementations they come from, and nothing else is taken."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import load_golden
from safetensors.torch import save_file

from ditcli.codecs.named import open_named_codec
from ditcli.config import DiffusionConfig, DiTConfig, ModelConfig
from ditcli.denoisers.torch_denoiser import as_denoiser
from ditcli.diffusion import samplers
from ditcli.diffusion.guidance import guide
from ditcli.diffusion.process import Diffusion
from ditcli.errors import CheckpointError, SettingError
from ditcli.info import count_flops, size_name
from ditcli.models.dit import DiT, sincos_positions
from ditcli.models.weights import load_dit
from ditcli.sampling import find_labels

SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}


def assert_near(value: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(value, expected, atol=tolerance, rtol=0)


def original_state(width: int = 384, depth: int = 1, side: int = 2) -> dict[str, torch.Tensor]:
    """A small state dict as facebookresearch/DiT saves it."""
    torch.manual_seed(0)
    config = DiTConfig(input_size=(2 * side,) * 2, width=width, depth=depth, num_heads=6, num_classes=3)
    positions = sincos_positions(side, side, width, torch.device("cpu"))[None]
    return {"pos_embed": positions} | DiT(config).state_dict()


# The original DiT and SiT


@torch.no_grad()
@pytest.mark.parametrize(
    ("file", "ema", "expected"),
    [
        ("dit_ckpt_train.pt", True, "out.forward"),
        ("dit_ckpt_train.pt", False, "out.forward_from_model_weights"),
        ("dit_ckpt_bare.pt", True, "out.forward"),
    ],
)
def test_original_files_equal_the_reference(shared, file, ema, expected):
    tensors, description = load_golden(shared, "dit_ckpt")
    model, config = load_dit(shared / "golden" / file, ema=ema)
    bound = description["tolerance_max_abs"]
    x, t, labels = tensors["in.x"], tensors["in.t"], tensors["in.y"]
    assert_near(model(x, t, labels), tensors[expected], bound[expected])
    assert config.diffusion == DiffusionConfig(learn_sigma=True, guided_channels=3)
    assert config.codec == "stabilityai/sd-vae-ft-ema"
    assert config.class_names == tuple("0123456789")
    if expected == "out.forward":
        guided = guide(as_denoiser(model, config, dtype=torch.float32), description["cfg_scale"])
        for i, step in enumerate(t.tolist()):  # a sampler's batch has one time
            output = guided(x[i : i + 1], (step + 1) / 1000, labels[i : i + 1])
            assert_near(output[:, :4], tensors["out.forward_with_cfg"][i : i + 1, :4], bound["out.forward_with_cfg"])


@torch.no_grad()
def test_a_sit_file_equals_the_reference(shared, tmp_path, capsys):
    tensors, description = load_golden(shared, "sit_transport")
    state = {key[2:]: value for key, value in tensors.items() if key.startswith("w.")}
    torch.save(state, tmp_path / "SiT-tiny.pt")
    args = argparse.Namespace(path_type="Linear", prediction="velocity", num_classes=10, vae="mse")
    torch.save({"model": {}, "ema": state, "opt": {}, "args": args}, tmp_path / "0000100.pt")
    bound = description["tolerance_max_abs"]
    for file in ("SiT-tiny.pt", "0000100.pt"):
        model, config = load_dit(tmp_path / file)
        denoiser, diffusion = as_denoiser(model, config, dtype=torch.float32), Diffusion(config.diffusion)
        t = 1 - tensors["in.t"].double().numpy()  # ours runs from data to noise
        data, noise, labels = tensors["in.x1_data"], tensors["in.x0_noise"], tensors["in.y"]
        assert_near(diffusion.add_noise(data, noise, t), tensors["out.x_t"], bound["out.x_t"])
        assert_near(diffusion.target(data, noise, t), tensors["out.u_t"], bound["out.u_t"])
        time = torch.from_numpy(diffusion.network_time(t)).float()
        assert_near(model(tensors["out.x_t"], time, labels)[:, :4], tensors["out.pred"], bound["out.pred"])
        for scale, expected in ((1.0, "out.ode_euler_n10"), (description["cfg_scale"], "out.ode_euler_cfg_n10")):
            steps: list[torch.Tensor] = []
            times = samplers.time_grid(diffusion.schedule, 9)  # ten points
            watch = lambda t, x: steps.append(x)  # noqa: E731, B023
            samplers.ddim(guide(denoiser, scale), tensors["in.z"], labels, times, noise=lambda: None, watch=watch)
            assert_near(torch.stack(steps), tensors[expected][1:], bound[expected])
    assert config.codec == "stabilityai/sd-vae-ft-mse"
    assert "taken for a SiT (linear path, velocity), by its name" in capsys.readouterr().err


def test_a_sit_of_another_kind_is_refused(tmp_path):
    args = argparse.Namespace(path_type="GVP", prediction="velocity")
    torch.save({"ema": original_state(), "args": args}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="path GVP and prediction velocity: only Linear velocity"):
        load_dit(tmp_path / "x.pt")


@torch.no_grad()
def test_original_weights_as_safetensors_and_in_half_precision(tmp_path):
    state = original_state()
    torch.save(state, tmp_path / "dit.pt")
    save_file({key: value.half() for key, value in state.items()}, tmp_path / "dit.safetensors")
    whole, config = load_dit(tmp_path / "dit.pt")
    half, also = load_dit(tmp_path / "dit.safetensors")
    assert config == also
    assert (config.dit.num_heads, config.image_size) == (6, 32)
    for name, value in whole.state_dict().items():
        assert half.state_dict()[name].dtype == torch.float32
        assert_near(half.state_dict()[name], value, 1e-3)


# diffusers


@torch.no_grad()
def test_a_diffusers_folder_equals_its_pipeline(shared):
    tensors, description = load_golden(shared, "diffusers_pipeline_expected")
    folder, bound = shared / "golden" / "diffusers_pipeline", description["tolerance_max_abs"]
    model, config = load_dit(folder)
    output = model(tensors["in.tf.x"], tensors["in.tf.t"], tensors["in.tf.y"])
    assert_near(output, tensors["out.transformer"], bound["out.transformer"])
    assert config.image_size == 64
    assert config.codec == os.path.abspath(folder)

    denoiser = as_denoiser(model, config, dtype=torch.float32)
    codec = open_named_codec(config.codec, device=torch.device("cpu"))
    times = samplers.time_grid(denoiser.diffusion.schedule, 10, config.diffusion.spacing)
    assert [round(t * 1000) - 1 for t in times[:-1]] == tensors["out.timesteps"].tolist()
    for scale, prefix in ((description["guidance_scale"], "out."), (1.0, "out.noguidance.")):
        steps: list[torch.Tensor] = []
        watch = lambda t, x: steps.append(x)  # noqa: E731, B023
        labels = tensors["in.class_labels"]
        x0 = samplers.ddim(
            guide(denoiser, scale), tensors["in.latents"], labels, times, noise=lambda: None, watch=watch
        )
        assert_near(x0, tensors[f"{prefix}latents_final"], bound[f"{prefix}latents_final"])
        picture = codec.decode(x0).float() / 255
        assert_near(picture, tensors[f"{prefix}image_0_1"], 0.5 / 255 + bound[f"{prefix}image_0_1"])
        if prefix == "out.":
            assert_near(torch.stack(steps), tensors["out.latents_each_step"], bound["out.latents_each_step"])


@torch.no_grad()
def test_the_same_weights_under_the_originals_keys_are_the_original(shared, tmp_path):
    """diffusers' DiT is not the original: the file's format decides the convention, not the weights."""
    tensors, description = load_golden(shared, "diffusers_pipeline_expected")
    torch.save({k[11:]: v for k, v in tensors.items() if k.startswith("official_w.")}, tmp_path / "dit.pt")
    model, _ = load_dit(tmp_path / "dit.pt")
    output = model(tensors["in.tf.x"], tensors["in.tf.t"], tensors["in.tf.y"])
    bound = description["tolerance_max_abs"]["out.official_dit_same_weights"]
    assert_near(output, tensors["out.official_dit_same_weights"], bound)
    assert (output - tensors["out.transformer"]).abs().max() > 0.1


@torch.no_grad()
def test_a_folder_that_diffusers_writes_equals_diffusers(tmp_path):
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "sample_size": 4, "patch_size": 2}
    theirs = DiTTransformer2DModel(**sizes, in_channels=4, out_channels=8, num_embeds_ada_norm=5)
    for block in theirs.transformer_blocks[1:]:  # published weights hold equal copies
        block.norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2)  # fmt: skip
    DiTPipeline(theirs.eval(), vae, DDIMScheduler(clip_sample=False)).save_pretrained(tmp_path / "new")
    DiTPipeline(theirs, vae, DDIMScheduler(clip_sample=False)).save_pretrained(
        tmp_path / "old", safe_serialization=False
    )
    config_file = tmp_path / "old" / "transformer" / "config.json"
    config_file.write_text(config_file.read_text().replace("DiTTransformer2DModel", "Transformer2DModel"))
    x, t, labels = torch.randn(3, 4, 4, 4), torch.tensor([0, 500, 999]), torch.tensor([0, 4, 5])
    for folder in ("new", "old"):  # safetensors, and the .bin of published repositories
        model, config = load_dit(tmp_path / folder)
        assert_near(model(x, t, labels), theirs(x, t, labels).sample, 1e-5)
        assert config.class_names == ("0", "1", "2", "3", "4")  # save_pretrained drops id2label
        assert config.image_size == 8
        open_named_codec(config.codec, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "model_index.json",
            {"_class_name": "StableDiffusionPipeline"},
            "is a StableDiffusionPipeline.*Understood are",
        ),
        ("transformer/config.json", {"_class_name": "PixArtTransformer2DModel"}, "is a PixArtTransformer2DModel"),
        ("transformer/config.json", {"activation_fn": "geglu"}, "activation_fn 'geglu', but only 'gelu-approximate'"),
        ("transformer/config.json", {"num_layers": 3}, r"missing transformer_blocks\.2\."),
        ("transformer/config.json", {"num_layers": 1}, r"unexpected transformer_blocks\.1\."),
        ("transformer/config.json", {"sample_size": "big"}, "is not understood"),
        (
            "scheduler/scheduler_config.json",
            {"beta_schedule": "scaled_linear"},
            "scheduler_config.json is not understood",
        ),
        ("scheduler/scheduler_config.json", {"beta_end": 0.012}, "betas from 0.0001 to 0.012"),
        ("scheduler/scheduler_config.json", {"clip_sample": True}, "clip_sample True, but only False"),
    ],
)
def test_other_folders_are_refused(shared, tmp_path, file, change, message):
    folder = tmp_path / "pipeline"
    shutil.copytree(shared / "golden" / "diffusers_pipeline", folder, copy_function=shutil.copyfile)
    path = folder / file
    values = json.loads(path.read_text()) | change
    path.unlink()
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=message):
        load_dit(folder)
    with pytest.raises(CheckpointError, match="leave --no-ema out"):
        load_dit(shared / "golden" / "diffusers_pipeline", ema=False)


# What is refused


class Malice:
    """Pickled, it is a call that makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("inside", [False, True])
def test_a_pickle_that_would_run_code_is_refused_and_nothing_runs(tmp_path, inside):
    trap = tmp_path / "trap"
    torch.save({"ema": original_state(), "args": Malice(trap)} if inside else Malice(trap), tmp_path / "x.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(Malice(trap), protocol=2))
    pickle.loads(pickle.dumps(Malice(trap)))  # it does what it says
    assert trap.exists()
    trap.rmdir()
    for name in ("x.pt", "old.pt"):
        with pytest.raises(CheckpointError, match=r"is refused, and nothing of it was run: it asks for posix.mkdir"):
            load_dit(tmp_path / name)
        assert not trap.exists()


def test_only_argparse_namespace_is_allowed_beside_tensors(tmp_path):
    torch.save({"ema": original_state(), "args": np.random.default_rng}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="is refused"):
        load_dit(tmp_path / "x.pt")
    torch.save({"ema": original_state(), "args": argparse.Namespace(num_classes=3)}, tmp_path / "x.pt")
    load_dit(tmp_path / "x.pt")


def test_other_checkpoints_are_refused_with_what_is_understood_and_the_keys(tmp_path):
    def refusal(contents: object) -> str:
        torch.save(contents, tmp_path / "x.pt")
        with pytest.raises(CheckpointError) as error:
            load_dit(tmp_path / "x.pt")
        return str(error.value)

    unet = refusal({"time_embed.0.weight": torch.zeros(3), "input_blocks.0.weight": torch.zeros(2)})
    assert "missing pos_embed, x_embedder.proj.weight" in unet
    assert "unexpected input_blocks.0.weight, time_embed.0.weight" in unet
    assert "Understood are checkpoints and runs of ditcli, diffusers' DiT pipeline folders" in unet
    state = original_state()
    assert "missing blocks.0.attn.qkv.bias" in refusal({k: v for k, v in state.items() if "qkv.bias" not in k})
    assert "unexpected blocks.0.extra" in refusal(state | {"blocks.0.extra": torch.zeros(1)})
    grown = state | {"final_layer.linear.bias": torch.zeros(7)}
    assert "of another shape final_layer.linear.bias (7,) instead of (32,)" in refusal(grown)
    assert "other positions than DiT's" in refusal(state | {"pos_embed": torch.zeros(1, 4, 384)})
    assert "holds no state dict" in refusal([1, 2, 3])
    assert "trained on 4 classes without a null class" in refusal(
        {"ema": state, "args": argparse.Namespace(num_classes=4)}
    )
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="one set of weights, which are its averaged ones: leave --no-ema out"):
        load_dit(tmp_path / "x.pt", ema=False)
    (tmp_path / "x.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"x\.pt is damaged"):
        load_dit(tmp_path / "x.pt")
    (tmp_path / "x.pt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"x\.pt is damaged"):
        load_dit(tmp_path / "x.pt")


# Conventions


def test_old_checkpoints_keep_the_reference_conventions():
    config = ModelConfig.from_dict(
        {
            "dit": {"num_classes": 0},
            "diffusion": {"schedule": "flow", "prediction": "flow"},
            "codec": "x",
            "image_size": 256,
        }
    )
    assert (config.dit.frequency_divisor, config.dit.mlp_norm_eps) == (128, 1e-6)
    assert Diffusion(config.diffusion).network_time(0.25) == 250


def test_a_reversed_flow_splits_as_the_straight_one_does():
    rng = np.random.default_rng(0)
    x0, eps = torch.from_numpy(rng.standard_normal((2, 3, 4, 4, 4)))
    straight = Diffusion(DiffusionConfig(schedule="flow", prediction="flow"))
    reverse = Diffusion(DiffusionConfig(schedule="flow", prediction="flow", time_scale=1.0, reversed_time=True))
    for t in (0.1, 0.5, 1.0):
        torch.testing.assert_close(reverse.target(x0, eps, t), -straight.target(x0, eps, t))
        for found, expected in zip(reverse.split(x0 - eps, x0 * (1 - t) + eps * t, t), (x0, eps), strict=True):
            torch.testing.assert_close(found, expected)
        assert reverse.network_time(t) == 1 - t
    with pytest.raises(SettingError, match="only the flow schedule has it"):
        DiffusionConfig(reversed_time=True)


def test_a_class_answers_to_each_of_its_names():
    names = ("tench, Tinca tinca", "crane #1", "crane #2", "jay, bird", "kite, bird")
    assert find_labels(["Tinca tinca"], names) == [0]
    assert find_labels(["tench, Tinca tinca"], names) == [0]
    assert find_labels(["tench,kite", "3"], names) == [0, 4, 3]
    with pytest.raises(SettingError, match="'bird'"):
        find_labels(["bird"], names)
    with pytest.raises(SettingError, match="Did you mean 'crane #"):
        find_labels(["crane"], names)


@pytest.mark.parametrize(("size", "gflops"), [("S", 6.06), ("B", 23.01), ("L", 80.71), ("XL", 118.64)])
def test_gflops_are_those_of_the_paper(size, gflops):
    """Table 1: models with patch size 2 on 32 x 32 latents."""
    depth, width, num_heads = SIZES[size]
    config = DiTConfig(width=width, depth=depth, num_heads=num_heads)
    with torch.device("meta"):
        network = DiT(config)
    assert count_flops(network) / 1e9 == pytest.approx(gflops, rel=0.01)
    assert size_name(config) == f"DiT-{size}/2"
