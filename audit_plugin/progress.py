"""How an audit, a repair or a guard tells how far it is."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told what is going on; the command line draws it."""

    def stage(self, name: str) -> None:
        """A new stage begins."""

    def advance(self, share: float) -> None:
        """Share of the present stage that is done, in [0, 1]."""


class NoProgress:
    """Tells nobody."""

    def stage(self, name: str) -> None:
        return

    def advance(self, share: float) -> None:
        return
