"""Random values as a peer may send them; a run is like the one before.

By hand for longer with ``HYPOTHESIS_EXAMPLES=100000 pytest …``.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st


def seeded(examples: int) -> settings:
    """For a test of so many examples, unless more are asked for."""
    return settings(
        max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", examples)),
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


# Of all that msgpack can carry.
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=80),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)
