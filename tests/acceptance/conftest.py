"""Both sites for tests that drive the agent inside this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lablib.lab import Lab
from support import Pair, Site


@pytest.fixture(scope="session")
def pair(lab: Lab) -> Iterator[Pair]:
    source, target = Site(lab.source, "vms"), Site(lab.target, "vms-dr")
    yield Pair(lab, source, target)
    source.close()
    target.close()
