"""What ``evaluator_config`` may hold, and where the policy comes from."""

from __future__ import annotations

import pytest

from audit_plugin.errors import UsageError
from audit_plugin.policy import POLICY_VARIABLE
from mlflow_plugins.evaluator import _config_of

GIVEN = {"model_uri": "models:/digits/3", "clean": "clean.npz"}


@pytest.mark.parametrize(
    ("variable", "given", "policy"),
    [
        (None, {}, None),
        ("", {}, None),
        ("server.toml", {}, "server.toml"),
        ("server.toml", {"policy": None}, "server.toml"),
        ("server.toml", {"policy": "own.toml"}, "own.toml"),
    ],
)
def test_the_policy_is_the_given_one_else_that_of_the_environment(monkeypatch, variable, given, policy):
    monkeypatch.delenv(POLICY_VARIABLE, raising=False)
    if variable is not None:
        monkeypatch.setenv(POLICY_VARIABLE, variable)
    config = _config_of({**GIVEN, **given})
    assert config.policy == policy
    assert ("--policy" in config.command) == (policy is not None)


@pytest.mark.parametrize(
    ("content", "words"),
    [({**GIVEN, "sede": 1}, "no key 'sede'. Did you mean 'seed'"), ({"model_uri": "models:/digits/3"}, "needs 'clean'")],
)
def test_a_wrong_config_is_one_line(content, words):
    with pytest.raises(UsageError, match=words):
        _config_of(content)
