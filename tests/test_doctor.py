"""`ditcli doctor` on this machine, and on what is wrong with others."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from console import ditcli, without_rights
from hub_server import serve

from ditcli.doctor import packages, places, runtime, speed
from ditcli.doctor.findings import Finding

ROOT = Path(__file__).resolve().parents[1]


def pretend(folder: Path, name: str, version: str) -> None:
    """Install a distribution that has metadata alone."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def by_name(findings) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_a_line_for_each_thing_and_a_remedy_for_what_is_wrong(capfd, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DITCLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    report = ditcli(capfd, "doctor", "--no-speed", "--json")
    checks = json.loads(report.out)["checks"]
    names = [check["name"] for check in checks]
    wanted = ["python", "ditcli", "packages", "cpu", "memory", "driver", "torch", "onnxruntime", "disk", "cache", "hub"]
    assert [name for name in names if name in wanted] == wanted
    for check in checks:
        assert check["status"] in ("ok", "warning", "error")
        assert bool(check["remedy"]) == (check["status"] != "ok"), check
    errors = [check for check in checks if check["status"] == "error"]
    assert (report.code, json.loads(report.out)["ok"]) == (1 if errors else 0, not errors)

    text = ditcli(capfd, "doctor", "--no-speed", "--quiet")
    assert text.err == ""
    assert [line.split()[1] for line in text.out.splitlines() if not line.lstrip().startswith("->")] == [
        name.split()[0] for name in names
    ]
    assert not (tmp_path / "cache").exists()


def test_both_builds_of_onnx_runtime_are_an_error_with_its_remedy(capfd, tmp_path, monkeypatch) -> None:
    pretend(tmp_path, "onnxruntime", "1.30.0")
    pretend(tmp_path, "onnxruntime-gpu", "1.30.0")
    monkeypatch.syspath_prepend(tmp_path)
    finding = next(iter(runtime.check_onnxruntime()))
    assert finding.status == "error"
    assert "onnxruntime 1.30.0 and onnxruntime-gpu 1.30.0 are both installed" in finding.found
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in finding.remedy
    report = ditcli(capfd, "doctor", "--no-speed")
    assert report.code == 1
    assert "error    onnxruntime" in report.out


def test_a_version_out_of_range_is_an_error_and_one_that_was_not_tested_a_warning(tmp_path, monkeypatch) -> None:
    pretend(tmp_path, "click", "7.1")
    pretend(tmp_path, "pillow", "11.5.0")
    monkeypatch.syspath_prepend(tmp_path)
    findings = list(packages.check_packages())
    assert [(finding.status, finding.found) for finding in findings if finding.status == "error"] == [
        ("error", "click is 7.1, but click>=8.2 is needed")
    ]
    told = next(finding.found for finding in findings if "others than the tested" in finding.found)
    assert f"pillow 11.5.0 ({packages.read_pins()['pillow']})" in told


def test_every_requirement_has_a_pin() -> None:
    from packaging.requirements import Requirement

    from ditcli.doctor.packages import metadata

    needed = {Requirement(text) for text in metadata.requires("ditcli") or ()}
    pins = packages.read_pins()
    for requirement in needed:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            assert requirement.name in pins
            assert requirement.specifier.contains(pins[requirement.name])


def test_the_pins_travel_in_the_wheel(tmp_path) -> None:
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        pins = archive.read("ditcli/constraints.txt")
    assert pins == (ROOT / "scripts" / "constraints.txt").read_bytes()
    assert packages.PINS[0].relative_to(ROOT).as_posix() == "ditcli/constraints.txt"


def test_the_session_that_is_tried_is_a_product_of_matrices() -> None:
    tensor = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", "n"]) for name in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("MatMul", ["x", "x"], ["y"])], "g", tensor[:1], tensor[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=8)
    assert model.SerializeToString() == runtime.SQUARE
    session = runtime.open_square("cpu")
    x = np.arange(9, dtype=np.float32).reshape(3, 3)
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], x @ x)
    assert runtime.multiplies(session)


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path, monkeypatch) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    monkeypatch.setenv("DITCLI_CACHE", str(closed / "cache"))
    with without_rights():
        findings = by_name(places.check_disk())
    assert findings["cache"].status == "error"
    assert str(closed / "cache") in findings["cache"].found
    assert "DITCLI_CACHE" in findings["cache"].remedy
    assert findings["disk"].status != "error"


def test_the_hub_answers_or_is_a_warning(monkeypatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with serve() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        finding = by_name(places.check_hub())["hub"]
        assert (finding.status, finding.found) == ("ok", f"{hub.url} answers")
    gone = by_name(places.check_hub())["hub"]
    assert gone.status == "warning"
    assert "cannot be reached" in gone.found
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE=1 is set" in by_name(places.check_hub())["hub"].found


def test_the_speed_is_of_real_steps() -> None:
    (finding,) = speed.check_speed("cpu", seconds=0)
    assert finding.status == "ok"
    assert "trains DiT-S/2" in finding.found
    (refused,) = speed.check_speed("tpu", seconds=0)
    assert refused.status == "error"
    assert speed.products_per_second("cpu", seconds=0) > 0
