"""The DiT between convolutions: laws of the network, and its way through every command."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import pytest
import torch
from exports import PIXELS, make_run
from test_dit import inputs, random_dit

from ditcli.config import CONV_WIDTHS, Conditioning, DiTConfig, ExportConfig, SampleConfig, TrainConfig
from ditcli.errors import SettingError
from ditcli.export import export_onnx
from ditcli.images import load_square
from ditcli.info import describe
from ditcli.memory import bytes_per_image
from ditcli.models.conv import ConvDiT, make_network
from ditcli.models.dit import DiT
from ditcli.models.weights import load_dit
from ditcli.runs import RunDir, read_model_config
from ditcli.sampling import sample
from ditcli.sessions import open_session
from ditcli.training.train import train

TINY = DiTConfig(
    input_size=(16, 16), in_channels=3, out_channels=3, patch_size=2, width=32, depth=1, num_heads=2, num_classes=2,
    conv_widths=(8, 12, 4),
)  # fmt: skip
RUN = {
    "data": "fashion-mnist", "model": "conv-dit", "image_size": 28, "flip": False, "conv_widths": (16, 4),
    "patch_size": 1, "width": 32, "depth": 1, "num_heads": 2, "batch_size": 16, "steps": 4, "device": "cpu",
    "precision": "fp32", "sample_num": 1, "sample_steps": 2, "sample_every": 4, "lr": 1e-3,
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> RunDir:
    return train(TrainConfig(out=str(tmp_path_factory.mktemp("run") / "conv"), **RUN))


def test_pixels_reach_the_blocks_as_the_issue_says():
    """3 x 256 x 256 as 4 x 32 x 32, and the way back."""
    config = TrainConfig(data="x", model="conv-dit", depth=1).dit(input_shape=(3, 256, 256), num_classes=2)
    network = make_network(config)
    seen = []
    network.x_embedder.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    with torch.no_grad():
        output = network(torch.zeros(2, 3, 256, 256), torch.zeros(2), torch.zeros(2, dtype=torch.long))
    assert seen == [(2, 4, 32, 32)]
    assert output.shape == (2, 3, 256, 256)
    assert (config.stride, config.num_tokens, config.conv_widths) == (16, 256, CONV_WIDTHS)


@pytest.mark.parametrize("conditioning", get_args(Conditioning))
def test_shapes_labels_and_time(conditioning):
    network = random_dit(dataclasses.replace(TINY, conditioning=conditioning))
    assert isinstance(network, ConvDiT)
    x, t, labels = inputs(TINY, height=16, width=48)
    with torch.no_grad():
        output = network(x, t, labels)
        assert output.shape == x.shape
        assert not torch.allclose(output, network(x, t, (labels + 1) % 3), atol=1e-3)
        assert not torch.allclose(output, network(x, t + 50, labels), atol=1e-3)
        one = torch.cat([network(x[i : i + 1], t[i : i + 1], labels[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(output, one, rtol=1e-4, atol=1e-5)


def test_a_fresh_network_predicts_zero_and_every_parameter_learns():
    x, t, labels = inputs(TINY, height=16, width=16)
    assert make_network(TINY)(x, t, labels).abs().max() == 0
    network = random_dit(TINY)
    network(x, t, labels).square().sum().backward()
    assert [n for n, p in network.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []


def test_every_skip_carries_what_the_bottleneck_cannot():
    """With the DiT's output at zero the output still follows x, at each pixel and not in blocks of 8."""
    network = random_dit(TINY)
    for parameter in network.final_layer.parameters():
        parameter.data.zero_()
    x, t, labels = inputs(TINY, num=1, height=32, width=32)
    x.requires_grad_()
    network(x, t, labels)[0, 0, 16, 16].backward()
    assert x.grad is not None
    reach = x.grad[0].abs().sum(0).nonzero()
    assert 20 < len(reach) < 32 * 32  # a neighbourhood


def test_the_signal_keeps_its_size_on_its_way():
    """Fresh convolutions neither swell nor fade, whatever their number."""
    torch.manual_seed(0)
    network = make_network(dataclasses.replace(TINY, input_size=(64, 64), conv_widths=(32, 64, 64, 64, 4)))
    seen = {}

    def watch(name: str) -> None:
        network.get_submodule(name).register_forward_hook(lambda _, x, y: seen.update({name: y.std().item()}))

    for name in ("down.0", "down.4", "merge.0", "merge.4"):
        watch(name)
    network(torch.randn(2, 3, 64, 64), torch.zeros(2), torch.zeros(2, dtype=torch.long))
    assert all(0.3 < std < 3 for std in seen.values()), seen


def test_it_trains_and_a_checkpoint_knows_its_kind(trained):
    config = read_model_config(trained.newest_checkpoint())
    assert config.dit.conv_widths == (16, 4)
    assert (config.codec, config.diffusion.learn_sigma, config.diffusion.prediction) == ("pixels", False, "eps")
    network, _ = load_dit(trained.newest_checkpoint())
    assert isinstance(network, ConvDiT)
    assert isinstance(make_network(dataclasses.replace(config.dit, conv_widths=())), DiT)
    assert (trained.path / "samples" / "step-00000004.png").is_file()
    again = train(TrainConfig(out=str(trained.path), **RUN | {"steps": 6}))
    assert again.saved_steps() == [4, 6]
    assert describe(str(trained.path))["architecture"] == "conv-dit"


def test_it_learns():
    """A picture of two classes is told from noise: the loss of the mean is left far behind."""
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, conv_widths=(16, 4))
    network = make_network(config)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    stripes = torch.ones(2, 3, 16, 16)
    stripes[0, :, ::2] = -1
    stripes[1, :, :, ::2] = -1
    for _ in range(120):
        labels = torch.randint(0, 2, (16,))
        eps, t = torch.randn(16, 3, 16, 16), torch.rand(16)
        x_t = (1 - t)[:, None, None, None] * stripes[labels] + t[:, None, None, None] * eps
        loss = (network(x_t, 1000 * t, labels) - stripes[labels]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3  # 1 at the start


def test_all_commands_take_it(trained, tmp_path):
    """Sampled in torch and in ONNX Runtime, cached blocks too; scored; fine-tuned with adapters on its blocks."""
    exported = export_onnx(ExportConfig(model=str(trained.path), opset=20, out=str(tmp_path / "onnx")))
    assert max(exported.differences) < 1e-4
    pictures = []
    for name, changes in {"torch": {}, "onnx": {"model": str(tmp_path / "onnx")}, "cached": {"cache": 2}}.items():
        settings = {"model": str(trained.path), "labels": ("Bag",), "steps": 6, "num": 2, "device": "cpu"}
        drawn = sample(SampleConfig(**settings | {"out": str(tmp_path / name)} | changes))
        pictures.append(np.stack([load_square(Path(image.path), 28) for image in drawn.images]).astype(int))
    assert pictures[0].shape == (2, 28, 28, 3)
    assert np.abs(pictures[0] - pictures[1]).mean() < 1
    changes = {"from_": str(trained.path), "lora_rank": 2, "steps": 2, "out": str(tmp_path / "tuned")}
    tuned = train(TrainConfig(data="fashion-mnist", batch_size=4, flip=False, device="cpu", sample_every=0, **changes))
    assert read_model_config(tuned.newest_checkpoint()).dit.conv_widths == (16, 4)


def test_an_export_takes_every_size_that_the_strides_allow(tmp_path):
    model = dataclasses.replace(PIXELS, dit=TINY, image_size=16)
    run = make_run(tmp_path / "run", model)
    path = export_onnx(ExportConfig(model=str(run.path), dtype="fp16")).files[0]  # in fp32 `compare` sees to it, above
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert json.loads(metadata["config"])["dit"]["conv_widths"] == [8, 12, 4]
    network, _ = load_dit(run.newest_checkpoint())
    for num, height, width in [(1, 16, 16), (3, 48, 16), (2, 32, 64)]:
        x, t, labels = inputs(TINY, num, height, width)
        (found,) = open_session(path, "cpu").run(None, {"x_t": x.numpy(), "t": t.numpy(), "labels": labels.numpy()})
        with torch.no_grad():
            expected = network(x, t, labels).numpy()
        assert np.abs(expected).max() > 0.1
        assert np.abs(found - expected).max() < 1e-2


def test_settings():
    config = TrainConfig(data="x", model="conv-dit")
    assert (config.codec, config.image_size) == ("pixels", 256)
    assert TrainConfig(data="x", model="Conv-DiT", conv_widths=(32, 4), image_size=64).model_shape()["conv_widths"] == (
        32,
        4,
    )
    with pytest.raises(SettingError, match="image-size is 100, but must be a multiple of 16"):
        TrainConfig(data="x", model="conv-dit", image_size=100)
    with pytest.raises(SettingError, match="vae is 'owner/vae', but must be left out with --model conv-dit"):
        TrainConfig(data="x", model="conv-dit", vae="owner/vae")
    with pytest.raises(SettingError, match=r"conv-widths .* must be left out but with --model conv-dit"):
        TrainConfig(data="x", conv_widths=(32, 4))
    with pytest.raises(SettingError, match=r"conv-widths is .* must be positive whole numbers"):
        DiTConfig(conv_widths=(32, 0))
    plain = dataclasses.replace(TINY, conv_widths=(), patch_size=16)
    assert bytes_per_image(TINY) > bytes_per_image(plain) + 4 * TINY.conv_numbers
