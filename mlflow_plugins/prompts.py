"""Tells prompts from models, which MLflow's registry keeps side by side."""

from __future__ import annotations

from mlflow.entities.model_registry import ModelVersion

_PROMPT_TAG = "mlflow.prompt.is_prompt"
CALLED_PROMPT = f"tags.`{_PROMPT_TAG}` = 'true'"
"""Finds, in MLflow's search language, what its search leaves out otherwise."""
_PROMPT_SOURCES = ("prompt-template", "dummy-source")  # what MLflow writes where a prompt has no artifacts


def is_prompt(version: ModelVersion) -> bool:
    """Whether a version is a prompt, which has no artifacts to audit. Its tag alone, which any client can set, is no proof."""
    return _PROMPT_TAG in version.tags and version.source in _PROMPT_SOURCES
