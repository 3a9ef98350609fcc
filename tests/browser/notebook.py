"""A notebook in JupyterLab, used as a person would: by keyboard and mouse, and read on the screen.

    notebook.run("%swarm map")               # typed into the last cell; Shift+Enter
    notebook.output().get_by_role("grid")    # what is on the screen below it

What has no key or button of its own (another theme, a saved file, a restart) goes through the
commands of Lab's menus.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from playwright.sync_api import Locator, Page, expect
from support.patience import PATIENCE

MILLISECONDS = 1000 * PATIENCE
WIDTH, HEIGHT = 1100, 900
KERNEL_IS_IDLE = """() => {
  const context = window.jupyterapp.shell.currentWidget?.sessionContext;
  const kernel = context?.isReady && context.session?.kernel;
  return kernel && kernel.connectionStatus === "connected" && kernel.status === "idle";
}"""

EMPTY: dict[str, Any] = {
    "cells": [{"cell_type": "code", "id": "first", "metadata": {}, "outputs": [], "source": []}],
    "metadata": {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}
    },
    "nbformat": 4,
    "nbformat_minor": 5,
}
EMPTY["cells"][0]["execution_count"] = None


expect.set_options(timeout=MILLISECONDS)


class Notebook:
    """One open notebook; `page` is the browser's tab."""

    def __init__(self, page: Page, path: Path):
        self.page, self.path = page, path
        self.errors: list[str] = []  # what the page threw
        page.set_default_timeout(MILLISECONDS)
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def open(self, address: str) -> None:
        """Show the notebook and wait for its kernel."""
        if not self.path.exists():
            self.path.write_text(json.dumps(EMPTY), encoding="utf-8")
        self.page.set_viewport_size({"width": WIDTH, "height": HEIGHT})
        self.page.goto(address)
        self.page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=MILLISECONDS)
        self.page.wait_for_function(KERNEL_IS_IDLE, timeout=MILLISECONDS)
        if self.page.locator("#jp-left-stack:visible").count():
            self.command("application:toggle-left-area")

    def command(self, name: str, **arguments: Any) -> None:
        """One of Lab's commands, as its menus run them."""
        script = "([name, given]) => window.jupyterapp.commands.execute(name, given)"
        self.page.evaluate(f"(a) => {{ ({script})(a); }}", [name, arguments])

    @property
    def cells(self) -> Locator:
        return self.page.locator(".jp-NotebookPanel:visible .jp-Notebook .jp-Cell")

    def start(self, code: str) -> int:
        """Type code into the last cell and run it; returns which cell that is."""
        number = self.cells.count() - 1
        cell = self.cells.nth(number)
        cell.locator(".cm-content").click()
        self.page.keyboard.insert_text(code)
        self.page.keyboard.press("Shift+Enter")
        expect(self.cells).to_have_count(number + 2)
        return number

    def finish(self, number: int) -> Locator:
        """Wait until a cell has run without an error; returns its output."""
        prompt = self.cells.nth(number).locator(".jp-InputPrompt").first
        expect(prompt).to_have_text(re.compile(r"\[\d+\]"), timeout=MILLISECONDS)
        output = self.output(number)
        for text in output.locator('[data-mime-type*="stderr"], [data-mime-type*="error"]').all():
            said = text.inner_text()
            assert not re.search(r"^\w*(Error|Exception|Interrupt)\b", said, re.MULTILINE), said
        return output

    def run(self, code: str) -> Locator:
        """Run code in the last cell; returns what is on the screen below it."""
        return self.finish(self.start(code))

    def value(self, expression: str) -> str:
        """What the kernel says that an expression is."""
        return self.run(expression).inner_text().split(":", 1)[-1].strip()

    def output(self, number: int) -> Locator:
        return self.cells.nth(number).locator(".jp-Cell-outputArea")

    @property
    def dark(self) -> bool:
        """Whether it is shown in the dark theme."""
        return self.page.locator("body").get_attribute("data-jp-theme-light") == "false"

    def theme(self, dark: bool) -> None:
        self.command("apputils:change-theme", theme=f"JupyterLab {'Dark' if dark else 'Light'}")
        light = "false" if dark else "true"
        expect(self.page.locator("body")).to_have_attribute("data-jp-theme-light", light)
        expect(self.page.locator("#jupyterlab-splash")).to_have_count(0)

    def restart(self) -> None:
        """Restart the kernel."""
        self.page.evaluate(
            "() => window.jupyterapp.shell.currentWidget.sessionContext.restartKernel()"
        )
        self.page.wait_for_function(KERNEL_IS_IDLE, timeout=MILLISECONDS)

    def shut_down(self) -> None:
        """End the kernel."""
        self.page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")

    def save(self) -> dict[str, Any]:
        """Save, with the state of the widgets; returns what is in the file."""
        before = self.path.stat().st_mtime_ns
        self.command("docmanager:save")
        for _ in range(int(MILLISECONDS / 50)):
            self.page.wait_for_timeout(50)
            if self.path.stat().st_mtime_ns != before:
                with suppress(json.JSONDecodeError):  # only a part has been written yet
                    found: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
                    return found
        raise TimeoutError("the notebook has not been saved")
