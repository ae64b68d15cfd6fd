"""What a graph does with its input between the first node and the answer, found without running it.

An architectural backdoor lives in the graph, not in the weights (Bober-Irizar et al. 2022, "Architectural backdoors in neural
networks"; Langford et al. 2024; ShadowLogic by HiddenLayer, 2024): some nodes look for a trigger in the image and
overrule the layers beside them. The search for triggers follows gradients, and such nodes have none, so it cannot find
them. Two things give them away here:

* a *decision*: a comparison, a rounding, a cast to integers, an index of a maximum, a branch, or any other operator that is not
  known to be continuous in what it reads of the image, and whose result reaches the answer. Ordinary classifiers have none
  (ReLU, pooling, clipping and attention are continuous);
* a *shortcut*: a value taken from the image by nodes without weights that joins a value of the network's late layers, past
  more weighted layers than lie ahead.

A third thing needs no image: a *random* value that reaches the answer. A trigger that works for one image in twenty shows
neither on clean images nor in a search.

A shape says nothing of the pixels, so reading one ends the flow, unless a decision made the shape: the length of what a mask
selects is the decision itself.

What this cannot see: a decision made of continuous functions with huge factors behind a layer with weights. That is a
network again, and the trigger search's to find.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from audit_plugin.intake.refusal import printable, quoted
from audit_plugin.types import IntakeFinding

ARCHITECTURAL_PATH = "architectural-path"
"""Code of the findings, and of the reason that keeps a model from passing."""

ANSWERS_BY_CHANCE = "answers-by-chance"
"""Code of a model whose answer depends on random numbers; it never passes either."""

_SHOWN = 5
_FEWEST_SKIPPED = 2


@dataclass(frozen=True)
class Step:
    """One node, reduced to what matters here.

    Attributes:
        name, operator: for messages; untrusted.
        reads, writes: names of values. What is read for its shape or type alone is left out.
        measures: what is read for its shape alone.
        decided_by: the reads in which it is not continuous: it decides something wherever one of them depends on the image.
        always: it decides whatever it reads (a comparison of symbolic sizes: the answer depends on the batch size).
        by_chance: it writes random numbers.
        has_weights: it multiplies with weights when one of its reads does not depend on the image.
        shares: reads whose memory the first write shares, or which the node overwrites.
        changes: reads whose memory the node writes to.
        updates: reads that it keeps up to date, as running statistics, wherever they lie.
        surely_shares: the first write is the memory of ``shares``, and never a copy of it.
    """

    name: str
    operator: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    measures: tuple[str, ...] = ()
    decided_by: tuple[str, ...] = ()
    always: bool = False
    by_chance: bool = False
    has_weights: bool = False
    shares: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    updates: tuple[str, ...] = ()
    surely_shares: bool = True


def find_paths(path: str, steps: Sequence[Step], sources: Collection[str], answers: Collection[str]) -> tuple[IntakeFinding, ...]:
    """The decisions, shortcuts and random values among ``steps``, given in the order in which they run.

    Args:
        path: the model's file, for the findings.
        sources: values that are the image.
        answers: values that the graph returns.

    Returns:
        At most one finding of each kind, with the code :data:`ARCHITECTURAL_PATH` or :data:`ANSWERS_BY_CHANCE`.
    """
    memory = _Memory(steps)
    behind = _weights_behind(steps, memory, sources)
    ahead = _weights_ahead(steps, behind, memory, answers)
    decisions, shortcuts, chances = [], [], []
    for step, before, after in zip(steps, behind, ahead, strict=True):
        if after is None:
            continue
        if step.always or _decides(step, before):
            decisions.append(step)
        if step.by_chance:
            chances.append(step)
        passed = [count for count in before.values() if count is not None]
        if passed and min(passed) == 0 and max(passed) >= _FEWEST_SKIPPED and max(passed) > after:
            shortcuts.append(step)
    found = []
    if decisions:
        message = (
            f"{_listed(decisions)}: a decision on the image's values that reaches the answer, as in an architectural backdoor"
        )
        found.append((f"{message}; a search for triggers cannot look behind it", ARCHITECTURAL_PATH))
    if shortcuts:
        message = f"{_listed(shortcuts)}: a path from the image past the network's layers joins them late"
        found.append((f"{message}, as in an architectural backdoor", ARCHITECTURAL_PATH))
    if chances:
        message = f"{_listed(chances)}: random numbers that reach the answer"
        found.append((f"{message}; what it answers another time was not audited", ANSWERS_BY_CHANCE))
    return tuple(IntakeFinding(path, printable(message), code) for message, code in found)


def find_changed(steps: Sequence[Step], stored: Mapping[str, str]) -> list[str]:
    """Which of the stored values the steps change, through whatever view; in the order of ``stored``.

    Args:
        steps: see :func:`find_paths`.
        stored: values that the model keeps from one call to the next, and how they are called for the reader.
    """
    sure, possible = _Memory([step for step in steps if step.surely_shares]), _Memory(steps)
    changed = {sure.of(name) for step in steps for name in step.changes}
    updated = {possible.of(name) for step in steps for name in step.updates}
    return [label for name, label in stored.items() if sure.of(name) in changed or possible.of(name) in updated]


def _decides(step: Step, before: Mapping[str, int | None]) -> bool:
    """Whether it is not continuous in something that depends on the image."""
    return any(before.get(name) is not None for name in step.decided_by)


class _Memory:
    """Which values share memory: writing to one changes the others."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self._owner: dict[str, str] = {}
        for step in steps:
            for other in (*step.writes[1:],) if step.shares else ():
                self._join(other, step.writes[0])
            for name in step.shares:
                if step.writes:
                    self._join(step.writes[0], name)
                self._join(step.shares[0], name)

    def of(self, name: str) -> str:
        """The value that stands for all that share memory with ``name``."""
        while (owner := self._owner.get(name, name)) != name:
            self._owner[name] = self._owner.get(owner, owner)
            name = owner
        return name

    def _join(self, one: str, other: str) -> None:
        self._owner[self.of(one)] = self.of(other)


def _weights_behind(steps: Sequence[Step], memory: _Memory, sources: Collection[str]) -> list[dict[str, int | None]]:
    """For each step and each value that it reads: the fewest weighted layers between the image and it; None where none leads."""
    fewest: dict[str, int] = {memory.of(name): 0 for name in sources}
    shaped_by_values: set[str] = set()  # the results of decisions, and whatever is made of them
    behind = []
    for step in steps:
        measured = [name for name in step.measures if name in shaped_by_values]
        before = {name: fewest.get(memory.of(name)) for name in (*step.reads, *measured)}
        behind.append(before)
        if _decides(step, before) or not shaped_by_values.isdisjoint(before):
            shaped_by_values.update(step.writes)
        counts = [count for count in before.values() if count is not None]
        if counts:
            added = step.has_weights and len(counts) < len(before)
            for name in (*step.writes, *step.shares):
                fewest[memory.of(name)] = min(counts) + added
    return behind


def _weights_ahead(
    steps: Sequence[Step], behind: Sequence[dict[str, int | None]], memory: _Memory, answers: Collection[str]
) -> list[int | None]:
    """For each step the fewest weighted layers between its result and the answer; None where it does not reach one."""
    fewest: dict[str, int] = {memory.of(name): 0 for name in answers}
    ahead: list[int | None] = []
    for step, before in zip(reversed(steps), reversed(behind), strict=True):
        reached = [fewest[key] for name in (*step.writes, *step.shares) if (key := memory.of(name)) in fewest]
        ahead.append(min(reached) if reached else None)
        if reached:
            weighted = step.has_weights and None in before.values()
            for name in before:
                key = memory.of(name)
                fewest[key] = min(min(reached) + weighted, fewest.get(key, len(steps)))
    return ahead[::-1]


def _listed(steps: Sequence[Step]) -> str:
    shown = ", ".join(f"{quoted(step.name)} ({step.operator[:60]})" for step in steps[:_SHOWN])
    return f"nodes {shown}" + (f" and {len(steps) - _SHOWN} more" if len(steps) > _SHOWN else "")
