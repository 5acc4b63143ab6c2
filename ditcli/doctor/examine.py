"""All checks in order, and their report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from ditcli.config import DoctorConfig
from ditcli.doctor import machine, packages, places, runtime, speed
from ditcli.doctor.findings import Finding, error
from ditcli.progress import say


def examine(config: DoctorConfig) -> list[Finding]:
    """Look at everything; a check that breaks is a finding itself."""
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("python", packages.check_python),
        ("packages", packages.check_packages),
        ("cpu", machine.check_cpu),
        ("driver", machine.check_driver),
        ("torch", machine.check_torch),
        ("onnxruntime", runtime.check_onnxruntime),
        ("disk", places.check_disk),
        ("hub", places.check_hub),
    ]
    if config.speed:
        checks.append(("speed", lambda: speed.check_speed(config.device)))
    findings: list[Finding] = []
    for name, check in checks:
        try:
            findings += check()
        except Exception as problem:  # of a broken installation anything may be raised
            told = f"{type(problem).__name__}: {' '.join(str(problem).split())}"
            findings.append(error(name, told, "See whether `python -m pip install --force-reinstall ditcli` mends it."))
    say(f"{count(findings, 'error')} errors, {count(findings, 'warning')} warnings.")
    return findings


def is_well(findings: list[Finding]) -> bool:
    """Whether nothing has to be mended."""
    return count(findings, "error") == 0


def count(findings: list[Finding], status: str) -> int:
    return sum(finding.status == status for finding in findings)


def to_dict(findings: list[Finding]) -> dict[str, Any]:
    return {"ok": is_well(findings), "checks": [asdict(finding) for finding in findings]}


def to_text(findings: list[Finding]) -> str:
    """A line for each finding, and the remedy under it."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.status:7}  {finding.name:{width}}  {finding.found}")
        if finding.remedy:
            lines.append(f"{'':7}  {'':{width}}  -> {finding.remedy}")
    return "\n".join(lines)
