"""What the site's pages link to.

Papers at the top of the repository and in docs/ link to each other; the site has one level. A
notebook's page links to where the notebook can be run, if it is known where the repository is: that
is so where GitHub builds the site.
"""

from __future__ import annotations

import os
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


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """A notebook's page begins with links to Colab and Binder."""
    name, repository = Path(page.file.src_uri), os.environ.get("GITHUB_REPOSITORY")
    if name.suffix != ".ipynb" or not repository:
        return html
    places = {
        "Colab": f"https://colab.research.google.com/github/{repository}/blob/main/examples/{name.name}",
        "Binder": f"https://mybinder.org/v2/gh/{repository}/main?labpath=examples%2F{name.name}",
    }
    links = " ".join(
        f'<a class="md-button" href="{url}">Open in {where}</a>' for where, url in places.items()
    )
    return f"<p>{links}</p>{html}"
