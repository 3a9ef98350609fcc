"""Processes that begin with their packages imported.

``swarm-notebook serve`` computes for five seconds to import torch, transformers and hivemind before
it does anything of its own, and so does a notebook. A test run starts more than a hundred such
processes, and would be for the most part that. So one process imports the packages and does nothing
else; it has one thread. Each server that a test starts is forked off it: a process of its own, in a
session of its own, with the arguments, the environment and the streams that it was to get, and a
child of the test's process, as if that had started it. So is a script that is started with `WARM`
instead of the interpreter alone, and the kernel of a notebook, unless its environment is `fresh`;
either has a process beside it that forks its servers in the same way. What a command line or a
script of another interpreter starts is started as always.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import inspect
import json
import os
import socket
import subprocess
import sys
import threading
from ctypes import CDLL, get_errno
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

SERVE = [sys.executable, "-m", "swarm_notebook.cli", "serve"]
# Runs the code that follows, where nothing can be forked as any interpreter does.
WARM = [sys.executable, "-X", "warm", "-c"]
KERNEL = [sys.executable, "-m", "ipykernel_launcher"]
FRESH = "SWARM_NOTEBOOK_FRESH"
MARK = "support.forkserver"  # in the command line of every process here
MESSAGE_BYTES = 1 << 17  # an environment, mostly
PR_SET_CHILD_SUBREAPER = 36  # prctl(2)
IN_NETWORK = ["ip", "netns", "exec"]
CLONE_NEWNET = 0x40000000  # setns(2)


class Popen(subprocess.Popen):
    """`subprocess.Popen`, which forks a server or a kernel instead of starting it."""

    def _execute_child(self, *arguments: Any) -> None:
        # A private method of the library, so by the names of its arguments, not by their places.
        told = inspect.signature(super()._execute_child).bind(*arguments).arguments
        command = list(map(os.fspath, told["args"])) if isinstance(told["args"], list) else []
        network = None
        if command[: len(IN_NETWORK)] == IN_NETWORK:
            network, command = command[len(IN_NETWORK)], command[len(IN_NETWORK) + 1 :]
        streams = [told[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        environment = told["env"] or dict(os.environ)
        serves = command[: len(SERVE)] == SERVE and -1 not in streams and told["start_new_session"]
        is_kernel = command[: len(KERNEL)] == KERNEL and FRESH not in environment
        if not serves and not is_kernel and command[: len(WARM)] != WARM:
            super()._execute_child(*arguments)
            return
        streams = [own if given == -1 else given for own, given in enumerate(streams)]
        self.pid = _forkserver().fork(command[2:], network, told["cwd"], environment, streams)
        self._child_created = True
        ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(told[name] for name in ends))


def install() -> None:
    """Fork what is to be forked of all that this process starts, where the system can."""
    if sys.platform == "linux":
        from jupyter_client import launcher

        subprocess.Popen = launcher.Popen = Popen  # type: ignore[misc]


def fresh() -> dict[str, str]:
    """The environment of a kernel whose interpreter is to begin with nothing imported."""
    return {**os.environ, FRESH: "1"}


_given: list[_Forkserver] = []  # that of a kernel or script


@cache
def _forkserver() -> _Forkserver:
    return _given[0] if _given else _started()


def pid() -> int | None:
    """The process that forks servers, if there is one."""
    return _forkserver().pid if _forkserver.cache_info().currsize else None


def _started() -> _Forkserver:
    asks, asked = _ends()
    with asked:
        process = subprocess.Popen(
            [sys.executable, "-m", MARK, str(asked.fileno())],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            pass_fds=[asked.fileno()],
            start_new_session=True,
        )
    return _Forkserver(asks, process.pid, process)


def _ends() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


class _Forkserver:
    """It ends with this process, whose end of the socket is then closed."""

    def __init__(self, asks: socket.socket, pid: int, process: Any = None) -> None:
        self._lock, self._asks = threading.Lock(), asks
        self.pid, self._process = pid, process

    def fork(
        self,
        arguments: list[str],
        network: str | None,
        folder: str | os.PathLike[str] | None,
        environment: dict[str, str],
        streams: list[int],
    ) -> int:
        there = str(Path(folder or "").absolute())
        message = json.dumps([arguments, network, environment, there]).encode()
        with self._lock:
            # A process whose parent ends becomes a child of the nearest ancestor that wants it.
            prctl = CDLL(None, use_errno=True).prctl
            prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            try:
                socket.send_fds(self._asks, [message], streams)
                return int(self._asks.recv(MESSAGE_BYTES))
            finally:
                prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def _await_orders(asked: socket.socket) -> list[str] | None:
    """The arguments of a process, in the one that is to be it; None at the end of the run."""
    while True:
        message, streams, *_ = socket.recv_fds(asked, MESSAGE_BYTES, 3)
        if not message:
            return None
        reads, writes = os.pipe()
        if first := os.fork():
            os.close(writes)
            for stream in streams:
                os.close(stream)
            os.waitpid(first, 0)  # from here on the process is a child of whoever asked
            with os.fdopen(reads, "rb") as pid:
                asked.send(pid.read())
            continue
        if os.fork():
            os._exit(0)
        # Before its number is told: whoever interrupts it looks up its process group at once.
        os.setsid()
        os.write(writes, str(os.getpid()).encode())
        for number in (reads, writes, asked.detach()):
            os.close(number)
        arguments, network, environment, folder = json.loads(message)
        if network is not None:
            _enter(network)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        for place, stream in enumerate(streams):
            os.dup2(stream, place)
            os.close(stream)
        return arguments


def _enter(network: str) -> None:
    """Be in a network namespace from now on."""
    libc = CDLL(None, use_errno=True)
    with Path("/var/run/netns", network).open("rb") as namespace:
        if libc.setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(get_errno(), f"network namespace {network}")


def _main() -> None:
    # What takes so long, for servers and for notebooks.
    from swarm_notebook import cli, connecting  # noqa: F401
    from swarm_notebook.server import process  # noqa: F401
    from swarm_notebook.server.engine import throughput

    throughput.SECONDS /= 20  # see `support.hosting`
    gc.freeze()  # what was imported stays in memory that all share
    arguments = _await_orders(socket.socket(fileno=int(sys.argv[1])))
    while arguments is not None and arguments[0] != SERVE[2]:
        asks, asked = _ends()
        if beside := os.fork():
            asked.close()
            _given.append(_Forkserver(asks, beside))
            break
        asks.close()
        os.setsid()
        arguments = _await_orders(asked)
    if arguments is not None:
        _be(*arguments)


def _be(what: str, *arguments: str) -> None:
    """A process of this kind, with these arguments, to its end."""
    import numpy as np

    np.random.seed()  # noqa: NPY002 - the one that libraries use; Python's own does it itself
    sys.argv[:] = [what, *arguments]
    if what != SERVE[2]:
        install()
    if what == KERNEL[-1]:
        from ipykernel.kernelapp import launch_new_instance

        _leave(launch_new_instance())
    elif what == SERVE[2]:
        from swarm_notebook.cli import main

        _leave(main(list(arguments)))
    else:
        sys.argv[:] = ["-c", *arguments[2:]]
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})


def _leave(status: int | None) -> NoReturn:
    """End as an interpreter does, but without taking apart what was imported.

    That writes to nearly all of the memory shared with others, and takes 0.7 s of a processor.
    """
    threading._shutdown()  # type: ignore[attr-defined] # waits for threads, as the interpreter does
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status or 0)


if __name__ == "__main__":
    # Not as the main module: a kernel has one of its own.
    from support import forkserver

    forkserver._main()
