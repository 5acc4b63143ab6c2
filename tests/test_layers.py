"""The house plan: arrows only point down, nothing goes in circles, and help is quick because it imports little."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ditcli.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[1] / "ditcli"
ROOMS = {"models", "codecs", "diffusion", "denoisers", "data"}
GROUND = {
    *("hub", "runs", "files", "images", "config", "errors", "devices", "sessions", "progress", "processes", "__init__")
}
HEAVY = ("torch", "onnxruntime", "onnx", "numpy", "PIL", "huggingface_hub", "matplotlib", "safetensors")


def band(module: str) -> int:
    """3 for the command line, 2 for workflows, 1 for rooms, 0 for the ground floor."""
    top = module.split(".")[1] if "." in module else "__init__"
    if top in ("cli", "__main__"):
        return 3
    return 1 if top in ROOMS else 0 if top in GROUND else 2


def imports_of(path: Path) -> set[str]:
    """Modules of ours that a file imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ditcli"):
            for alias in node.names:
                inner = ROOT.parent / Path(*node.module.split("."), alias.name)
                is_module = inner.with_suffix(".py").is_file() or inner.is_dir()
                found.add(f"{node.module}.{alias.name}" if is_module else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("ditcli")}
    return found


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
    return name.removesuffix(".__init__")


GRAPH = {module_name(path): imports_of(path) for path in ROOT.rglob("*.py")}


def test_arrows_only_point_down():
    upward = [f"{m} imports {o}" for m, others in GRAPH.items() for o in others if band(o) > band(m)]
    assert upward == []


def test_nothing_imports_in_circles():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for other in GRAPH.get(module, ()):
                visit(other, (*path, module))
            done.add(module)

    for module in GRAPH:
        visit(module, ())


def packages_of(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere."""
    return {
        (node.module or "").split(".")[0] if isinstance(node, ast.ImportFrom) else alias.name.split(".")[0]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }


def test_the_diffusion_room_imports_no_torch():
    for path in (ROOT / "diffusion").rglob("*.py"):
        assert "torch" not in packages_of(path), path.name


def test_nothing_imports_diffusers():
    """It is a reference for tests; its import takes seconds."""
    assert [path.name for path in ROOT.rglob("*.py") if "diffusers" in packages_of(path)] == []


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_imports_nothing_heavy_and_ends_with_examples(command):
    code = (
        "import sys\nfrom ditcli.cli.main import cli\n"
        f"try: cli.main([*{command!r}.split(), '--help'], prog_name='ditcli')\n"
        f"except SystemExit: print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    if command:
        examples = done.stdout.split("Examples:\n")[1]
        assert examples.strip().startswith(f"ditcli {command}")


def test_help_answers_at_once():
    """In 150 ms on an idle machine: of the processor's time, since others may be using this one."""

    def seconds() -> float:
        before = os.times()
        subprocess.run([sys.executable, "-m", "ditcli", "--help"], capture_output=True, check=True)
        after = os.times()
        return after.children_user - before.children_user + after.children_system - before.children_system

    assert min(seconds() for _ in range(5)) < 0.15
