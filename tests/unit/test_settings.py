"""Cluster settings: Ceph's own options and environment."""

from __future__ import annotations

import pytest

from agent.errors import UsageError
from agent.settings import ClusterSettings


def test_the_environment_fills_what_was_not_given() -> None:
    filled = ClusterSettings(user="me").completed({"CEPH_ARGS": "--id siphon --keyring '/a b/k' -c /x.conf --debug-ms 1"})
    assert filled == ClusterSettings(conf="/x.conf", user="me", keyring="/a b/k")


def test_a_whole_name_is_understood() -> None:
    assert ClusterSettings().completed({"CEPH_ARGS": "--name client.siphon"}).user == "siphon"


def test_an_unreadable_environment_is_named() -> None:
    with pytest.raises(UsageError, match="CEPH_ARGS"):
        ClusterSettings().completed({"CEPH_ARGS": "--id 'open"})


def test_settings_become_options() -> None:
    assert ClusterSettings("/c", "dr", "me", "/k").words() == ["--conf", "/c", "--cluster", "dr", "--id", "me", "--keyring", "/k"]
    assert ClusterSettings().words() == []
