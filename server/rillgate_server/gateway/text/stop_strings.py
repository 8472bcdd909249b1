"""Finds the stop string that ends a text while the text comes, and never lets its beginning out.

Owns the automaton of the stop strings and the place in it. Does not know tokens or reasoning.

The match that counts is the one that completes first; of those that complete with the same
character, the one that starts first (the longest). Until then, the longest suffix of the text that
begins a stop string is withheld, and nothing else is. Aho and Corasick, "Efficient string matching"
(1975): linear time, whatever the stop strings; `str.find` in a window was rejected because the
withheld suffix costs a product of both lengths there.

              a           b           c*        stop strings "abc" and "bd"
    (root) ------> a ----------> ab -------> abc
        \\   b           d*       . fail
         ------> b ------> bd      . . > b      after "ab", a "d" completes "bd"
"""

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopScan:
    """What a piece of text brought."""

    text: str
    """Text that is out of every match's reach now."""
    stop_string: str | None = None
    """The match; its text is not in `text`, and nothing follows."""
    end: int = 0
    """With a match: the characters of the scanned piece up to its end."""


class StopAutomaton:
    """The stop strings of one request; immutable once built, shared by its choices."""

    # Nodes are ints, 0 is the root; a node stands for a beginning of some stop string.
    def __init__(self, stop_strings: Sequence[str]) -> None:
        """Build from stop strings, none of them empty."""
        assert all(stop_strings), "an empty stop string matches everywhere"
        self._edges: list[dict[str, int]] = [{}]
        """node -> character -> node"""
        self._matches: list[str | None] = [None]
        """node -> longest stop string that the node's text ends with"""
        self._depths = [0]
        for stop_string in stop_strings:
            self._insert(stop_string)
        self._fails = [0] * len(self._edges)
        """node -> node of its text's longest proper suffix that has one"""
        self._held = self._depths[:]
        """node -> length of the longest suffix that can still grow into a match"""
        self._link()
        first_characters = "".join(map(re.escape, self._edges[0]))
        self.first_character = re.compile(f"[{first_characters}]" if first_characters else "(?!)")

    def _insert(self, stop_string: str) -> None:
        node = 0
        for character in stop_string:
            if character not in self._edges[node]:
                self._edges[node][character] = len(self._edges)
                self._edges.append({})
                self._matches.append(None)
                self._depths.append(self._depths[node] + 1)
            node = self._edges[node][character]
        self._matches[node] = stop_string

    def _link(self) -> None:
        """Fill fails, matches and held, breadth first: a node's fail is nearer to the root."""
        queue = deque(self._edges[0].values())
        while queue:
            node = queue.popleft()
            fail = self._fails[node]
            if self._matches[node] is None:
                self._matches[node] = self._matches[fail]
            if not self._edges[node]:
                self._held[node] = self._held[fail]
            for character, child in self._edges[node].items():
                self._fails[child] = self.step(fail, character)
                queue.append(child)

    def step(self, node: int, character: str) -> int:
        """Return the node after one more character."""
        while (child := self._edges[node].get(character)) is None:
            if node == 0:
                return 0
            node = self._fails[node]
        return child

    def match(self, node: int) -> str | None:
        """Return the stop string that ends at this node: the one that starts first."""
        return self._matches[node]

    def num_held(self, node: int) -> int:
        """Return how many characters before this node may still become part of a match."""
        return self._held[node]


class StopMatcher:
    """One choice's place in the automaton, and its withheld text."""

    # Mutable state: _node, _withheld (the text that node's num_held counts).

    def __init__(self, automaton: StopAutomaton) -> None:
        """Begin at the start of a text."""
        self._automaton = automaton
        self._node = 0
        self._withheld = ""

    def __repr__(self) -> str:
        """Show how much is withheld."""
        return f"StopMatcher(num_withheld={len(self._withheld)})"

    def push(self, text: str, *, is_armed: bool = True) -> StopScan:
        """Scan more text; while not armed, a completed match is text like any other.

        After a match the matcher is done.
        """
        automaton, node, position = self._automaton, self._node, 0
        while position < len(text):
            if node == 0:
                found = automaton.first_character.search(text, position)
                if found is None:
                    break
                position = found.start()
            node = automaton.step(node, text[position])
            position += 1
            stop_string = automaton.match(node)
            if is_armed and stop_string is not None:
                known = self._withheld + text[:position]
                self._node, self._withheld = 0, ""
                return StopScan(known[: len(known) - len(stop_string)], stop_string, position)
        self._node = node
        num_held = automaton.num_held(node)
        known = self._withheld + text
        self._withheld = known[len(known) - num_held :]
        return StopScan(known[: len(known) - num_held])

    def finish(self) -> str:
        """Return what was withheld: no more text comes, so no match does."""
        withheld, self._withheld, self._node = self._withheld, "", 0
        return withheld
