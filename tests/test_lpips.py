"""LPIPS against recorded numbers of the lpips package, and its files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from golden import load_golden
from safetensors.torch import load_file, save_file
from torch import Tensor

from ditcli.codecs.reconstruct import perceptual_distance
from ditcli.errors import CheckpointError, ModelNotFoundError, SettingError
from ditcli.hub import find_lpips
from ditcli.models.lpips import LPIPS, SMALLEST, VGG_TAPS, load_lpips, squeezenet, vgg16

SQUEEZE = "squeezenet1_1_features_and_lpips_heads.safetensors"


def test_equals_the_lpips_package(shared: Path):
    tensors, about = load_golden(shared, "lpips_squeeze")
    lpips = load_lpips(shared / "weights" / "lpips_squeeze")
    found = perceptual_distance(lpips, tensors["in.ref_u8"], tensors["in.dist_u8"])
    tolerance = about["tolerance_max_abs"]["out.lpips_package"]
    torch.testing.assert_close(found, tensors["out.lpips_package"], atol=tolerance, rtol=0)
    pair = tensors["in.pair_140x90_u8"]
    found = perceptual_distance(lpips, pair[:1], pair[1:])
    torch.testing.assert_close(found, tensors["out.pair_140x90"][1:], atol=tolerance, rtol=0)


def test_one_file_or_one_for_each_part(shared: Path, tmp_path: Path):
    """As torchvision and the lpips package publish them."""
    whole = load_file(shared / "weights" / "lpips_squeeze" / SQUEEZE)
    parts = ({k: v for k, v in whole.items() if k.startswith(start)} for start in ("features", "lin"))
    network, heads = parts
    torch.save(network | {"classifier.1.bias": torch.zeros(1000)}, tmp_path / "squeezenet1_1-b8a52dc0.pth")
    torch.save(heads, tmp_path / "squeeze.pth")
    images = torch.rand(2, 3, 40, 48) * 2 - 1
    one, other = (load_lpips(path) for path in (shared / "weights" / "lpips_squeeze" / SQUEEZE, tmp_path))
    assert torch.equal(one(images, images.flip(-1)), other(images, images.flip(-1)))


def test_black_pictures_have_a_finite_gradient(shared: Path):
    """Where all features are 0 their length has no gradient, which must not become not-a-number."""
    lpips = load_lpips(shared / "weights" / "lpips_squeeze")
    with torch.no_grad():
        lpips.features[0].weight.zero_()
        lpips.features[0].bias.fill_(-1)  # nothing passes the first ReLU
    image = torch.zeros(1, 3, 32, 32, requires_grad=True)
    lpips(image, torch.rand(1, 3, 32, 32)).sum().backward()
    assert image.grad is not None
    assert torch.isfinite(image.grad).all()


def write_vgg(folder: Path) -> dict[str, Tensor]:
    """VGG-16 with a random set of weights, in two files, under the published names."""
    generator = torch.Generator().manual_seed(0)
    tensors, width = {}, 3
    shape = {0: 64, 2: 64, 5: 128, 7: 128, 10: 256, 12: 256, 14: 256, 17: 512, 19: 512, 21: 512, 24: 512, 26: 512}
    for layer, out in (shape | {28: 512}).items():
        scale = (2 / (9 * width)) ** 0.5
        tensors[f"features.{layer}.weight"] = torch.randn(out, width, 3, 3, generator=generator) * scale
        tensors[f"features.{layer}.bias"] = torch.randn(out, generator=generator) * 0.1
        width = out
    torch.save(tensors | {"classifier.0.bias": torch.zeros(4)}, folder / "vgg16-397923af.pth")
    heads = {
        f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1, generator=generator)
        for i, width in enumerate(VGG_TAPS.values())
    }
    torch.save(heads, folder / "vgg.pth")
    return tensors | heads


def test_vgg_is_the_papers_formula(tmp_path: Path):
    """Written out as in Zhang et al., equation 1: unit-length features after relu1_2 to relu5_3."""
    weights = write_vgg(tmp_path)
    lpips = load_lpips(tmp_path)
    assert lpips.name == "vgg"
    a, b = torch.rand(2, 2, 3, 36, 44, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    x = torch.cat([((image + 1) / 2 - mean) / std for image in (a, b)])
    expected = torch.zeros(2)
    stages = [(0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)]
    for stage, layers in enumerate(stages):
        x = F.max_pool2d(x, 2) if stage else x
        for layer in layers:
            x = F.relu(F.conv2d(x, weights[f"features.{layer}.weight"], weights[f"features.{layer}.bias"], padding=1))
        one, other = F.normalize(x, dim=1).chunk(2)
        expected += F.conv2d((one - other) ** 2, weights[f"lin{stage}.model.1.weight"]).mean(dim=(1, 2, 3))
    # The package's own constants (-0.030 / 0.458 and so on) are ImageNet's, rounded.
    torch.testing.assert_close(lpips(a, b), expected, atol=0, rtol=5e-3)
    assert lpips(a, a).tolist() == [0, 0]


@pytest.mark.parametrize("name", ["squeeze", "vgg"])
def test_the_smallest_picture_that_it_can_compare(name):
    lpips = LPIPS(name)
    least = SMALLEST[name]
    lpips.check_size(least)
    with torch.device("meta"):  # shapes alone
        network = squeezenet() if name == "squeeze" else vgg16()
        assert network(torch.empty(1, 3, least, least)).shape[2:] == (1, 1)
        with pytest.raises(RuntimeError, match="too small"):
            network(torch.empty(1, 3, least - 1, least - 1))
    with pytest.raises(SettingError, match=f"needs {least} at least.*--lpips none"):
        lpips.check_size(least - 1)


def test_missing_weights_say_which_and_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DITCLI_CACHE", str(tmp_path))
    with pytest.raises(ModelNotFoundError, match=r"squeezenet1_1-b8a52dc0\.pth.*--lpips none"):
        find_lpips(None)
    (tmp_path / "lpips").mkdir()
    assert find_lpips(None) == tmp_path / "lpips"
    with pytest.raises(ModelNotFoundError, match=r"squeezenet1_1-b8a52dc0\.pth.*--lpips none"):
        load_lpips(tmp_path / "lpips")


def test_another_or_a_damaged_file_is_refused(tmp_path: Path):
    save_file({"a": torch.zeros(3)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"a\.safetensors does not hold LPIPS.*features\.0\.weight"):
        load_lpips(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"b\.safetensors is damaged"):
        load_lpips(tmp_path / "b.safetensors")
    (tmp_path / "c.pth").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"c\.pth is damaged"):
        load_lpips(tmp_path / "c.pth")
