"""Writing a text in the background, with any Hugging Face causal LM, remote or local.

A `Writer` owns one text and the keys and values that the model computed for it. It runs
``model.generate`` on a thread of its own, so that the notebook stays usable, and can be stopped
within one token. Whatever part of the text is the same as before is never computed again: going
on, changing the last token, or branching off in the middle costs only the tokens that are new.

    writer = Writer(swarm.model)
    writer.write(ids, Sampling(max_new_tokens=50))
    writer.wait()
    writer.branch(3, [other])     # another fourth token, and on from there

Its parts: `Draft` (the text as tokens), `Pieces` (what each token shows),
`Sampling` (what is asked of ``generate``), `Timing` (how fast it went).
"""

from swarm_notebook.writing.draft import Draft, Token
from swarm_notebook.writing.pieces import Pieces, Vocabulary
from swarm_notebook.writing.sampling import Sampling
from swarm_notebook.writing.timing import Timing
from swarm_notebook.writing.writer import Writer

__all__ = ["Draft", "Pieces", "Sampling", "Timing", "Token", "Vocabulary", "Writer"]
