"""Whether a model is still the one that states in a store were made with.

States depend on more than can be listed: the weights in the folder, what blocks at home have
become, adapters and their scaling, deep prompts, steering, the precision of servers. So nothing is
listed. A store keeps what the model makes of some fixed tokens, and a model that makes something
else of them gets a folder of its own.

Hooks of the user's own may do anything, at some tokens only; with those the store is left alone.
"""

from __future__ import annotations

import torch

from swarm_notebook.model.blocks.hooks import foreign_hooks
from swarm_notebook.probing.subject import Subject

TOKENS = 16
# How far two passes of one model may be apart, relative to the size of the states (L2). In float32
# contract C2 asks for 1e-4. In halves honest servers differ by up to 1.3 % (30 blocks in bfloat16,
# measured on the demo model): what changes less is not to be told from their rounding.
CLOSE, CLOSE_HALF = 1e-4, 3e-2


def sample(subject: Subject) -> torch.Tensor:
    """The last block's states ``[TOKENS, hidden]`` for some tokens, float32."""
    vocabulary = subject.model.config.get_text_config().vocab_size
    # A prime step: different tokens in any vocabulary that is no multiple of it.
    ids = (torch.arange(1, TOKENS + 1) * 7919) % vocabulary
    last = len(subject.blocks) - 1
    with subject.at_rest() as model, subject.reading([last]) as states:
        model(input_ids=ids[None].to(model.device), use_cache=False)
    return states[last][0, -TOKENS:].float().cpu()


def alike(one: torch.Tensor, other: torch.Tensor, *, exact: bool) -> bool:
    """Whether two samples are of the same model.

    Args:
        exact: its blocks compute in float32 or better.
    """
    if one.shape != other.shape:
        return False
    return bool((one - other).norm() <= (CLOSE if exact else CLOSE_HALF) * one.norm())


def hooked(subject: Subject) -> str | None:
    """The name of a module with a hook of the user's own, if there is one."""
    for name, module in subject.model.named_modules():
        if foreign_hooks(module):
            return name or type(module).__name__
    return None
