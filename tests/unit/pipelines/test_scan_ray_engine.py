"""What of the Ray engine needs no Ray."""

from __future__ import annotations

import sys

import pytest

from audit_plugin.errors import UsageError
from pipelines import ray_engine


def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'mlflow-backdoor-audit\[ray\]'"):
        ray_engine.RayEngine()


def test_workers_get_the_way_to_mlflow_and_no_keys(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "token")
    monkeypatch.setenv("BACKDOOR_AUDIT_SIGNING_KEY", "private")
    monkeypatch.setenv("BACKDOOR_AUDIT_NOTIFY_SECRET", "private")
    monkeypatch.setenv("AWS_SOMETHING", "private")
    monkeypatch.setattr("mlflow.get_tracking_uri", lambda: "http://mlflow.example")
    given = ray_engine._environment()
    assert (given["MLFLOW_TRACKING_TOKEN"], given["MLFLOW_TRACKING_URI"]) == ("token", "http://mlflow.example")
    assert given["BACKDOOR_AUDIT_SIGNING_KEY"] == given["BACKDOOR_AUDIT_NOTIFY_SECRET"] == ""
    assert "private" not in given.values()
