"""A real notebook kernel for tests, driven through jupyter_client."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from queue import Empty
from types import TracebackType
from typing import Any, Self

from jupyter_client.manager import KernelManager, start_new_kernel
from support.patience import PATIENCE


@dataclass
class Result:
    """What one cell showed."""

    stdout: str = ""
    stderr: str = ""
    error: str = ""  # the exception's type
    displayed: list[dict[str, Any]] = field(default_factory=list)

    @property
    def plain(self) -> str:
        """The plain text of what was displayed, or returned, last."""
        return str(self.displayed[-1]["text/plain"])


class Kernel:
    """``with Kernel() as kernel: kernel.run("1 + 1").plain``.

    Args:
        environment: its variables; those of `support.forkserver.fresh` for a new interpreter.
    """

    manager: KernelManager

    def __init__(self, environment: dict[str, str] | None = None) -> None:
        self.environment = environment or dict(os.environ)

    def __enter__(self) -> Self:
        self.manager, self.client = start_new_kernel(
            PATIENCE, kernel_name="python3", env=self.environment
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel()

    def receive(self, timeout: float = PATIENCE) -> dict[str, Any]:
        """The next message of the kernel."""
        return self.client.get_iopub_msg(timeout=timeout)

    def start(self, code: str) -> str:
        """Send a cell without waiting for it."""
        return self.client.execute(code)

    def finish(self, message: str, timeout: float = PATIENCE) -> Result:
        """Collect what a cell shows until the kernel is idle again."""
        result, deadline = Result(), time.monotonic() + timeout
        while True:
            found = self.receive(max(deadline - time.monotonic(), 0.01))
            if found["parent_header"].get("msg_id") != message:
                continue
            if self._take(result, found["msg_type"], found["content"]):
                return result

    def run(self, code: str, timeout: float = PATIENCE) -> Result:
        """Run a cell that is expected to succeed."""
        result = self.finish(self.start(code), timeout)
        assert not result.error, f"{result.error} in {code!r}:\n{result.stderr}"
        return result

    def fail(self, code: str, timeout: float = PATIENCE) -> Result:
        """Run a cell that is expected to end with an error."""
        result = self.finish(self.start(code), timeout)
        assert result.error, f"no error in {code!r}"
        return result

    def value(self, expression: str) -> str:
        """The repr of an expression."""
        return self.run(expression).plain

    def complete(self, text: str) -> list[str]:
        """What Tab offers at the end of `text`."""
        reply = self.client.complete(text, reply=True, timeout=PATIENCE)
        return list(reply["content"]["matches"])

    def stdout_of(self, message: str, timeout: float = PATIENCE) -> str:
        """The next piece of standard output of a running cell."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            found = self.receive(timeout)
            mine = found["parent_header"].get("msg_id") == message
            if mine and found["msg_type"] == "stream" and found["content"]["name"] == "stdout":
                return str(found["content"]["text"])
        raise Empty

    @staticmethod
    def _take(result: Result, kind: str, content: dict[str, Any]) -> bool:
        if kind == "stream" and content["name"] == "stdout":
            result.stdout += content["text"]
        elif kind == "stream":
            result.stderr += content["text"]
        elif kind in {"display_data", "execute_result"}:
            result.displayed.append(content["data"])
        elif kind == "error":
            result.error = content["ename"]
            result.stderr += "\n".join(content["traceback"])
        return kind == "status" and content["execution_state"] == "idle"
