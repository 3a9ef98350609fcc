"""Loading the extension in a fresh kernel: fast, and undone without a trace (contract C8)."""

from __future__ import annotations

import subprocess
import sys

import pytest
from support.forkserver import fresh
from support.kernel import Kernel
from support.patience import slowdown

TIMED_LOAD = """
import sys, time
began = time.perf_counter()
get_ipython().run_line_magic("load_ext", "swarm_notebook")
seconds = time.perf_counter() - began
"""


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, swarm_notebook; print([m for m in ('torch', 'IPython') if m in sys.modules])"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "[]"


def test_public_names_are_there_and_others_are_not() -> None:
    import swarm_notebook as sn

    for name in sn.__all__:
        assert getattr(sn, name) is not None
        assert name in dir(sn)
    assert [name for name in dir(sn) if name[0] != "_" and name not in sn.__all__] == []
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sn.nothing


def test_load_is_fast_and_warms_up_in_the_background() -> None:
    with Kernel(fresh()) as kernel:
        before = slowdown()
        kernel.run(TIMED_LOAD)
        assert float(kernel.value("seconds")) < 0.5 * max(before, slowdown())
        # A cell with an import waits for the warm-up instead of racing with it.
        kernel.run("import torch.nn.functional, transformers.models.llama")
        assert kernel.value("'swarm_notebook.swarm' in sys.modules") == "True"


def test_tab_lists_names_without_importing_what_they_are() -> None:
    with Kernel(fresh()) as kernel:
        kernel.run("import sys, swarm_notebook as sn")
        names = kernel.complete("sn.")
        assert {"LocalSwarm", "connect", "tuning"} <= set(names)
        assert kernel.value("'torch' in sys.modules") == "False"
        # Whoever goes on with a name needs what it is.
        assert kernel.complete("sn.widgets.Sw") == ["SwarmMap"]
        assert kernel.complete("sn.connect(mod") == ["model="]


def test_unload_undoes_exactly_what_load_did() -> None:
    with Kernel(fresh()) as kernel:
        kernel.run("""
def state():
    shell = get_ipython()
    return (
        {kind: sorted(table) for kind, table in shell.magics_manager.magics.items()},
        len(shell.Completer.custom_matchers),
        len(shell.input_transformers_cleanup),
        {event: len(found) for event, found in shell.events.callbacks.items()},
        sorted(shell.user_ns),
    )
_before = _after = None
_before = state()
""")
        kernel.run("%load_ext swarm_notebook")
        assert kernel.value("state() == _before") == "False"
        kernel.run("%reload_ext swarm_notebook\n%unload_ext swarm_notebook\n_after = state()")
        assert kernel.value("[a for a, b in zip(_after[:4], _before[:4]) if a != b]") == "[]"
