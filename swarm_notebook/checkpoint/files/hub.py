"""Files of a Hub repository, fetched one by one as they are needed.

`huggingface_hub` retries for 23 seconds when there is no network, per file. So the Hub is asked
once whether it is there, with a short limit; while it is not, only what its cache holds is used.
``HF_HUB_OFFLINE`` and ``HF_ENDPOINT`` mean what they always mean.
"""

from __future__ import annotations

import re
import threading
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path

from swarm_notebook.errors import ModelNotFound

# A Hub that is reached answers in a tenth of a second; a proxy that drops packets never does.
REACH_SECONDS = 3.0
# A network that comes back is used a minute later at most, and no cell asks twice.
REMEMBER_SECONDS = 60.0

_REPOSITORY = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
_last_answer: tuple[float, bool] | None = None


def is_repository_name(text: str) -> bool:
    """Whether `text` has the form of a Hub id: ``name`` or ``organisation/name``."""
    return (
        _REPOSITORY.fullmatch(text) is not None
        and text[0] not in ".-"
        and ".." not in text
        and not text.endswith((".git", ".gguf"))
    )


def url(repository: str) -> str:
    return f"https://huggingface.co/{repository}"


def reachable() -> bool:
    """Whether the Hub answers at all. Asked at most once a minute, and for at most 3 seconds."""
    global _last_answer
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return False
    now = time.monotonic()
    if _last_answer is None or now - _last_answer[0] > REMEMBER_SECONDS:
        _last_answer = (now, _ask())
    return _last_answer[1]


def _ask() -> bool:
    # In a thread, because no HTTP client bounds the time that a name look-up takes.
    answer: Future[bool] = Future()
    threading.Thread(target=_head, args=(answer,), daemon=True, name="hub-reachable").start()
    try:
        return answer.result(timeout=REACH_SECONDS)
    except FutureTimeout:
        return False


def _head(answer: Future[bool]) -> None:
    import urllib.error
    import urllib.request

    from huggingface_hub import constants

    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")  # noqa: S310 - the Hub's
    try:
        with urllib.request.urlopen(request, timeout=REACH_SECONDS):  # noqa: S310
            answer.set_result(True)
    except urllib.error.HTTPError:
        answer.set_result(True)
    except (OSError, ValueError):
        answer.set_result(False)


def fetch(repository: str, filename: str) -> Path | None:
    """The local copy of one file, downloaded if need be; None where the repository lacks it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    online = reachable()
    try:
        return Path(hf_hub_download(repository, filename, local_files_only=not online))
    except LocalEntryNotFoundError as error:
        if online:
            raise ModelNotFound(f"model {repository!r}: {filename} not fetched: {error}") from error
        return None
    except EntryNotFoundError:
        return None
    except GatedRepoError as error:
        raise ModelNotFound(
            f"model {repository!r} is gated: accept its terms at {url(repository)} and run "
            "`hf auth login`"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelNotFound(
            f"model {repository!r}: no such repository on the Hub, and no such folder or file here"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise ModelNotFound(f"model {repository!r}: {filename} not fetched: {error}") from error


def has(repository: str, filename: str) -> bool:
    """Whether the repository has this file, without downloading it."""
    from huggingface_hub import file_exists, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(repository, filename), str):
        return True
    return reachable() and file_exists(repository, filename)
