"""How much memory a request takes until its answer has left, which is taken from its account first.

Shapes are known before anything is computed, but for modules inside of blocks: those get an
allowance, and `engine.captures` holds the request to it.
"""

from __future__ import annotations

from swarm_notebook.net.wire.traffic import COPIES, Account
from swarm_notebook.server.engine.requests import Backward, Forward, Limits

# An output is there twice at the most: as a tensor, and compressed for the wire.
_COPIES = 2
# What a pass holds meanwhile, in hidden states: a block's input, its output, its keys and values.
_IN_WORK = 3
# Of modules inside of blocks: as wide as eight hidden states, as feed-forward parts of Gemma are.
_WIDEST = 8
_INNER_LEAST = 1 << 20
# The least for all traffic: as much as a gigabyte of kept activations leaves on a small machine.
_TRAFFIC_BYTES = 512 << 20


def traffic_for(limits: Limits) -> int:
    """Bytes for the traffic of a server: two peers may each send the largest request there is.

    That is a backward pass: an input, a gradient, and prompts of as much.
    """
    return max(_TRAFFIC_BYTES, 2 * COPIES * 3 * limits.tokens * limits.hidden_size * 4)


async def allow_answer(account: Account, request: Forward) -> int:
    """Take what the outputs of a request need; may wait.

    Returns:
        how many bytes that are.

    Raises:
        ServerBusy: there was no room in time.
    """
    states = _hidden_bytes(request) * (1 + len(request.states))
    if request.inner:
        most = account.share // (2 * _COPIES)
        wide = _WIDEST * _hidden_bytes(request) * len(request.inner)
        request.inner_bytes = min(max(wide, _INNER_LEAST), most)
    return await account.take(_COPIES * (states + (request.inner_bytes or 0)))


async def allow_pass(account: Account, request: Forward) -> None:
    """Hold what a pass without a cache and its answer need, and no more of how it came.

    Raises:
        ServerBusy: there was no room in time.
    """
    given = [request.hidden, request.prompts, request.attention_mask, request.position_ids]
    kept = 0
    if isinstance(request, Backward):
        given.append(request.grad)
        kept = request.blocks[1] - request.blocks[0]  # a long one keeps every block's input
    size = sum(tensor.numel() * tensor.itemsize for tensor in given if tensor is not None)
    account.resize(min(size, account.share))
    await account.take(_hidden_bytes(request) * (_IN_WORK + kept))
    await allow_answer(account, request)


def _hidden_bytes(request: Forward) -> int:
    return request.hidden.numel() * request.hidden.itemsize
