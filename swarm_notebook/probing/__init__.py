"""Looking into a model: collect, decode, probe, patch and steer its hidden states.

Everything here is plain forward hooks on the model's blocks, so it works alike on a remote model
(`Swarm` or ``swarm.model``) and on a local model of the same class. What only reads costs a remote
model no extra round trip; what writes costs one, from the written block on.

    states = hidden_states(swarm, texts, pool="last", store="states/")   # resumes where it stopped
    probe = linear_probe(states, labels)                                 # one classifier per block
    logit_lens(swarm, "The capital of France is")
    patch(swarm, clean, corrupted, metric)
    path_patch(swarm, clean, corrupted, metric)                          # who reads whom
    patch_heads(swarm, clean, corrupted, metric, blocks=3)               # after swarm.own(3)
    attention_patterns(swarm, text, blocks=3)                            # after swarm.own(3)
    vector = steering_vector(swarm, happy, sad, block=14)
    with vector.steer(swarm, scale=4): swarm.model.generate(...)

*Block k's state* means its output: the residual stream after block k.
"""

from swarm_notebook.probing.attention import AttentionPatterns, HeadPattern, attention_patterns
from swarm_notebook.probing.heads import HeadPatching, patch_heads
from swarm_notebook.probing.lens import Lens, decode_states, logit_lens, token_ranks
from swarm_notebook.probing.linear import Confusion, LinearProbe, Probes, linear_probe, load_probes
from swarm_notebook.probing.patching import Patching, patch
from swarm_notebook.probing.paths import PathPatching, path_patch
from swarm_notebook.probing.states import hidden_states
from swarm_notebook.probing.steering import (
    SteeringVector,
    Sweep,
    load_vector,
    steer,
    steering_vector,
)
from swarm_notebook.probing.view import HiddenStates, load_states

__all__ = [
    "AttentionPatterns",
    "Confusion",
    "HeadPatching",
    "HeadPattern",
    "HiddenStates",
    "Lens",
    "LinearProbe",
    "Patching",
    "PathPatching",
    "Probes",
    "SteeringVector",
    "Sweep",
    "attention_patterns",
    "decode_states",
    "hidden_states",
    "linear_probe",
    "load_probes",
    "load_states",
    "load_vector",
    "logit_lens",
    "patch",
    "patch_heads",
    "path_patch",
    "steer",
    "steering_vector",
    "token_ranks",
]
