"""The FID Inception network against pytorch-fid 0.3.0 and torch-fidelity 0.4.0, and extractors of other kinds.

The weights are not the public ones but are made from seeds, by the rule in the golden file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from golden import inception_state
from onnx import TensorProto, helper
from safetensors.numpy import load_file

from ditcli.errors import CheckpointError, DitcliError
from ditcli.evaluation import inception
from ditcli.evaluation.features import OnnxFeatures, file_sha256, result_name
from ditcli.evaluation.inception import InceptionFeatures, resize_like_tensorflow

GOLDEN = Path(__file__).parent / "golden"
RESIZES = {"torch-fidelity": "out.torch_fidelity_2048", "pytorch-fid": "out.pytorch_fid_2048"}


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return inception_state()


@pytest.fixture(scope="module")
def weights(state: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def extractor(weights: Path) -> InceptionFeatures:
    return InceptionFeatures(weights)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return load_file(GOLDEN / "fid_inception.safetensors")


def pictures(golden: dict[str, np.ndarray], indices: tuple[int, ...]) -> list[np.ndarray]:
    return [np.ascontiguousarray(golden[f"in.image{i}_u8"].transpose(1, 2, 0)) for i in indices]


def assert_features_equal(features: np.ndarray, expected: np.ndarray) -> None:
    """Within the golden tolerance: 1e-5 of each picture's norm, 5e-5 at most."""
    assert features.dtype == np.float32
    assert np.abs(features - expected).max() < 5e-5
    assert (np.linalg.norm(features - expected, axis=1) / np.linalg.norm(expected, axis=1)).max() < 1e-5


@pytest.mark.parametrize("resize", RESIZES)
def test_features_equal_the_reference(weights: Path, golden: dict[str, np.ndarray], resize: inception.Resize) -> None:
    features = InceptionFeatures(weights, resize=resize)(pictures(golden, (0, 2)))
    assert_features_equal(features, golden[RESIZES[resize]])


@pytest.mark.parametrize("resize", RESIZES)
def test_features_equal_the_reference_at_every_size(weights: Path, shared: Path, resize: inception.Resize) -> None:
    golden = load_file(shared / "golden" / "fid_inception.safetensors")
    features = InceptionFeatures(weights, resize=resize)(pictures(golden, (0, 1, 2, 3, 4, 5)))
    assert_features_equal(features, golden[RESIZES[resize]])


def test_resized_pixels_equal_torch_fidelity(shared: Path) -> None:
    golden = load_file(shared / "golden" / "fid_inception.safetensors")
    resized = resize_like_tensorflow(torch.from_numpy(pictures(golden, (1,))[0])[None])
    corner = resized[0, :8, :8].permute(2, 0, 1).numpy()
    np.testing.assert_array_equal(corner, golden["out.torch_fidelity_resized_corner_image1_0_255"])


def test_resize_to_the_same_size_changes_nothing() -> None:
    images = torch.randint(0, 256, (2, 299, 299, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(resize_like_tensorflow(images), images.float())


def test_logits_equal_torch_fidelity(extractor: InceptionFeatures, golden: dict[str, np.ndarray]) -> None:
    logits = extractor.logits(golden["out.torch_fidelity_2048"])
    np.testing.assert_allclose(logits, golden["out.torch_fidelity_logits_unbiased"], rtol=0, atol=3.8e-5)


def test_features_do_not_depend_on_the_batch_nor_on_the_layout(extractor: InceptionFeatures) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 40, 56, 3), dtype=np.uint8)
    together = extractor(images)
    alone = np.concatenate([extractor(image[None]) for image in images])
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(extractor(torch.from_numpy(images).permute(0, 3, 1, 2)), together)
    images.flags.writeable = False  # as Pillow's are
    np.testing.assert_array_equal(extractor(list(images)), together)


def test_safetensors_weights_give_the_same_features(
    extractor: InceptionFeatures, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    safetensors.torch.save_file(state, tmp_path / "inception.safetensors")
    images = np.random.default_rng(1).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    np.testing.assert_array_equal(InceptionFeatures(tmp_path / "inception.safetensors")(images), extractor(images))


def test_only_the_public_weights_give_fid(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sha256 = file_sha256(weights)
    assert result_name(InceptionFeatures(weights)) == f"FD (inception {sha256[:8]})"
    monkeypatch.setattr(inception, "PUBLIC_SHA256", sha256)
    assert result_name(InceptionFeatures(weights)) == "FID"


def test_the_public_name_needs_the_public_content(weights: Path, tmp_path: Path) -> None:
    copy = tmp_path / "weights-inception-2015-12-05-6726825d.pth"
    copy.symlink_to(weights)
    with pytest.raises(CheckpointError, match="not their content"):
        InceptionFeatures(copy)


def test_other_weights_are_refused_with_a_sentence(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    key = "Mixed_6b.branch7x7_1.conv.weight"
    missing = {k: v for k, v in state.items() if k != "Mixed_6d.branch7x7_2.bn.running_var"}

    for content, sentence in (
        (state | {"fc.weight": torch.zeros(1000, 2048)}, "torchvision's ImageNet weights"),
        ({"fc.weight": torch.zeros(1000, 512)}, "another network"),
        ([torch.zeros(1)], "another network"),
        (missing, "lacks 'Mixed_6d.branch7x7_2.bn.running_var'"),
        (state | {key: torch.zeros(160, 768, 1, 1)}, "not the Inception network"),
        (state | {"fc.weight": torch.zeros(10, 2048)}, "not the Inception network.*fc.weight"),
    ):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=sentence):
            InceptionFeatures(path)


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "ran",)  # type: ignore[return-value]

    path = tmp_path / "weights.pth"
    for name, content in {"text.pth": b"not found", "empty.pth": b"", "text.safetensors": b"not found"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match="no file of weights"):
            InceptionFeatures(tmp_path / name)
    torch.save({"fc.weight": Code()}, path)
    with pytest.raises(CheckpointError, match="no file of weights"):
        InceptionFeatures(path)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(CheckpointError, match="cannot be read"):
        InceptionFeatures(tmp_path / "missing.pth")


def test_an_unknown_resize_is_refused(weights: Path) -> None:
    with pytest.raises(ValueError, match="pytorch-fid"):
        InceptionFeatures(weights, resize="bicubic")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 8, 8, 3), np.float32),
        np.zeros((2, 3, 8, 8), np.uint8),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((0, 8, 8, 3), np.uint8),
        [],
    ],
    ids=["float", "NCHW", "one", "none", "empty"],
)
def test_pictures_of_another_form_are_refused(extractor: InceptionFeatures, images: np.ndarray) -> None:
    with pytest.raises(ValueError, match="pictures"):
        extractor(images)


def mean_colour(
    path: Path, shape: list[int | str], features: list[int | str], reduced: tuple[int, ...] = (2, 3)
) -> Path:
    """Write an ONNX file whose features are a picture's mean colour."""
    node = helper.make_node("ReduceMean", ["image", "axes"], ["features"], keepdims=0)
    graph = helper.make_graph(
        [node],
        "mean_colour",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, features)],
        [helper.make_tensor("axes", TensorProto.INT64, [len(reduced)], reduced)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("shape", [["n", 3, "h", "w"], [1, 3, "h", "w"], ["n", 3, 12, 20]], ids=str)
def test_an_onnx_file_sees_pictures_in_0_1(tmp_path: Path, shape: list[int | str]) -> None:
    extractor = OnnxFeatures(mean_colour(tmp_path / "colour.onnx", shape, [shape[0], 3]))
    images = np.random.default_rng(0).integers(0, 256, (5, 12, 20, 3), dtype=np.uint8)
    expected = images.mean(axis=(1, 2)) / 255
    assert (extractor.width, extractor.name, result_name(extractor)) == (3, "colour", "FD (colour)")
    np.testing.assert_allclose(extractor(images), expected, rtol=1e-5)
    np.testing.assert_allclose(extractor(torch.from_numpy(images).permute(0, 3, 1, 2)), expected, rtol=1e-5)


def test_an_onnx_file_of_fixed_size_sees_resized_pictures(tmp_path: Path) -> None:
    extractor = OnnxFeatures(mean_colour(tmp_path / "colour.onnx", ["n", 3, 12, 20], ["n", 3]))
    images = np.random.default_rng(0).integers(0, 256, (6, 48, 80, 3), dtype=np.uint8)
    # An antialiased resize keeps the mean colour of noise, but for rounding to uint8; point sampling is off by 0.02.
    np.testing.assert_allclose(extractor(images), images.mean(axis=(1, 2)) / 255, rtol=0, atol=0.003)
    mixed = [images[0], images[1, :24], images[2, :, :40]]
    np.testing.assert_array_equal(extractor(mixed), np.concatenate([extractor(image[None]) for image in mixed]))


def test_onnx_files_of_another_form_are_refused(tmp_path: Path) -> None:
    for shape, features, reduced, sentence in (
        (["n", 4, 8, 8], ["n", 4], (2, 3), "must map"),
        (["n", 3, 8, 8], ["n", 3, 8], (3,), "must map"),
        (["n", 3, "h", 8], ["n", "h"], (1, 3), "must map"),
        ([2, 3, 8, 8], [2, 3], (2, 3), "exactly 2 pictures"),
    ):
        with pytest.raises(DitcliError, match=sentence):
            OnnxFeatures(mean_colour(tmp_path / "other.onnx", shape, features, reduced))  # type: ignore[arg-type]
    (tmp_path / "text.onnx").write_text("not found")
    for name in ("text.onnx", "missing.onnx"):
        with pytest.raises(DitcliError, match="cannot be opened"):
            OnnxFeatures(tmp_path / name)
