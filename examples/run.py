"""Run a notebook in a fresh kernel and print what it says, cell by cell.

python examples/run.py NOTEBOOK          show it
python examples/run.py NOTEBOOK --write  store the new outputs in the file as well
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

CELL_SECONDS = 600
WIDGET = "application/vnd.jupyter.widget-view+json"


def main() -> int:
    parser = argparse.ArgumentParser(description="Run a notebook and print what it says.")
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--write", action="store_true", help="store the outputs in the file")
    options = parser.parse_args()
    notebook = nbformat.read(options.notebook, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
        on_cell_execute=show_source,
        on_cell_executed=show_output,
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(options.notebook.parent)}},
    )
    try:
        client.execute()
    except CellExecutionError as error:
        print(error, file=sys.stderr)
        return 1
    if options.write:
        tidy(notebook)
        nbformat.write(notebook, options.notebook)
    return 0


def show_source(cell: nbformat.NotebookNode, **_others: object) -> None:
    if cell.cell_type == "code":
        print("\n>>> " + cell.source.replace("\n", "\n... "), flush=True)


def show_output(cell: nbformat.NotebookNode, **_others: object) -> None:
    for output in cell.outputs:
        if output.output_type == "stream" and output.name == "stdout":
            print(output.text, end="", flush=True)
        elif "data" in output and (WIDGET not in output.data or "text/html" in output.data):
            print(output.data.get("text/plain", ""), flush=True)


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Drop what means nothing in a stored notebook: views of widgets that are gone.

    Our own widgets leave a picture; progress bars leave nothing. A library's warning goes, too: it
    names the folder that the library lies in.
    """
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        for output in cell.outputs:
            if "text/html" in output.get("data", {}):
                output.data.pop(WIDGET, None)
        # What was shown while something lasted, and emptied when it was over, has no data.
        cell.outputs = [
            found
            for found in cell.outputs
            if found.get("data") != {}
            and WIDGET not in found.get("data", {})
            and "site-packages" not in found.get("text", "")
        ]
    notebook.metadata.pop("widgets", None)
    notebook.metadata.language_info = {"name": "python"}


if __name__ == "__main__":
    sys.exit(main())
