"""The paths that users take, by name: each a check of one architecture, and a column of docs/support.csv."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, util
from typing import Literal

from paths.subject import PASSED, NotApplicableError, Outcome, RefusedByNameError, Subject

# "alike": much the same on every architecture, so one a mechanism will do.
Cost = Literal["cheap", "alike", "costly"]
_MODULES = (
    "calls",
    "generation",
    "decoding",
    "pictures",
    "training",
    "placement",
    "objects",
    "compiled",
    "wrapped",
    "quantized",
    "ranks",
)
SECTIONS = tuple(module.capitalize() for module in _MODULES)


@dataclass(frozen=True)
class Path:
    """One column: `what` says in a sentence what passing means."""

    section: str
    name: str
    what: str
    check: Callable[[Subject], None]
    cost: Cost = "cheap"
    packages: tuple[str, ...] = ()

    @property
    def missing(self) -> list[str]:
        """Packages that it needs and that are not installed."""
        return [name for name in self.packages if util.find_spec(name) is None]

    def outcome(self, subject: Subject) -> Outcome:
        """Walk it. A failure is raised as it is."""
        try:
            self.check(subject)
        except NotApplicableError as reason:
            return Outcome("none", str(reason))
        except RefusedByNameError as reason:
            return Outcome("refused", str(reason))
        return PASSED


PATHS: dict[str, Path] = {}


def path(
    section: str, name: str, what: str, cost: Cost = "cheap", packages: tuple[str, ...] = ()
) -> Callable[[Callable[[Subject], None]], Callable[[Subject], None]]:
    """Enter a check into `PATHS`."""

    def enter(check: Callable[[Subject], None]) -> Callable[[Subject], None]:
        assert section in SECTIONS
        assert name not in PATHS
        PATHS[name] = Path(section, name, what, check, cost, packages)
        return check

    return enter


def all_paths() -> dict[str, Path]:
    """Every path, with the files that hold them imported."""
    for module in _MODULES:
        import_module(f"paths.{module}")
    return dict(sorted(PATHS.items(), key=lambda item: SECTIONS.index(item[1].section)))
