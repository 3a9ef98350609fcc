"""Faults at random while notebooks work, for as long as you like (``make chaos``).

    PYTHONPATH=tests python -m chaos [--seconds 600] [--seed 0] [--device cuda]

A swarm of a tiny Llama, every block on two servers, all real processes; in network namespaces where
root may make them. Three kinds of notebooks, processes as well, compare all that they compute with
the local model: one generates and trains without a break, one does whatever one does with a model
in several threads, and some are interrupted (SIGINT) and killed (SIGKILL). Meanwhile each pair of
servers with the same blocks has faults of its own, one at a time, so that the other one of the pair
has its blocks; and the first notebook sleeps.

A fault costs a pause: the longest time without a token, or without a step, in which the fault
began, less the time that the notebook slept. Faults of several pairs may begin in one pause: it
counts for each of them. One in which none began counts for the last one before it. A table at the
end says what happened; faults of blocks that no other server had, because the other one of the pair
had ended by itself, are told apart, and so is the time between two steps while nothing is wrong.

First comes a fifth of the time as warm-up. Then, with no notebook there, memory and open files of
the servers that are never restarted are noted; after the rest of the time they must be there again.
"""
