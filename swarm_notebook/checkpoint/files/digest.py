"""A short text that tells checkpoints apart, the same for all who hold the same one.

Two checkpoints of one name, two steps of a training run say, have the same blocks and shapes: a
chain over servers of both gives tokens of neither. So servers announce the digest of what they
loaded from, and a notebook compares it with that of its own.

It has two parts. The first is of the config (what differs from the class's defaults, so that a copy
written by another version of transformers is the same) and of the tensors' names. The second is of
their dtypes, shapes and of `SAMPLE_BYTES` in the middle of each: that takes milliseconds, and finds
any change that reaches all of a matrix. It is of what is stored, not of what is served from it: in
lower precision it is the same. It is left out where not all files are on this machine (a sharded
repository of the Hub, of which each peer fetches its part), and then only the first part counts.

Dummy weights are made from a config, so only that counts: whoever tries them out has embeddings and
a head in a folder of their own.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from swarm_notebook.checkpoint.files.dummy import PREFIX as DUMMY_PREFIX

if TYPE_CHECKING:
    from swarm_notebook.checkpoint.files.source import ModelSource

# Settings of a run or of a file's history, not of the model.
_PASSING = {
    "_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
# 64 bits each: nobody looks for two checkpoints of one digest, as whoever serves can lie anyway.
_HEX = 16


def digest(source: ModelSource) -> str:
    """The digest of a checkpoint: 16 hexadecimal digits, or 33 characters with both parts.

    Raises:
        ModelNotFound: a file of it cannot be read.
    """
    config = source.config().to_diff_dict()
    settings = {key: value for key, value in config.items() if key not in _PASSING}
    if source.dht_prefix.startswith(DUMMY_PREFIX):
        return _hash(json.dumps(settings, sort_keys=True, default=str))
    weights = source.weights()
    samples = weights.samples()
    names = weights.names() if samples is None else [name for name, *_ in samples]
    first = _hash(json.dumps([settings, sorted(names)], sort_keys=True, default=str))
    return first if samples is None else f"{first}-{_hash(repr(sorted(samples)))}"


def matches(one: str, other: str) -> bool:
    """Whether two digests may be of one checkpoint."""
    (config, _, weights), (its_config, _, its_weights) = one.partition("-"), other.partition("-")
    if config != its_config:
        return False
    return not (weights and its_weights) or weights == its_weights


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_HEX]
