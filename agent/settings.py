"""How a cluster is named on a command line: Ceph's own options and environment. Pure."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace

from agent.errors import UsageError


@dataclass(frozen=True)
class ClusterSettings:
    """Which cluster and as whom; empty fields are left to Ceph's defaults."""

    conf: str = ""
    cluster: str = ""
    user: str = ""
    keyring: str = ""

    def completed(self, environment: Mapping[str, str]) -> ClusterSettings:
        """Fill empty fields from CEPH_ARGS, as `rbd` does (librados reads CEPH_CONF itself)."""
        parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
        parser.add_argument("--conf", "-c", default="")
        parser.add_argument("--cluster", default="")
        parser.add_argument("--id", "--user", dest="user", default="")
        parser.add_argument("--name", "-n", default="")
        parser.add_argument("--keyring", "-k", default="")
        try:
            known, _ = parser.parse_known_args(shlex.split(environment.get("CEPH_ARGS", "")))
        except (argparse.ArgumentError, ValueError) as error:
            raise UsageError(f"the environment's CEPH_ARGS cannot be read: {error}") from error
        return replace(
            self,
            conf=self.conf or known.conf,
            cluster=self.cluster or known.cluster,
            user=self.user or known.user or known.name.removeprefix("client."),
            keyring=self.keyring or known.keyring,
        )

    def words(self) -> list[str]:
        """Return these settings as options of a command line."""
        pairs = (("--conf", self.conf), ("--cluster", self.cluster), ("--id", self.user), ("--keyring", self.keyring))
        return [word for option, value in pairs if value for word in (option, value)]
