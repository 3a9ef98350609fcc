"""A conversation as a tree: whatever is edited or asked again becomes a branch beside what was.

Every turn knows its successors, and which of them goes on; the turns from the beginning along the
chosen ones are the `path`, which is what is shown and what the model is asked. Nothing is ever
removed. Pure: who uses it from several threads guards it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from swarm_notebook.writing import Draft

Message = dict[str, str]


@dataclass(eq=False)
class Turn:
    """One message, and what came after it.

    Attributes:
        message: role and content; empty for the root, which stands before all turns.
        draft: the tokens of an answer of the model; None for what a person wrote.
        before: the turn that it follows.
        after: all turns that followed it, in the order in which they were made.
        chosen: which of them the path takes; None if it ends here.
        left: what was chosen before the path was cut here.
    """

    message: Message
    draft: Draft | None = None
    before: Turn | None = None
    after: list[Turn] = field(default_factory=list)
    chosen: int | None = None
    left: int | None = None


class Conversation:
    """All branches of one conversation.

    Attributes:
        version: grows with every change.
    """

    def __init__(self) -> None:
        self._root = Turn({})
        self.version: int = 0

    @property
    def path(self) -> list[Turn]:
        """The turns of the branch that is chosen."""
        return self.following(self._root)

    def following(self, turn: Turn) -> list[Turn]:
        """What was said after a turn, in the branch that was chosen there last."""
        turns = []
        while turn.chosen is not None:
            turn = turn.after[turn.chosen]
            turns.append(turn)
        return turns

    @property
    def end(self) -> Turn:
        """The last turn of the path, or the root."""
        return [self._root, *self.path][-1]

    def add(self, message: Message, draft: Draft | None = None) -> None:
        """Let a new turn follow the path."""
        end = self.end
        end.after.append(Turn(message, draft, end))
        end.chosen, end.left = len(end.after) - 1, None
        self.version += 1

    def answer(self, text: str, draft: Draft) -> None:
        """Let the model's answer follow the path; one that has grown longer is the same turn."""
        end, message = self.end, {"role": "assistant", "content": text}
        known = [place for place, turn in enumerate(end.after) if turn.draft is draft]
        if not known:
            return self.add(message, draft)
        end.after[known[0]].message = message
        end.chosen, end.left = known[0], None
        self.version += 1
        return None

    def cut(self, length: int) -> None:
        """End the path after so many turns; what followed stays as a branch."""
        turn = [self._root, *self.path][length]
        turn.chosen, turn.left = None, turn.chosen
        self.version += 1

    @property
    def can_restore(self) -> bool:
        """Whether the path was cut and nothing has followed since."""
        return self.end.left is not None

    def restore(self) -> None:
        """Undo a cut, if nothing has followed it."""
        end = self.end
        if end.left is not None:
            end.chosen, end.left = end.left, None
            self.version += 1

    def choose(self, at: int, which: int) -> None:
        """Let the path take another branch at a turn, as it was left.

        Raises:
            IndexError: there is no such turn or no such branch.
        """
        siblings = self.siblings(at)
        if not 0 <= which < len(siblings):
            raise IndexError(f"branch: {which} is not one of {len(siblings)} at turn {at}")
        before = siblings[which].before
        if before is not None:
            before.chosen = which
        self.version += 1

    def siblings(self, at: int) -> list[Turn]:
        """All turns that were made in the place of one of the path, which is among them.

        Raises:
            IndexError: the path has no such turn.
        """
        path = self.path
        if not 0 <= at < len(path):
            raise IndexError(f"turn: {at} is not in the conversation of {len(path)} turns")
        return (path[at].before or self._root).after
