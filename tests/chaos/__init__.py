"""Faults at random while notebooks work, for as long as you like (``make chaos``).

    PYTHONPATH=tests python -m chaos [--seconds 600] [--seed 0] [--device cuda]

A swarm of a tiny Llama, every block on two servers, all real processes; in network namespaces where
root may make them. Three kinds of notebooks, processes as well, compare all that they compute with
the local model: one generates and trains without a break, one does whatever one does with a model
in several threads, and some are interrupted (SIGINT) and killed (SIGKILL). Meanwhile each pair of
servers with the same blocks has faults of its own, one at a time, so that the other one of the pair
has its blocks; and the first notebook sleeps.

A fault costs a pause: the longest time in which the first notebook has no token, or no step, from
the fault's beginning to `AFTER_SECONDS` after its end, less the time that it slept. Faults of
several pairs overlap, and a pause counts for each of them. A table at the end says what happened.

First comes a fifth of the time as warm-up. Then, with no notebook there, memory and open files of
the servers that are never restarted are noted; after the rest of the time they must be there again.
"""
