"""What MLflow's entry points name for ``audited+<database>`` URIs.

A module of its own because every client of MLflow's registry imports it, while only servers need the store and its database.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlflow.environment_variables import MLFLOW_ENABLE_WORKSPACES
from mlflow.exceptions import MlflowException

from audit_plugin.errors import AuditError

if TYPE_CHECKING:
    from mlflow_plugins.registry_store import PromotionGate

_SCHEME = "audited+"


def audited_store(store_uri: str | None = None, tracking_uri: str | None = None) -> PromotionGate:
    """The promotion gate before a database.

    Raises:
        MlflowException: the policy or a key cannot be read.
    """
    from mlflow_plugins.registry_store import PromotionGate, WorkspacePromotionGate

    gate = WorkspacePromotionGate if MLFLOW_ENABLE_WORKSPACES.get() else PromotionGate
    try:
        return gate((store_uri or "").removeprefix(_SCHEME))
    except AuditError as error:
        raise MlflowException.invalid_parameter_value(f"The promotion gate cannot start: {error}") from error
