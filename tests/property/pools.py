"""Which models compete for the same slots, once more and as plainly as it can be said."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

__all__ = ["Cell", "Moved", "Pools"]


@dataclass(eq=False)
class Cell:
    """A model for as long as it has nodes or waiting requests, and the pool that it is in."""

    pool: int


@dataclass(frozen=True)
class Moved:
    """These pools have become that one."""

    former: tuple[int, ...]
    pool: int


@dataclass
class Pools:
    """The pools of all models that have nodes or waiting requests."""

    cells: dict[str, Cell] = field(default_factory=dict)
    ever: int = 0

    def cell(self, model: str) -> Cell:
        """The model's cell; a new model is alone in its pool."""
        if model not in self.cells:
            self.cells[model] = Cell(self._new())
        return self.cells[model]

    def alive(self) -> set[int]:
        """All pools that there are."""
        return {cell.pool for cell in self.cells.values()}

    def regroup(self, waiting: Collection[str], serving: Collection[frozenset[str]]) -> list[Moved]:
        """Nodes serve these sets of models from now on: the pools that have become of others."""
        for model in self.cells.keys() - set(waiting) - {m for models in serving for m in models}:
            self.cells.pop(model).pool = self._new()
        for model in sorted({m for models in serving for m in models}):
            self.cell(model)
        moved: list[Moved] = []
        for group in self._groups(serving):
            former = tuple(sorted({self.cells[model].pool for model in group}))
            same = {model for model, cell in self.cells.items() if cell.pool in former}
            if len(former) > 1 or same != group:
                moved.append(Moved(former, self._new()))
                for model in group:
                    self.cells[model].pool = moved[-1].pool
        return moved

    def _groups(self, serving: Collection[frozenset[str]]) -> list[set[str]]:
        groups = [{model} for model in sorted(self.cells)]
        for models in serving:
            joined = [group for group in groups if group & models]
            groups = [group for group in groups if not group & models]
            groups += [set().union(*joined)] if joined else []
        return groups

    def _new(self) -> int:
        self.ever += 1
        return self.ever
