"""The settings of `ditcli push`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ditcli.config.base import Config, option


@dataclass(frozen=True, kw_only=True)
class PushConfig(Config):
    """`ditcli push`: `run` is shared as the Hub repository `repo`."""

    run: str
    repo: str
    license: str | None = option(None, "Licence of the weights, as the Hub writes it: mit, apache-2.0, cc-by-4.0 ...")
    private: bool = option(False, "Make a private repository.")
    merge: bool = option(False, "Share an adapter merged into its base, instead of the adapter alone.")
    dry_run: bool = option(False, "Write the folder locally and upload nothing.")
    out: str | None = option(None, "With --dry-run: where to write the folder.  [default: the repository's name]")

    def __post_init__(self) -> None:
        self._check_types()
        self._check("repo", bool(re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", self.repo)), "owner/name")
        named = self.license is not None and re.fullmatch(r"[a-z0-9][a-z0-9.-]*", self.license)
        self._check("license", bool(named), "the licence that you give the weights, such as mit or cc-by-nc-4.0")
        self._check("out", self.out is None or self.dry_run, "left out without --dry-run")
