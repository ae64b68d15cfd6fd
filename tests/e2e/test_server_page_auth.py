"""The audit page behind MLflow's own authentication: who sees what."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys

import lxml.html
import pytest
import requests

from tests.audited_registry import AuditedRegistry, trigger_picture

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("flask_wtf") is None, reason="MLflow's authentication is missing (pip install '.[auth]')"
)

ADMIN, PASSWORD = "admin", "a-long-password-for-everybody"
SECRETS = {"MLFLOW_FLASK_SERVER_SECRET_KEY": "a secret of the tests", "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD}
ROUTES = [
    ("GET", ""),
    ("GET", "?text=closed"),
    ("GET", "model?name=closed"),
    ("GET", "trigger.png?name=closed&version=1"),
    ("POST", "compare?name=closed&version=1"),
]


@pytest.fixture(scope="module")
def start_guarded(start_server, keeping_state, tmp_path_factory):
    """``start_guarded(default_permission)``: address of a server with two models, and a client of its users."""

    @contextlib.contextmanager
    def start(default):
        from mlflow.server.auth.client import AuthServiceClient

        folder = tmp_path_factory.mktemp("guarded")
        registry = AuditedRegistry(folder)
        for name in ("open", "closed"):
            registry.add(name, "fail", suspected="Stop")
        settings = folder / "auth.ini"
        settings.write_text(
            f"[mlflow]\ndefault_permission = {default}\ndatabase_uri = sqlite:///{folder}/auth.db\nadmin_username = {ADMIN}\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        )
        environment = registry.environment | SECRETS
        environment |= {"BACKDOOR_AUDIT_AUTH": "basic", "MLFLOW_AUTH_CONFIG_PATH": str(settings)}
        with start_server(folder, "--app-name", "backdoor-audit", **environment) as address, keeping_state():
            os.environ |= {"MLFLOW_TRACKING_USERNAME": ADMIN, "MLFLOW_TRACKING_PASSWORD": PASSWORD}
            yield address, AuthServiceClient(address), registry

    return start


@pytest.fixture(scope="module")
def opening(start_guarded):
    """A server on which everybody may read what no grant speaks of."""
    with start_guarded("READ") as (address, users, registry):
        experiment = registry.client.get_experiment_by_name("backdoor-audits").experiment_id
        for name in ("reader", "barred", "without-runs"):
            users.create_user(name, PASSWORD)
        users.grant_user_permission("barred", "registered_model", "closed", "DENY")
        users.grant_user_permission("without-runs", "experiment", experiment, "DENY")
        yield address


@pytest.fixture(scope="module")
def closing(start_guarded):
    """A server on which nobody may read anything without a grant."""
    with start_guarded("NO_PERMISSIONS") as (address, users, registry):
        experiment = registry.client.get_experiment_by_name("backdoor-audits").experiment_id
        for name in ("reader", "granted", "granted-runs"):
            users.create_user(name, PASSWORD)
        users.grant_user_permission("granted", "registered_model", "closed", "READ")
        users.grant_user_permission("granted-runs", "registered_model", "closed", "READ")
        users.grant_user_permission("granted-runs", "experiment", experiment, "READ")
        yield address


def ask(address, user, path, method="GET"):
    credentials = (user, PASSWORD) if user else None
    return requests.request(method, f"{address}/backdoor-audit/{path}", auth=credentials, timeout=60, allow_redirects=False)


def models(response):
    assert response.status_code == 200
    return {link.text for link in lxml.html.fromstring(response.content).cssselect(".versions .name")}


def is_told(response):
    """Whether anything of the closed model is in an answer, beyond what was asked."""
    return response.ok and ("Stop" in response.text or "sha256" in response.text or response.content == trigger_picture())


@pytest.mark.parametrize(("method", "path"), [*ROUTES, ("GET", "page.css"), ("HEAD", ""), ("POST", "")])
@pytest.mark.parametrize("credentials", [None, ("reader", "wrong"), ("nobody", PASSWORD)])
def test_anonymous_visitors_get_nothing(opening, method, path, credentials):
    response = requests.request(method, f"{opening}/backdoor-audit/{path}", auth=credentials, timeout=60)
    assert response.status_code == 401
    assert "Basic" in response.headers["WWW-Authenticate"]
    assert not is_told(response)
    assert "closed" not in response.text


def test_mlflow_itself_is_guarded_too(opening):
    assert requests.get(f"{opening}/api/2.0/mlflow/registered-models/search", timeout=60).status_code == 401
    assert requests.get(f"{opening}/", timeout=60).status_code == 401


def test_administrator_sees_everything(closing):
    assert models(ask(closing, ADMIN, "")) == {"open", "closed"}
    assert ask(closing, ADMIN, "trigger.png?name=closed&version=1").content == trigger_picture()


def test_default_permission_counts(opening, closing):
    assert models(ask(opening, "reader", "")) == {"open", "closed"}
    assert models(ask(closing, "reader", "")) == set()
    tiles = lxml.html.fromstring(ask(closing, "reader", "").content).cssselect(".tile strong")
    assert {tile.text for tile in tiles} == {"0"}


def test_grants_count_in_both_directions(opening, closing):
    assert models(ask(opening, "barred", "")) == {"open"}
    assert models(ask(closing, "granted", "")) == {"closed"}


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_who_may_not_read_a_model_learns_nothing_of_it_on_any_route(opening, closing, method, path):
    for address, user in ((opening, "barred"), (closing, "reader")):
        response = ask(address, user, path, method)
        assert response.status_code == (200 if path in ("", "?text=closed") else 404)
        assert not is_told(response) or (address == opening and path == "")  # there, of the model 'open'
    absent = ask(opening, "barred", path.replace("closed", "absent"), method)
    assert absent.status_code == ask(opening, "barred", path, method).status_code


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_who_may_read_a_model_gets_every_route(opening, closing, method, path):
    for address, user in ((opening, "reader"), (closing, "granted-runs")):
        assert is_told(ask(address, user, path, method))


def test_pictures_figures_and_links_need_the_runs_too(opening, closing):
    for address, user in ((opening, "without-runs"), (closing, "granted")):
        assert ask(address, user, "trigger.png?name=closed&version=1").status_code == 404
        history = lxml.html.fromstring(ask(address, user, "model?name=closed").content)
        assert not history.cssselect("img, dl.figures")
        assert [link.text for link in history.cssselect(".links a")] == ["Version"]


def test_page_without_its_last_slash_leads_to_it(opening):
    assert ask(opening, "reader", "../backdoor-audit").headers["Location"].endswith("/backdoor-audit/")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"BACKDOOR_AUDIT_AUTH": "yes"}, "BACKDOOR_AUDIT_AUTH must be 'basic' or not set, got 'yes'."),
        pytest.param({"BACKDOOR_AUDIT_AUTH": "basic"}, "A static secret key needs to be set", marks=pytest.mark.slow),
        pytest.param(
            {"BACKDOOR_AUDIT_AUTH": "basic", "MLFLOW_FLASK_SERVER_SECRET_KEY": "x"},
            "MLFLOW_AUTH_ADMIN_PASSWORD",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_server_that_cannot_be_guarded_does_not_start(tmp_path, environment, message):
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", "1", "--app-name", "backdoor-audit"]
    started = subprocess.run(
        [*command, "--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db"],
        cwd=tmp_path,
        env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert started.returncode != 0
    assert message in started.stderr
