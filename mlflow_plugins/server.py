"""The audit page in the MLflow server: ``mlflow server --app-name backdoor-audit`` is MLflow as usual plus ``/backdoor-audit/``.

It reads, and changes nothing. With ``BACKDOOR_AUDIT_AUTH=basic`` MLflow's own authentication guards the server, and the page
shows only models that the visitor may read in MLflow.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib.resources
import json
import logging
import os
import re
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import jinja2
from fastapi import FastAPI
from flask import Blueprint, Flask, Response, abort, g, request, url_for
from markupsafe import Markup, escape
from mlflow.entities import Run, ViewType
from mlflow.entities.model_registry import ModelVersion
from mlflow.environment_variables import _MLFLOW_SGI_NAME, MLFLOW_ENABLE_WORKSPACES
from mlflow.exceptions import MlflowException
from mlflow.server import app as mlflow_app
from mlflow.server.handlers import _add_static_prefix, _get_model_registry_store, _get_tracking_store
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from werkzeug.exceptions import HTTPException

from audit_plugin.errors import AttestationError, AuditError, UsageError
from audit_plugin.gate import Requirements, held_statement, standing_of
from audit_plugin.policy import POLICY_VARIABLE
from audit_plugin.registry import EXPERIMENT, facts_of
from audit_plugin.report.html import report_environment
from audit_plugin.report.sanitise import clean_text
from audit_plugin.requirements import load_requirements
from mlflow_plugins.overview import (
    EXPIRED,
    PROMOTION_FILTERS,
    SORTS,
    VERDICT_FILTERS,
    WITHOUT_VERDICT,
    VersionRow,
    View,
    in_order,
    is_shown,
    page_of,
    picture_of,
    row_of,
    view_of,
)
from mlflow_plugins.prompts import CALLED_PROMPT, is_prompt
from mlflow_plugins.registry_store import artifact_digest, behind_the_proxy, why_unreadable

log = logging.getLogger(__name__)

AUTH = "BACKDOOR_AUDIT_AUTH"
_LARGEST_PICTURE = 512 * 1024
_PNG = b"\x89PNG\r\n\x1a\n"
_SNAPSHOT_SECONDS = 20
_SEARCHES = (None, CALLED_PROMPT)
_METRICS = {
    "clean_accuracy": "Clean accuracy",
    "trigger_size_pixels": "Trigger size, pixels",
    "trigger_outlier": "Trigger outlier score",
    "trigger_attack_success_rate": "Trigger success",
}
_COMPARING = threading.Lock()  # the gate hashes at most two at a time: one is left for promotions
_POLICY_OF_PAGES = (
    "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)


def with_auth(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether MLflow's authentication is asked for.

    Raises:
        MlflowException: the variable has another value than ``basic``, or MLflow's authentication is not installed or too old.
    """
    value = environment.get(AUTH, "")
    if value not in ("", "basic"):
        raise MlflowException.invalid_parameter_value(f"{AUTH} must be 'basic' or not set, got '{value[:40]}'.")
    if not value:
        return False
    try:
        from mlflow.server.auth import retention_gate  # noqa: F401
    except ImportError as error:
        raise MlflowException.invalid_parameter_value(
            f"{AUTH}=basic needs MLflow 3.17 or later with its extra 'auth' ({error}). "
            "Run: pip install 'mlflow-backdoor-audit[auth]'"
        ) from error
    return True


def _check_auth() -> None:
    """That authentication can start: there is a secret key, and an administrator or the password to make one with."""
    from mlflow.server import auth

    auth.get_flask_server_secret_key()
    auth.bootstrap_admin_user()


# `mlflow server` imports this module once, before it starts workers. It restarts workers that die, without end, so that what
# keeps authentication from starting has to come up here. MLflow does the same, but only for its own app.
_WITH_AUTH = with_auth()
if _WITH_AUTH:
    _check_auth()


def create_app(app: Flask = mlflow_app) -> Flask | FastAPI:
    """MLflow's app with the audit page: what the entry point ``backdoor-audit`` of the group ``mlflow.app`` names.

    A policy or key that cannot be read is told on the page, which then shows no data; MLflow itself works as usual.

    Raises:
        MlflowException: authentication was asked for and cannot be had.
    """
    app.register_blueprint(audit_page(_requirements(), guarded=_WITH_AUTH))
    served: Flask | FastAPI = app
    if _WITH_AUTH:
        from mlflow.server import auth

        _open_to_authenticated(app)
        served = auth.create_app(app)
    elif _MLFLOW_SGI_NAME.get() == "uvicorn":
        from mlflow.server.fastapi_app import create_fastapi_app

        served = create_fastapi_app(app)
    return served


def _requirements() -> Requirements | str:
    """What promotion asks for; one line where that cannot be read."""
    path = os.environ.get(POLICY_VARIABLE)
    try:
        return load_requirements(Path(path) if path else None)
    except AuditError as error:
        log.error("The audit page shows nothing: %s", error)
        return str(error)


def _open_to_authenticated(app: Flask) -> None:
    """MLflow refuses routes for which nobody decides who may use them; these do so themselves, for each model."""
    from mlflow.server.auth import BEFORE_REQUEST_VALIDATORS

    for rule in app.url_map.iter_rules():
        if rule.endpoint.startswith("backdoor_audit."):
            for method in rule.methods or ():
                BEFORE_REQUEST_VALIDATORS[rule.rule, method] = lambda: True
                BEFORE_REQUEST_VALIDATORS[rule.rule.rstrip("/"), method] = lambda: True


# ------------------------------------------------------------------------------------------------------ who may see what


@dataclass(frozen=True)
class Visitor:
    """What somebody may read: a model's versions by its name and whether MLflow takes it for a prompt; audits' runs."""

    may_read: Callable[[str, bool], bool] = lambda name, is_called_prompt: True
    may_read_runs: Callable[[str], bool] = lambda experiment_id: True


def _visitor(guarded: bool) -> Visitor:
    if not guarded:
        return Visitor()
    username = g.get("mlflow_authenticated_user")
    if username is None:
        abort(401)
    from mlflow.server import auth
    from mlflow.server.auth import permissions as kinds
    from mlflow.server.auth.requirements import ACTION_NOT_DENIED, Requirement

    if auth.store.get_user(username).is_admin:
        return Visitor()
    anchor = (kinds.RESOURCE_TYPE_WORKSPACE, "*")
    wanted = [
        Requirement(kinds.RESOURCE_TYPE_REGISTERED_MODEL, "*", "read"),
        Requirement(kinds.RESOURCE_TYPE_REGISTERED_MODEL_VERSION, "*", ACTION_NOT_DENIED),
        Requirement(kinds.RESOURCE_TYPE_PROMPT, "*", "read"),
        Requirement(kinds.RESOURCE_TYPE_PROMPT_VERSION, "*", ACTION_NOT_DENIED),
        Requirement(kinds.RESOURCE_TYPE_EXPERIMENT, "*", "read"),
        Requirement(kinds.RESOURCE_TYPE_RUN, "*", ACTION_NOT_DENIED),
    ]
    gate = auth.retention_gate(username, anchor, wanted)

    def may_read(name: str, is_called_prompt: bool) -> bool:
        as_model = gate.retains(kinds.RESOURCE_TYPE_REGISTERED_MODEL, name)
        as_model = as_model and gate.retains(kinds.RESOURCE_TYPE_REGISTERED_MODEL_VERSION)
        as_prompt = gate.retains(kinds.RESOURCE_TYPE_PROMPT, name) and gate.retains(kinds.RESOURCE_TYPE_PROMPT_VERSION)
        return as_model and (as_prompt or not is_called_prompt)

    def may_read_runs(experiment_id: str) -> bool:
        return gate.retains(kinds.RESOURCE_TYPE_EXPERIMENT, experiment_id) and gate.retains(kinds.RESOURCE_TYPE_RUN)

    return Visitor(may_read, may_read_runs)


# ------------------------------------------------------------------------------------------------------- what there is


class Registry:
    """Reads the server's stores. What is read of all versions is kept for seconds, so that paging and filtering are quick."""

    def __init__(self, requirements: Requirements) -> None:
        self.requirements = requirements
        self._lock = threading.Lock()
        self._kept: tuple[tuple[VersionRow, ...], datetime.datetime] | None = None

    def rows(self, visitor: Visitor, *, fresh: bool) -> tuple[list[VersionRow], datetime.datetime]:
        """Every version that the visitor may read, and when they were looked up; anew if ``fresh``, or after seconds."""
        rows, taken = self._snapshot(fresh)
        return [row for row in rows if visitor.may_read(row.name, row.is_called_prompt)], taken

    def _snapshot(self, fresh: bool) -> tuple[tuple[VersionRow, ...], datetime.datetime]:
        if MLFLOW_ENABLE_WORKSPACES.get():  # each workspace has a registry of its own
            return self._read()
        with self._lock:
            now = datetime.datetime.now(datetime.UTC)
            if self._kept is None or fresh or now - self._kept[1] > datetime.timedelta(seconds=_SNAPSHOT_SECONDS):
                self._kept = self._read()
            return self._kept

    def _read(self) -> tuple[tuple[VersionRow, ...], datetime.datetime]:
        store = _get_model_registry_store()
        now = datetime.datetime.now(datetime.UTC)
        aliases: dict[tuple[str, str], list[str]] = {}
        for model in _all(store.search_registered_models, 1000):
            for alias, version in model.aliases.items():
                aliases.setdefault((model.name, str(version)), []).append(alias)
        rows = (
            row_of(version, aliases.get((version.name, str(version.version)), ()), self.requirements, now)
            for version in _all(store.search_model_versions, 10_000)
            if not is_prompt(version)
        )
        return tuple(rows), now

    def version(self, name: str, version: str) -> ModelVersion | None:
        """A version as it is now; None if there is none, or it is a prompt."""
        if not (version.isascii() and version.isdecimal() and len(version) < 10):
            return None
        try:
            found = _get_model_registry_store().get_model_version(name, version)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise
        return None if is_prompt(found) else found

    def runs(self, identifiers: Collection[str], visitor: Visitor) -> dict[str, Run]:
        """Runs of audits by id, those that exist and that the visitor may read."""
        wanted = sorted({run_id for run_id in identifiers if re.fullmatch("[0-9a-f]{32}", run_id)})
        store = _get_tracking_store()
        experiment = store.get_experiment_by_name(EXPERIMENT) if wanted else None
        if experiment is None or not visitor.may_read_runs(experiment.experiment_id):
            return {}
        text = f"attributes.run_id IN ({', '.join(repr(run_id) for run_id in wanted)})"
        found = store.search_runs([experiment.experiment_id], text, ViewType.ACTIVE_ONLY, max_results=len(wanted))
        return {run.info.run_id: run for run in found}

    def picture(self, version: ModelVersion, visitor: Visitor) -> bytes | None:
        """The picture of the suspected class's trigger, if it is a small PNG and the very one that the audit signed."""
        try:
            attestation = held_statement(facts_of(version), "verdict", self.requirements.verdict_keys)
        except AttestationError:
            return None
        picture = picture_of(attestation) if attestation else None
        if attestation is None or picture is None:
            return None
        path, signed = picture
        run_id = str(attestation.facts.get("run_id"))
        run = self.runs([run_id], visitor).get(run_id)
        content = _small_file(run.info.artifact_uri, path) if run else None
        return content if content is not None and _is_signed_png(content, signed) else None


def _all(search: Callable[..., Any], page_size: int) -> Iterator[Any]:
    """All that a store's search finds, also what MLflow takes for prompts: the tag that says so hides a model from its search."""
    for condition in _SEARCHES:
        token = None
        while True:
            found = search(filter_string=condition, max_results=page_size, page_token=token)
            yield from found
            token = found.token
            if not token:
                break


def _small_file(place: str, path: str) -> bytes | None:
    try:
        repository = get_artifact_repository(behind_the_proxy(place))
        sizes = {entry.path: entry.file_size for entry in repository.list_artifacts(path.rpartition("/")[0])}
        if not 0 < (sizes.get(path) or 0) <= _LARGEST_PICTURE:
            return None
        with tempfile.TemporaryDirectory(prefix="backdoor-audit-") as temporary:
            return Path(repository.download_artifacts(path, temporary)).read_bytes()
    except Exception:  # each artifact store has errors of its own
        log.debug("A picture could not be read.", exc_info=True)
        return None


def _is_signed_png(content: bytes, signed: str) -> bool:
    return content.startswith(_PNG) and hashlib.sha256(content).hexdigest() == signed


# ----------------------------------------------------------------------------------------------------------- the pages


def audit_page(requirements: Requirements | str, *, guarded: bool) -> Blueprint:
    """The routes below ``/backdoor-audit/``.

    Names of models are parameters of the query, never part of a path: they may hold almost anything.

    Args:
        requirements: what promotion asks for, or the one line that says why it is not known; then no data is shown.
        guarded: whether MLflow's authentication stands before the app, so that visitors see what they may read.
    """
    page = Blueprint("backdoor_audit", __name__, url_prefix=_add_static_prefix("/backdoor-audit"))
    registry = None if isinstance(requirements, str) else Registry(requirements)

    def opened() -> tuple[Registry, Visitor]:
        visitor = _visitor(guarded)
        if registry is None:
            abort(503, str(requirements))
        return registry, visitor

    def visible_version() -> tuple[Registry, Visitor, ModelVersion]:
        registry, visitor = opened()
        name, number = request.args.get("name", ""), request.args.get("version", "")
        # What is not there and what may not be read look alike.
        found = registry.version(name, number) if visitor.may_read(name, False) else None
        if found is None or not visitor.may_read(name, bool(found._is_prompt())):
            abort(404, f"There is no version {number} of a model '{name}', or you may not read it.")
        return registry, visitor, found

    @page.get("/")
    def overview() -> Response:
        registry, visitor = opened()
        view = view_of(request.args)
        rows, taken = registry.rows(visitor, fresh=_wants_fresh())
        chosen = in_order((row for row in rows if is_shown(row, view)), view)
        shown, number, pages = page_of(chosen, view)
        return _html(
            "overview.html.jinja",
            view=view,
            rows=shown,
            runs=registry.runs([row.run_id or "" for row in shown], visitor),
            chosen=len(chosen),
            total=len(rows),
            number=number,
            pages=pages,
            tiles=_tiles(rows, view),
            called_prompts=sorted({row.name for row in rows if row.is_called_prompt}),
            has_keys=bool(registry.requirements.verdict_keys.keys),
            taken=taken,
        )

    @page.get("/model")
    def history() -> Response:
        registry, visitor = opened()
        name = request.args.get("name", "")
        view = view_of({"page": request.args.get("page", "")})
        rows, taken = registry.rows(visitor, fresh=_wants_fresh())
        versions = sorted((row for row in rows if row.name == name), key=lambda row: -row.version)
        if not versions:
            abort(404, f"There is no model '{name}' with versions, or you may not read it.")
        shown, number, pages = page_of(versions, view)
        return _html(
            "history.html.jinja",
            name=name,
            rows=shown,
            runs=registry.runs([row.run_id or "" for row in shown], visitor),
            metrics=_METRICS,
            total=len(versions),
            number=number,
            pages=pages,
            has_keys=bool(registry.requirements.verdict_keys.keys),
            taken=taken,
        )

    @page.get("/trigger.png")
    def trigger() -> Response:
        registry, visitor, version = visible_version()
        content = registry.picture(version, visitor)
        if content is None:
            abort(404, "The audit signed no picture of a trigger, or another is in its place now.")
        response = Response(content, mimetype="image/png")
        response.headers["Cache-Control"] = "private, max-age=300"
        response.headers["Content-Security-Policy"] = "default-src 'none'; sandbox"
        return response

    @page.post("/compare")
    def compare() -> Response:
        """Hash the files of a version and compare them with those that were audited."""
        hosts = {request.host, request.headers.get("X-Forwarded-Host", request.host)}
        if not _is_own_request(request.headers.get("Sec-Fetch-Site"), request.headers.get("Origin"), hosts):
            abort(403, "Ask for this from the audit page itself. A proxy before the server must pass the Host header on.")
        registry, _, version = visible_version()
        if not _COMPARING.acquire(blocking=False):
            abort(503, "A comparison is under way already. Try again in a minute.")
        try:
            found = _compare(version, registry.requirements)
        finally:
            _COMPARING.release()
        if request.accept_mimetypes.best == "application/json":
            return Response(json.dumps(found), mimetype="application/json")
        return _html("comparison.html.jinja", name=version.name, version=version.version, **found)

    @page.get("/icon.svg")
    def icon() -> Response:
        return _asset("image/svg+xml", _template("icon.svg"))

    @page.get("/page.css")
    def style() -> Response:
        return _asset("text/css", _style())

    @page.get("/page.js")
    def script() -> Response:
        return _asset("text/javascript", _template("page.js"))

    @page.after_request
    def harden(response: Response) -> Response:
        for name, value in {
            "Content-Security-Policy": _POLICY_OF_PAGES,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-store",
        }.items():
            response.headers.setdefault(name, value)
        return response

    @page.errorhandler(HTTPException)
    def refused(error: HTTPException) -> Response:
        return _html("message.html.jinja", error.code or 500, title=error.name, message=error.description or "")

    @page.errorhandler(UsageError)
    def misused(error: UsageError) -> Response:
        return _html("message.html.jinja", 400, title="Bad request", message=str(error))

    @page.errorhandler(MlflowException)
    def failed(error: MlflowException) -> Response:
        log.error("The audit page could not be made: %s", clean_text(error, 1000))
        return _html("message.html.jinja", 500, title="MLflow could not answer", message=error.message)

    return page


def _is_own_request(site: str | None, origin: str | None, hosts: Collection[str]) -> bool:
    """Whether no page of another site sent it: that could set none of these headers. Plain HTTP has no Sec-Fetch-Site."""
    if site is not None:
        return site == "same-origin"
    try:
        return origin is None or urlsplit(origin).netloc in hosts
    except ValueError:  # no address, such as 'http://['
        return False


def _compare(version: ModelVersion, requirements: Requirements) -> dict[str, Any]:
    """``result`` is 'same', 'changed', 'no audit' or 'unreadable'; ``promotion`` says what a promotion would meet now."""
    facts = facts_of(version)
    location = _get_model_registry_store().get_model_version_download_uri(version.name, str(version.version))
    try:
        digest = artifact_digest(location)
    except Exception as error:  # each artifact store has errors of its own
        log.debug("The files of %s could not be hashed.", clean_text(facts.uri), exc_info=True)
        message = f"The files cannot be compared with the audit. {why_unreadable(error)}"
        return {"result": "unreadable", "message": message, "digest": None}
    standing = standing_of(facts, requirements, digest=digest)
    if standing.attestation is None:
        message, result = "There is no valid signed audit to compare the files with.", "no audit"
    elif digest == standing.attestation.digest:
        message, result = "The files are the ones that were audited.", "same"
    else:
        message, result = "The files were changed after the audit.", "changed"
    return {"result": result, "message": message, "digest": digest}


def _tiles(rows: Collection[VersionRow], view: View) -> list[dict[str, Any]]:
    """What to look at, each with the view that shows just that, and how many versions it shows."""
    wanted = [
        ("Promoted, but refused now", "alert", View(promotion="refused", promoted=True)),
        ("Waivers in force", "warn", View(promotion="waived")),
        ("Failed", "alert", View(verdict="fail")),
        ("Audit expired", "warn", View(promotion=EXPIRED)),
        ("Without a signed verdict", "warn", View(verdict=WITHOUT_VERDICT)),
        ("All versions", "", View()),
    ]
    return [
        {"label": label, "tone": tone, "view": tile, "count": sum(is_shown(row, tile) for row in rows), "current": tile == view}
        for label, tone, tile in wanted
    ]


def _wants_fresh() -> bool:
    """Whether the visitor pressed 'reload', which browsers tell by this header."""
    return request.cache_control.no_cache or request.cache_control.max_age == 0


def _html(template: str, status: int = 200, **values: Any) -> Response:
    content = (
        _templates()
        .get_template(template)
        .render(
            **values,
            url=_url,
            mlflow=_mlflow,
            now=datetime.datetime.now(datetime.UTC),
            verdict_filters=VERDICT_FILTERS,
            promotion_filters=PROMOTION_FILTERS,
            sorts=SORTS,
        )
    )
    return Response(content, status, mimetype="text/html")


def _url(endpoint: str, **parameters: Any) -> Markup:
    """The address of one of the routes, safe inside a quoted attribute."""
    return escape(url_for(f"backdoor_audit.{endpoint}", **parameters))


def _mlflow(*parts: object) -> Markup:
    """The address of a place in MLflow's own pages."""
    return escape(_add_static_prefix("/") + "#/" + "/".join(quote(str(part), safe="") for part in parts))


def _asset(kind: str, content: str) -> Response:
    response = Response(content, mimetype=kind)
    response.headers["Cache-Control"] = "no-cache"
    response.add_etag()
    response.make_conditional(request)
    return response


@functools.cache
def _templates() -> jinja2.Environment:
    """Those of the report, which make every expression harmless, over templates of our own."""
    environment = report_environment().overlay(loader=jinja2.PackageLoader(__package__, "templates"))
    environment.filters.update(ago=_ago, ahead=_ahead, minute=_minute, exact=escape, signed_time=_signed_time)
    return environment


@functools.cache
def _style() -> str:
    report = importlib.resources.files("audit_plugin.report").joinpath("templates/report.css").read_text("utf-8")
    return report + _template("page.css")


@functools.cache
def _template(name: str) -> str:
    return importlib.resources.files(__package__).joinpath("templates", name).read_text("utf-8")


def _ago(moment: datetime.datetime, now: datetime.datetime) -> str:
    """'3 days ago'; 'in 3 days' for a time to come."""
    return _ahead(moment, now) if moment > now else f"{_span(now - moment)} ago"


def _ahead(moment: datetime.datetime, now: datetime.datetime) -> str:
    return f"in {_span(moment - now)}"


def _span(span: datetime.timedelta) -> str:
    minutes = max(1, int(span.total_seconds() // 60))
    for unit, size in (("day", 24 * 60), ("hour", 60)):
        if minutes >= 2 * size:
            return f"{minutes // size} {unit}s"
    return "1 minute" if minutes == 1 else f"{minutes} minutes"


def _minute(moment: datetime.datetime) -> str:
    return f"{moment.astimezone(datetime.UTC):%Y-%m-%d %H:%M} UTC"


def _signed_time(text: object) -> datetime.datetime:
    """A time out of a statement that the gate has accepted."""
    return datetime.datetime.fromisoformat(str(text))
