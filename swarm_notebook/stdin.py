"""The end of standard input, by which a process learns that whoever started it is gone."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable


def at_end_of_stdin(do: Callable[[], object]) -> None:
    """Call a function, in a thread of its own, when standard input ends."""

    def wait() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        do()

    threading.Thread(target=wait, daemon=True).start()
