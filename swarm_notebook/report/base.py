"""What all reports have in common: text for people, and one static fragment of HTML.

``repr`` never varies with what a machine does, as it ends up in stored notebooks; ``str`` tells
all; both are in plain text.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from swarm_notebook.report.formatting import model_title


class Report(ABC):
    """What a notebook shows of something."""

    @abstractmethod
    def as_html(self) -> str:
        """All of it, as one static fragment."""

    def _repr_mimebundle_(self, **_options: Any) -> dict[str, str]:
        return {"text/plain": repr(self), "text/html": self.as_html()}


class ModelReport(Report):
    """What a notebook shows of a model in a swarm.

    Attributes:
        model: its name, perhaps a folder.
    """

    model: str

    @property
    def title(self) -> str:
        """The model's name, without the folder that it was read from."""
        return model_title(self.model)
