"""Which versions a scan is about, and which clean images belong to each."""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from audit_plugin.canonical import document_digest
from audit_plugin.errors import UsageError, nearest
from audit_plugin.gate import VersionFacts, is_protected
from audit_plugin.model.input_spec import input_tags
from audit_plugin.policy import GatePolicy, Policy
from audit_plugin.registry import facts_of, registered_version
from audit_plugin.report.sanitise import clean_text
from mlflow_plugins.prompts import CALLED_PROMPT, is_prompt

CLEAN_IMAGES_TAG = "audit.input.clean_images"
_MODELS_A_PAGE, _VERSIONS_A_PAGE = 500, 1000
_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


@dataclass(frozen=True)
class Scope:
    """What a scan looks at: versions that meet every condition given; all of them by default.

    Attributes:
        filter: in MLflow's language for model versions.
        aliases: a version has one of them.
        promoted: it has an alias or stage that the policy protects.
        since: it was registered then or later: a duration such as ``7d``, or a date in ISO format, UTC.
    """

    filter: str | None = None
    aliases: tuple[str, ...] = ()
    promoted: bool = False
    since: str | None = None

    def __post_init__(self) -> None:
        self.begin(datetime.datetime.now(datetime.UTC))

    @property
    def mark(self) -> str:
        """The same for the same scope, another one for another."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def begin(self, now: datetime.datetime) -> datetime.datetime | None:
        """The time before which a version is too old.

        Raises:
            UsageError: ``since`` is neither a duration nor a date, or is a date to come.
        """
        if self.since is None:
            return None
        try:
            if found := re.fullmatch(r"([0-9]{1,6})([mhdw])", self.since.strip()):
                return now - datetime.timedelta(**{_UNITS[found[2]]: int(found[1])})
            begin = datetime.datetime.fromisoformat(self.since.strip())
        except (ValueError, OverflowError) as error:
            raise UsageError(
                f"'{clean_text(self.since, 40)}' is no time to scan from. Give a duration such as 12h, 7d or 2w, or a date such "
                "as 2026-01-31."
            ) from error
        begin = begin if begin.tzinfo else begin.replace(tzinfo=datetime.UTC)
        if begin > now:
            raise UsageError(
                f"'{clean_text(self.since, 40)}' is yet to come (dates are in UTC), so no version can be in scope. Give an "
                "earlier date, or a duration such as 7d."
            )
        return begin


@dataclass(frozen=True)
class Found:
    """A version in scope.

    Attributes:
        aliases: those that point to it.
        is_promoted: it holds an alias or stage that the policy protects.
        model_tags: tags of the registered model; untrusted, as those of the version are.
        poses_as_prompt: a tag hides it from MLflow's own search, although it has files.
        source: where its files are, as the registry names it.
    """

    facts: VersionFacts
    aliases: tuple[str, ...]
    is_promoted: bool
    model_tags: Mapping[str, str]
    poses_as_prompt: bool
    source: str


def find_versions(client: MlflowClient, scope: Scope, gate: GatePolicy) -> list[Found]:
    """Every version in scope, promoted ones first, then the newest first. Prompts are none.

    Raises:
        UsageError: MLflow does not understand the filter.
    """
    begin = scope.begin(datetime.datetime.now(datetime.UTC))
    models = {model.name: model for model in _models(client)}
    found = {}
    for version in _versions(client, scope.filter, models):
        model, facts = models.get(version.name), facts_of(version)
        held = sorted(alias for alias, number in (model.aliases if model else {}).items() if str(number) == facts.version)
        stage = version.current_stage
        promoted = any(is_protected(alias, gate.protected_aliases) for alias in held) or (
            stage not in (None, "None") and is_protected(stage, gate.protected_stages)
        )
        if (
            not is_prompt(version)
            and (not scope.aliases or set(scope.aliases) & set(held))
            and (promoted or not scope.promoted)
            and (begin is None or facts.created >= begin)
        ):
            tags = dict(model.tags) if model else {}
            found[facts.uri] = Found(facts, tuple(held), promoted, tags, bool(version._is_prompt()), version.source or "")
    return sorted(found.values(), key=lambda entry: (not entry.is_promoted, -entry.facts.created.timestamp(), entry.facts.uri))


def inputs_of(entry: Found) -> str:
    """Digest of the tags that say how images become a version's input, and which clean images it is audited with."""
    return document_digest({"version": input_tags(entry.facts.tags), "model": entry.model_tags.get(CLEAN_IMAGES_TAG)})


def clean_images_key(entry: Found, policy: Policy) -> str:
    """The key of the policy's [clean_images] that a version is audited with.

    It is named by the tag ``audit.input.clean_images`` of the version, else of the registered model; else by the model's name.
    A tag can only choose among what the policy offers, for any client can write it.

    Raises:
        UsageError: there is none.
    """
    offered = policy.clean_images
    for tags, owner in ((entry.facts.tags, entry.facts.uri), (entry.model_tags, f"the model '{entry.facts.name}'")):
        key = tags.get(CLEAN_IMAGES_TAG)
        if key is not None:
            if key in offered:
                return key
            raise UsageError(
                f"The tag {CLEAN_IMAGES_TAG} of {owner} is '{clean_text(key, 80)}', which is no key of the policy's "
                f"[clean_images].{nearest(key, offered)}"
            )
    key = policy.clean_images_key(entry.facts.name)
    if key is None:
        raise UsageError(f"No name or pattern in the policy's [clean_images] matches '{entry.facts.name}'.")
    return key


def _models(client: MlflowClient) -> Iterator[RegisteredModel]:
    yield from _pages(lambda token: client.search_registered_models(None, _MODELS_A_PAGE, page_token=token))
    yield from _pages(lambda token: client.search_registered_models(CALLED_PROMPT, _MODELS_A_PAGE, page_token=token))


def _versions(client: MlflowClient, wanted: str | None, models: Mapping[str, RegisteredModel]) -> Iterator[ModelVersion]:
    """Those that MLflow's search hides too: one version with the tag of a prompt hides all versions of its model."""
    hidden = f"{wanted} AND {CALLED_PROMPT}" if wanted else CALLED_PROMPT
    try:
        yield from _search(client, wanted)
        tagged = list(_search(client, hidden))
    except MlflowException as error:
        if wanted and error.error_code == "INVALID_PARAMETER_VALUE":
            raise UsageError(f"MLflow does not understand the filter: {clean_text(error.message)}") from error
        raise
    yield from tagged
    if wanted:  # whether it fits the others can only be told by MLflow's search
        return
    seen = {(version.name, str(version.version)) for version in tagged}
    for name in sorted({version.name for version in tagged}):
        latest = models[name].latest_versions if name in models else []  # it may have come after the models were listed
        highest = max(int(version.version) for version in (*latest, *tagged) if version.name == name)
        for number in range(1, highest + 1):
            if (name, str(number)) not in seen:
                try:
                    yield registered_version(client, name, str(number))
                except MlflowException as error:
                    if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                        raise


def _search(client: MlflowClient, text: str | None) -> Iterator[ModelVersion]:
    # In MLflow's own order a version whose tags change moves to the front, and others move past the end of a page.
    order = ["creation_timestamp ASC"]
    return _pages(lambda token: client.search_model_versions(text, _VERSIONS_A_PAGE, order, token))


def _pages(search: Callable[[str | None], Any]) -> Iterator[Any]:
    token: str | None = None
    while True:
        page = search(token)
        yield from page
        token = page.token
        if not token:
            return
