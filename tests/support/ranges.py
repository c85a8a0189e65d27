"""A listener that keeps what was opened, in order, and checks that every close fits."""

from __future__ import annotations

from dataclasses import dataclass, field

from mtbert.engine.range_tree import Label, RangeTree


@dataclass
class Node:
    """A range and the ranges within it."""

    name: str
    inner: list[Node] = field(default_factory=list)

    def names(self) -> list[str]:
        """Its own and those of all within it, in the order in which they were opened."""
        return [self.name, *(name for node in self.inner for name in node.names())]

    def find(self, name: str) -> list[Node]:
        """All of that name within it, itself included."""
        found = [self] if self.name == name else []
        return found + [match for node in self.inner for match in node.find(name)]


class RecordedRanges(RangeTree):
    """Keeps the ranges of the main thread as a tree under `root`."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Node("")
        self.path = [self.root]
        self.labels: dict[str, Label] = {}

    @property
    def is_closed(self) -> bool:
        """Whether every range that was opened has been closed."""
        return len(self.path) == 1

    def _open(self, label: Label) -> None:
        self.labels[label.name] = label
        node = Node(label.name)
        self.path[-1].inner.append(node)
        self.path.append(node)

    def _close(self) -> None:
        assert len(self.path) > 1, "more ranges were closed than opened"
        self.path.pop()
