"""Papers at the top of the repository and in docs/ link to each other; the site has one level."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
INCLUDED = re.compile(r"^\{\{ (\w+\.md) \}\}$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Whole papers in the place of ``{{ NAME.md }}``, and links of the repository as the site's."""
    markdown = INCLUDED.sub(lambda name: (ROOT / name[1]).read_text(), markdown)
    markdown = re.sub(r"\]\((?:\.\./)*SECURITY\.md", "](security.md", markdown)
    return re.sub(r"\]\(docs/", "](", markdown)
