"""What is asked of ``generate``, under its own names, and randomness that is the text's own."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

MOST_TOKENS = 1_000_000


@dataclass(frozen=True)
class Sampling:
    """Arguments of transformers' ``generate``; they mean what they mean there.

    Attributes:
        do_sample: draw the next token instead of taking the most probable one. The next three
            count only then.
        temperature: 0 or more; 1 leaves the model's distribution as it is, 0 is greedy.
        top_p: draw from the most probable tokens that together have this probability; 1 is all.
        top_k: draw from so many tokens; 0 is all.
        max_new_tokens: how many to write at most.
        seed: of the drawing; None draws something else every time. It is set anew by each run and
            each branch, and goes on where it was when a stopped text is continued.

    Raises:
        ValueError: a value is outside of its range; the message names the argument.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 50
    max_new_tokens: int = 256
    seed: int | None = None

    def __post_init__(self) -> None:
        warm = 0 <= self.temperature < math.inf
        _check("temperature", self.temperature, warm, "0 (greedy) or a positive number")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        _check("top_k", self.top_k, self.top_k >= 0, "0 (all tokens) or a positive integer")
        whole = 1 <= self.max_new_tokens <= MOST_TOKENS
        _check("max_new_tokens", self.max_new_tokens, whole, f"from 1 to {MOST_TOKENS:,}")
        seed = self.seed is None or 0 <= self.seed < 1 << 63
        _check("seed", self.seed, seed, "None, 0 or a positive integer")

    @classmethod
    def of(cls, model: Any, **chosen: Any) -> Sampling:
        """The model's own defaults (its generation config), and what was chosen.

        Raises:
            TypeError: an argument is not one of ours.
            ValueError: see the class.
        """
        config = getattr(model, "generation_config", None)
        names = ("do_sample", "temperature", "top_p", "top_k")
        defaults = {name: getattr(config, name, None) for name in names}
        return cls(**{k: v for k, v in defaults.items() if v is not None} | chosen)

    def arguments(self) -> dict[str, Any]:
        """For ``generate``; the seed is not among them, see `OwnRandomness`."""
        options = asdict(self)
        del options["seed"]
        if not self.do_sample or self.temperature == 0:
            options["do_sample"] = False
            options = {key: options[key] for key in ("do_sample", "max_new_tokens")}
        return options


class OwnRandomness(TorchFunctionMode):
    """While entered, this thread draws tokens with a generator of its own.

    ``generate`` takes no generator and draws from the process's one. In the background that would
    disturb, and be disturbed by, whatever else the notebook draws. With the same seed the tokens
    are the same as after ``torch.manual_seed(seed)`` in the foreground.
    """

    def __init__(self, seed: int | None, device: torch.device):
        super().__init__()
        self._generator = torch.Generator(device)
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.multinomial:
            kwargs = {"generator": self._generator, **kwargs}
        return func(*args, **kwargs)


def _check(name: str, value: object, holds: bool, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {wanted}, not {value!r}")
