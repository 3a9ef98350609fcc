"""What the package index shows of a release: hatchling calls this while it builds.

Links and pictures of README.md are relative to the repository, whose address is known where GitHub
builds a release (as in docs/links.py). There they become absolute, and the index is told where the
sources, the site and the changelog are. Elsewhere the README stays as it is.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

PICTURE = re.compile(r'\b(src|srcset)="(?!\w+:)')
LINK = re.compile(r"\]\((?!\w+:|#)")


def absolute(text: str, address: str) -> str:
    """A README whose pictures and links lead to the repository at an address."""
    text = PICTURE.sub(rf'\1="{address}/raw/main/', text)
    return LINK.sub(f"]({address}/blob/main/", text)


class ReleaseMetadata(MetadataHookInterface):
    """Fills in ``readme`` and ``urls``."""

    def update(self, metadata: dict[str, Any]) -> None:
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        if repository := os.environ.get("GITHUB_REPOSITORY"):
            owner, _, name = repository.partition("/")
            address = f"https://github.com/{repository}"
            text = absolute(text, address)
            metadata["urls"] = {
                "Source": address,
                "Documentation": f"https://{owner}.github.io/{name}/",
                "Changelog": f"{address}/blob/main/CHANGELOG.md",
                "Issues": f"{address}/issues",
            }
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
