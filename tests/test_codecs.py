"""Codecs against diffusers' recorded numbers and diffusers itself, and the laws they keep."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import Tensor

from ditcli.codecs.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig, Upsample
from ditcli.codecs.autoencoder_tiny import AutoencoderTiny, AutoencoderTinyConfig
from ditcli.codecs.codec import Autoencoder, AutoencoderCodec, Codec
from ditcli.codecs.folder import WEIGHTS, open_codec, read_autoencoder, save_codec
from ditcli.codecs.pixels import PixelCodec
from ditcli.errors import CheckpointError, ModelNotFoundError

KL = AutoencoderKLConfig(block_out_channels=(8, 16), norm_num_groups=4, scaling_factor=0.5, shift_factor=0.1)
TINY = AutoencoderTinyConfig(
    encoder_block_out_channels=(8, 8),
    decoder_block_out_channels=(8, 8),
    num_encoder_blocks=(1, 2),
    num_decoder_blocks=(2, 1),
)


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small spend their time on waiting for the second thread: tenfold on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_network(config: AutoencoderKLConfig | AutoencoderTinyConfig) -> Autoencoder:
    torch.manual_seed(0)
    return AutoencoderKL(config) if isinstance(config, AutoencoderKLConfig) else AutoencoderTiny(config)


def make_images(num: int, height: int, width: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (num, 3, height, width), dtype=np.uint8))


def draw_picture(side: int) -> Tensor:
    """A face of discs on a shaded ground: (1, 3, side, side) uint8."""
    ramp = np.linspace(40, 220, side)
    ground = np.stack([ramp[:, None] + 0 * ramp, ramp + 0 * ramp[:, None], 255 - (ramp[:, None] + ramp) / 2], axis=2)
    picture = Image.fromarray(ground.astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    n = side / 16
    draw.ellipse((3 * n, 2 * n, 13 * n, 14 * n), fill=(226, 180, 150))
    draw.ellipse((5 * n, 6 * n, 7 * n, 7 * n), fill=(30, 60, 90))
    draw.ellipse((9 * n, 6 * n, 11 * n, 7 * n), fill=(30, 60, 90))
    draw.rectangle((6 * n, 11 * n, 10 * n, 12 * n), fill=(170, 40, 50))
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None]


def psnr(a: Tensor, b: Tensor) -> float:
    return 10 * math.log10(255**2 / (a.float() - b.float()).square().mean().item())


def read_golden(shared: Path, name: str) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Recorded tensors, and how far each may be missed."""
    tensors = load_file(shared / "golden" / f"{name}.safetensors")
    return tensors, json.loads((shared / "golden" / f"{name}.json").read_text())["tolerance_max_abs"]


def assert_near(value: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(value, expected, atol=tolerance, rtol=0)


# Against recorded numbers of diffusers


@pytest.mark.parametrize("folder", ["autoencoderkl", "autoencoderkl_legacy_keys"])
@torch.no_grad()
def test_autoencoder_kl_equals_golden(shared: Path, folder: str):
    expected, tolerance = read_golden(shared, "autoencoderkl_expected")
    network = read_autoencoder(shared / "golden" / folder)
    mean, logvar = network.encode(expected["in.image"]).chunk(2, dim=1)
    assert_near(mean, expected["out.encode_mean"], tolerance["out.encode_mean"])
    assert_near(logvar, expected["out.encode_logvar"], tolerance["out.encode_logvar"])
    assert_near((logvar / 2).exp(), expected["out.encode_std"], tolerance["out.encode_std"])
    assert_near(network.decode(expected["in.z"]), expected["out.decode"], tolerance["out.decode"])


@torch.no_grad()
def test_autoencoder_tiny_equals_golden(shared: Path):
    expected, tolerance = read_golden(shared, "autoencodertiny_expected")
    network = read_autoencoder(shared / "golden" / "autoencodertiny")
    assert_near(network.encode(expected["in.image"]), expected["out.encode"], tolerance["out.encode"])
    assert_near(network.decode(expected["in.z"]), expected["out.decode"], tolerance["out.decode"])


def test_real_taesd_equals_golden(shared: Path):
    expected, tolerance = read_golden(shared, "taesd_real_expected")
    codec = open_codec(shared / "weights" / "taesd")
    moments = codec.encode(expected["in.image_u8"])
    assert_near(moments, expected["out.encode"], tolerance["out.encode"])
    assert_near(codec.to_latents(moments), expected["out.encode"], tolerance["out.encode"])
    with torch.no_grad():
        images = (codec.network.decode(expected["out.encode"]) + 1) / 2
    assert_near(images.clamp(0, 1), expected["out.decode_0_1"], tolerance["out.decode_0_1"])
    # As uint8 at most half a level is lost to rounding.
    decoded = codec.decode(expected["out.encode"])
    assert_near(decoded / 255, expected["out.decode_0_1"], 0.5 / 255 + tolerance["out.decode_0_1"])


def test_bf16_is_close_to_fp32_on_real_weights(shared: Path):
    """40 dB is an error of 2.5 levels; measured here: 53 dB and more."""
    fp32 = open_codec(shared / "weights" / "taesd")
    bf16 = open_codec(shared / "weights" / "taesd", dtype=torch.bfloat16)
    assert bf16.fingerprint() != fp32.fingerprint()
    images = draw_picture(128)
    latents = fp32.to_latents(fp32.encode(images))
    decoded = fp32.decode(latents)
    assert psnr(decoded, images) > 20  # The picture is there at all.
    assert 40 < psnr(bf16.decode(latents), decoded) < 80  # and bfloat16 is really computed in.
    assert psnr(fp32.decode(bf16.to_latents(bf16.encode(images))), decoded) > 40


# Against diffusers itself


@pytest.fixture(scope="module")
def diffusers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("diffusers")
        module.AutoencoderKL, module.AutoencoderTiny  # noqa: B018  # Imported on first use, with warnings of their own.
    module.utils.logging.set_verbosity_error()
    return module


def assert_same_network(peer, network: Autoencoder, height: int, width: int) -> None:
    images = make_images(2, height, width).float() / 127.5 - 1
    peer.eval()
    with torch.no_grad():
        encoded = peer.encode(images)
        moments = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.parameters
        assert_near(network.encode(images), moments, 5e-5)
        z = moments[:, : peer.config.latent_channels]
        assert_near(network.decode(z), peer.decode(z).sample, 1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"latent_channels": 4, "layers_per_block": 2, "block_out_channels": [8, 16, 24], "norm_num_groups": 4},
        {  # As in Stable Diffusion 3 and Flux
            "latent_channels": 16,
            "block_out_channels": [8, 16],
            "norm_num_groups": 8,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "shift_factor": 0.0609,
            "scaling_factor": 1.5305,
        },
        {"block_out_channels": [16], "norm_num_groups": 2, "mid_block_add_attention": False},
    ],
)
def test_autoencoder_kl_equals_diffusers(diffusers, tmp_path: Path, settings: dict):
    torch.manual_seed(1)
    stages = len(settings["block_out_channels"])
    peer = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * stages, up_block_types=["UpDecoderBlock2D"] * stages, **settings
    )
    peer.save_pretrained(tmp_path / "theirs")
    network = read_autoencoder(tmp_path / "theirs")
    assert_same_network(peer, network, 16, 24)

    save_codec(network, tmp_path / "ours")
    again = diffusers.AutoencoderKL.from_pretrained(tmp_path / "ours")
    assert {k: v for k, v in again.config.items() if k[0] != "_"} == {
        k: v for k, v in peer.config.items() if k[0] != "_"
    }
    assert_same_network(again, network, 16, 24)


def test_autoencoder_tiny_equals_diffusers(diffusers, tmp_path: Path):
    torch.manual_seed(1)
    peer = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(12, 12, 12),
        num_encoder_blocks=(1, 2, 1),
        num_decoder_blocks=(2, 1, 1),
        latent_channels=5,
    )
    peer.save_pretrained(tmp_path / "theirs")
    network = read_autoencoder(tmp_path / "theirs")
    assert_same_network(peer, network, 16, 24)
    save_codec(network, tmp_path / "ours")
    assert_same_network(diffusers.AutoencoderTiny.from_pretrained(tmp_path / "ours"), network, 16, 24)


# Laws


def test_doubling_the_sides_is_a_nearest_resize_and_a_convolution():
    torch.manual_seed(0)
    upsample, images = Upsample(8).double(), torch.randn(2, 8, 5, 7).double()
    expected = upsample.conv(F.interpolate(images, scale_factor=2, mode="nearest"))
    assert (upsample(images) - expected).abs().max() < 1e-13


def test_pixels_lose_nothing():
    codec: Codec = PixelCodec()
    images = torch.arange(256, dtype=torch.uint8).expand(1, 3, 4, 256)
    moments = codec.encode(images)
    latents = codec.to_latents(moments, torch.randn(1, 3, 4, 256))
    assert moments.dtype == torch.uint8
    assert (latents.dtype, latents.min().item(), latents.max().item()) == (torch.float32, -1, 1)
    assert torch.equal(codec.decode(latents), images)
    assert torch.equal(codec.encode(images.flip(3)), moments.flip(3))
    assert codec.latent_shape(5, 7) == (3, 5, 7)


def test_decoding_saturates():
    assert PixelCodec().decode(torch.tensor([-9.0, -1.01, 1.01, 9.0]).reshape(1, 1, 1, 4)).tolist() == [
        [[[0, 0, 255, 255]]]
    ]


def test_to_latents_draws_from_the_clamped_gaussian():
    codec = AutoencoderCodec(make_network(KL), name="kl")
    mean = torch.full((1, 4, 2, 2), 2.0)
    eps = torch.full((1, 4, 2, 2), 0.25)

    def draw(logvar: float, eps: Tensor | None) -> float:
        latents = codec.to_latents(torch.cat([mean, torch.full_like(mean, logvar)], dim=1).half(), eps)
        assert latents.dtype == torch.float32
        assert latents.shape == mean.shape
        assert latents.unique().numel() == 1
        return latents[0, 0, 0, 0].item()

    log4 = float(torch.tensor(math.log(4)).half())
    assert draw(log4, None) == pytest.approx((2 - 0.1) * 0.5)
    assert draw(log4, eps) == pytest.approx((2 + math.exp(log4 / 2) * 0.25 - 0.1) * 0.5)
    assert draw(1000, eps) == pytest.approx((2 + math.exp(10) * 0.25 - 0.1) * 0.5)  # log-variance at most 20
    assert draw(-1000, eps * 1e7) == pytest.approx((2 + math.exp(-15) * 2.5e6 - 0.1) * 0.5)  # and at least -30


def test_latents_of_a_network_without_variance_are_its_moments():
    codec = AutoencoderCodec(make_network(TINY), name="tiny")
    moments = codec.encode(make_images(2, 8, 8))
    assert moments.shape == (2, *codec.latent_shape(8, 8))
    assert torch.equal(codec.to_latents(moments, torch.randn_like(moments)), moments)


def test_decode_undoes_shift_and_scale():
    """One network, two scales of its latents: the same pictures."""
    network = make_network(KL)
    unscaled = make_network(dataclasses.replace(KL, scaling_factor=1, shift_factor=None))
    unscaled.load_state_dict(network.state_dict())
    images = make_images(2, 16, 16)
    decoded = []
    for each in (network, unscaled):
        codec = AutoencoderCodec(each, name="kl")
        decoded.append(codec.decode(codec.to_latents(codec.encode(images))).int())
    assert decoded[0].unique().numel() > 50
    assert (decoded[0] - decoded[1]).abs().max() <= 1  # a level, where rounding falls the other way


@pytest.mark.parametrize("config", [KL, TINY])
def test_large_batches_pass_in_parts_and_change_nothing(config):
    codec = AutoencoderCodec(make_network(config), name="vae")
    sizes: list[int] = []
    codec.network.encoder.register_forward_pre_hook(lambda _, args: sizes.append(args[0][:, 0].numel()))
    images = make_images(70, 64, 64)
    moments = codec.encode(images)
    assert sum(sizes) == 70 * 64 * 64
    assert max(sizes) <= 2**18
    assert_near(moments[66:], codec.encode(images[66:]), 1e-5)
    latents = codec.to_latents(moments)[:5]
    assert torch.equal(codec.decode(latents)[3:], codec.decode(latents[3:]))  # to the bit, on a CPU
    assert codec.encode(images[:0]).shape == (0, *moments.shape[1:])
    assert codec.decode(latents[:0]).shape == (0, 3, 64, 64)


@pytest.mark.parametrize("config", [KL, TINY])
def test_every_weight_learns(config):
    network = make_network(config)
    images = make_images(1, 8, 8).float() / 127.5 - 1
    moments = network.encode(images)
    (network.decode(moments[:, :4]).square().mean() + moments.square().mean()).backward()
    assert [name for name, weight in network.named_parameters() if weight.grad is None or not weight.grad.any()] == []


def test_latents_may_be_trained_on():
    """Tensors of torch.inference_mode would be refused by backward."""
    codec = AutoencoderCodec(make_network(KL), name="kl")
    latents = codec.to_latents(codec.encode(make_images(1, 8, 8)))
    model = torch.nn.Conv2d(4, 4, 1)
    torch.nn.functional.mse_loss(model(latents), latents).backward()
    assert model.weight.grad.any()


def test_shapes_that_do_not_fit_are_named():
    codec = AutoencoderCodec(make_network(KL), name="my-vae")
    assert codec.latent_shape(6, 10) == (4, 3, 5)
    with pytest.raises(ValueError, match=r"11x6 does not fit the VAE my-vae.*multiple of 2, such as 12x6"):
        codec.latent_shape(6, 11)
    with pytest.raises(ValueError, match="such as 2x2"):
        codec.latent_shape(0, 1)
    with pytest.raises(ValueError, match="7x8 does not fit"):
        codec.encode(make_images(1, 8, 7))
    with pytest.raises(ValueError, match="must be uint8"):
        codec.encode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"must be \(N, 4, h, w\)"):
        codec.decode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"float16, but codecs compute in"):
        AutoencoderCodec(make_network(KL), name="kl", dtype=torch.float16)


# Folders


@pytest.mark.parametrize("config", [KL, TINY])
def test_saved_folder_opens_as_the_same_codec(tmp_path: Path, config):
    codec = AutoencoderCodec(make_network(config), name="vae")
    save_codec(codec.network, tmp_path / "my-vae")
    assert sorted(path.name for path in (tmp_path / "my-vae").iterdir()) == ["config.json", WEIGHTS]
    again = open_codec(tmp_path / "my-vae")
    assert again.name == "my-vae"
    assert again.config == config
    assert again.fingerprint() == codec.fingerprint()
    images = make_images(2, 16, 8)
    assert torch.equal(again.encode(images), codec.encode(images))


def test_fingerprint_follows_weights_and_settings(tmp_path: Path):
    network = make_network(KL)
    first = AutoencoderCodec(network, name="a").fingerprint()
    assert AutoencoderCodec(make_network(KL), name="b").fingerprint() == first
    assert AutoencoderCodec(make_network(KL), name="b", dtype=torch.bfloat16).fingerprint() != first
    other = dataclasses.replace(KL, scaling_factor=0.6)
    assert AutoencoderCodec(make_network(other), name="a").fingerprint() != first
    with torch.no_grad():
        network.decoder.conv_out.bias[0] += 1e-6
    assert AutoencoderCodec(network, name="a").fingerprint() != first


def test_weights_in_half_precision_and_under_other_names(tmp_path: Path):
    network = make_network(KL).to(torch.bfloat16)
    save_codec(network, tmp_path / "vae")
    (tmp_path / "vae" / WEIGHTS).rename(tmp_path / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    codec = open_codec(tmp_path)  # a pipeline's folder
    assert codec.network.decoder.conv_in.weight.dtype == torch.float32
    assert codec.fingerprint() == AutoencoderCodec(network, name="a").fingerprint()


def test_attention_may_be_named_and_shaped_as_of_old(tmp_path: Path):
    network = make_network(KL)
    save_codec(network, tmp_path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for key, weight in load_file(tmp_path / WEIGHTS).items():
        new = next((name for name in old if f".{name}.weight" in key or f".{name}.bias" in key), None)
        if new and key.endswith("weight"):
            weight = weight[:, :, None, None].contiguous()  # 1x1 convolutions, as in the first checkpoints
        state[key.replace(new, old[new]) if new else key] = weight
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in state
    save_file(state, tmp_path / WEIGHTS)
    again = read_autoencoder(tmp_path).state_dict()
    assert again.keys() == network.state_dict().keys()
    assert all(torch.equal(again[key], weight) for key, weight in network.state_dict().items())


def test_a_folder_that_is_no_vae_is_named(tmp_path: Path):
    with pytest.raises(ModelNotFoundError, match="nowhere does not exist"):
        open_codec(tmp_path / "nowhere")
    with pytest.raises(ModelNotFoundError, match="it holds nothing"):
        open_codec(tmp_path)
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(ModelNotFoundError, match=r"photo\.jpg is a file"):
        open_codec(tmp_path / "photo.jpg")
    with pytest.raises(
        ModelNotFoundError, match=r"is no VAE: neither it nor a vae/ in it has a config\.json; it holds photo\.jpg"
    ):
        open_codec(tmp_path)
    save_codec(make_network(KL), tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "weights.ckpt")
    with pytest.raises(ModelNotFoundError, match=f"no {WEIGHTS} beside it; it holds .*weights.ckpt"):
        open_codec(tmp_path)


@pytest.mark.parametrize(
    ("config", "changed", "message"),
    [
        (
            KL,
            {"_class_name": "AutoencoderKLWan"},
            "_class_name is 'AutoencoderKLWan'.*AutoencoderKL, AutoencoderTiny or VQModel",
        ),
        (KL, {"_class_name": None}, "_class_name is None"),
        (KL, {"latents_mean": [0.1] * 4}, "latents_mean is .*must be null"),
        (KL, {"latents_std": [0.1] * 4}, "latents_std is .*must be null"),
        (KL, {"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]}, "down_block_types is .*Attn"),
        (KL, {"up_block_types": ["UpDecoderBlock2D"]}, "up_block_types is"),
        (KL, {"act_fn": "gelu"}, "act_fn is 'gelu', but must be 'silu'"),
        (KL, {"in_channels": 4}, "in_channels is 4"),
        (KL, {"scaling_factor": None}, "scaling_factor is None"),
        (KL, {"norm_num_groups": 3}, "block_out_channels is .*multiples of norm_num_groups 3"),
        (KL, {"block_out_channels": 64}, "block_out_channels is 64, but must be a list"),
        (KL, {"latent_chanels": 4}, "unknown setting 'latent_chanels'.*Did you mean 'latent_channels'"),
        (TINY, {"act_fn": "gelu"}, "act_fn is 'gelu', but must be 'relu'"),
        (TINY, {"upsample_fn": "bilinear"}, "upsample_fn is 'bilinear'"),
        (TINY, {"upsampling_scaling_factor": 3}, "upsampling_scaling_factor is 3"),
        (TINY, {"block_out_channels": [8, 9]}, "block_out_channels is .*must equal decoder_block_out_channels"),
        (TINY, {"num_decoder_blocks": [1]}, "decoder_block_out_channels is .*as long as num_decoder_blocks"),
        (TINY, {"encoder_block_out_channels": [8, 16]}, "encoder_block_out_channels is .*same number for every stage"),
    ],
)
def test_a_setting_that_is_not_understood_is_refused_by_name(tmp_path: Path, config, changed: dict, message: str):
    save_codec(make_network(config), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(CheckpointError, match=message):
        open_codec(tmp_path)


def test_damaged_files_are_named(tmp_path: Path):
    save_codec(make_network(KL), tmp_path / "whole")
    config, weights = (tmp_path / "whole" / name for name in ("config.json", WEIGHTS))

    def broken(name: str) -> Path:
        return Path(shutil.copytree(tmp_path / "whole", tmp_path / name))

    cut = broken("cut")
    (cut / WEIGHTS).write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=f"{WEIGHTS} is damaged"):
        open_codec(cut)

    text = broken("text")
    (text / "config.json").write_text(config.read_text()[:-20])
    with pytest.raises(CheckpointError, match=r"config.json is not JSON"):
        open_codec(text)
    (text / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config.json holds no settings, but a list"):
        open_codec(text)

    other = broken("other")
    state = load_file(weights)
    state["decoder.extra"] = state.pop("decoder.conv_in.bias")
    state["encoder.conv_in.bias"] = torch.zeros(9)
    save_file(state, other / WEIGHTS)
    with pytest.raises(CheckpointError) as raised:
        open_codec(other)
    assert "decoder.conv_in.bias is missing" in str(raised.value)
    assert "decoder.extra is unexpected" in str(raised.value)
    assert "encoder.conv_in.bias is (9,) instead of (8,)" in str(raised.value)
