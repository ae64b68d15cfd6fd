"""The audit page over a real registry in SQLite: what it says of a version, to whom, and what it never does."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import re
import shutil
from urllib.parse import urlencode

import lxml.html
import pytest
import sqlalchemy
from flask import Flask
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.server import handlers
from mlflow.server.constants import ARTIFACTS_DESTINATION_ENV_VAR, BACKEND_STORE_URI_ENV_VAR
from mlflow.tracking._model_registry import utils as registry_utils

from audit_plugin.attestation import VERIFYING_KEYS, Statement, VerifyingKeys
from audit_plugin.policy import GatePolicy
from mlflow_plugins import overview, server
from mlflow_plugins.overview import View, picture_of, view_of
from mlflow_plugins.server import AUTH, audit_page, create_app, with_auth
from tests.audited_registry import AuditedRegistry, trigger_picture

HOSTILE = "<img src=x onerror=alert(1)>\"'& \u202egpj.exe\u202c?a=b#c%2e"
ROOT = "/backdoor-audit/"


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    """``empty(folder)``: an empty registry there; MLflow needs seconds to set up a database, and one can be copied."""
    database = tmp_path_factory.mktemp("empty") / "mlflow.db"
    uri = f"sqlite:///{database}"
    MlflowClient(uri, uri).search_experiments()

    def make(folder):
        folder.mkdir(exist_ok=True)
        shutil.copy(database, folder)
        return AuditedRegistry(folder)

    return make


@pytest.fixture(scope="module")
def registry(empty, tmp_path_factory):
    filled = empty(tmp_path_factory.mktemp("registry"))
    filled.add("signs", "pass", age=44)
    filled.add("signs", "fail", age=5, suspected="Stop")
    filled.add("signs", "pass", age=33, aliases=("champion",))
    filled.add("signs", "inconclusive", age=3)
    filled.add("signs", age=0.5)
    filled.add("scans", "pass", age=12, aliases=("production", "blue"), stage="Production")
    filled.add("faces", "pass", age=40, waived_by="Ada Lovelace", aliases=("champion",))
    filled.add("faces", "pass", age=40, waived_by="Ada Lovelace", waived_for=-1 / 24 / 60)
    filled.add("parcels", tags={"audit.verdict": "pass", "audit.suspected_class": "box", "audit.run_id": "f" * 32}, age=1)
    filled.add("parcels", tags={"audit.verdict": "pass", "audit.attestation": "{}"}, age=1)
    filled.add("leaves", "pass", age=9, facts={"policy_digest": "sha256:old"})
    filled.add("leaves", "whatever", age=9)
    filled.add(HOSTILE, "fail", age=2, suspected="</td><script>alert(2)</script>")
    return filled


@pytest.fixture
def serve(registry, monkeypatch):
    """``serve(registry=..., requirements=..., guarded=...)``: a client of a fresh app with the page."""

    def make(served=registry, requirements=None, guarded=False):
        monkeypatch.setenv(BACKEND_STORE_URI_ENV_VAR, served.database)
        monkeypatch.setenv(ARTIFACTS_DESTINATION_ENV_VAR, str(served.folder / "artifacts"))
        for store in ("_model_registry_store", "_tracking_store"):
            monkeypatch.setattr(handlers, store, None)
        monkeypatch.setattr(registry_utils, "_registry_uri", None)  # which opening the stores changes for the whole process
        app = Flask("mlflow")
        app.register_blueprint(audit_page(requirements or served.requirements, guarded=guarded))
        return app.test_client()

    return make


@pytest.fixture
def client(serve):
    return serve()


@pytest.fixture
def other(empty, tmp_path):
    """A registry that a test may change."""
    return empty(tmp_path)


def page(client, path="", status=200, **parameters):
    response = client.get(f"{ROOT}{path}?{urlencode(parameters)}")
    assert response.status_code == status, response.text
    return lxml.html.fromstring(response.data)


def words(element):
    return " ".join(" ".join(element.itertext()).split())


def rows(document):
    """What each row of the table says, by 'name v1' (on a history page: 'v1')."""
    found = {}
    for row in document.cssselect(".versions tbody tr"):
        name = "".join(link.text_content() for link in row.cssselect("th .name"))
        number = row.cssselect("th .number")[0].text_content()
        found[f"{name} {number}".strip()] = row
    return found


def cell(row, label):
    return words(row.cssselect(f"td[data-label='{label}']")[0])


def versions(client, **parameters):
    return list(rows(page(client, **parameters)))


# -------------------------------------------------------------------------------------------------- what it says


@pytest.mark.parametrize(
    ("version", "verdict", "audited", "promotion"),
    [
        ("signs v1", "Pass", "44 days ago expired 14 days ago", "Refused Its audit is 44.0 days old"),
        ("signs v2", "Fail class Stop", "5 days ago counts until", "Refused Its audit says 'fail'."),
        ("signs v3", "Pass", "expired 3 days ago", "Refused but promoted Its audit is 33.0 days old"),
        ("signs v4", "Inconclusive", "3 days ago counts until", "Refused Its audit says 'inconclusive'."),
        ("signs v5", "Not audited", "no signed audit", "Refused It has no signed audit."),
        ("scans v1", "Pass", "12 days ago counts until", "Allowed"),
        ("faces v1", "Pass", "expired 10 days ago", "Waiver in force by Ada Lovelace until"),
        ("faces v2", "Pass", "expired 10 days ago", "Refused Its audit is 40.0 days old"),
        ("parcels v1", "Unsigned a tag says “pass” and class box", "no signed audit", "Refused It has no signed audit."),
        ("parcels v2", "Invalid a tag says “pass”", "no signed audit", "Refused The attestation is no DSSE envelope"),
        ("leaves v1", "Pass", "9 days ago", "Refused It was audited by another policy"),
        ("leaves v2", "Invalid", "no signed audit", "Refused Its audit says 'whatever'."),
    ],
)
def test_state_of_a_version(client, version, verdict, audited, promotion):
    row = rows(page(client))[version]
    assert cell(row, "Verdict") == verdict if verdict != "Invalid" else cell(row, "Verdict").startswith("Invalid")
    assert audited in cell(row, "Audited")
    assert cell(row, "Promotion").startswith(promotion)


def test_a_waiver_says_who_why_and_until_when_and_what_it_makes_up_for(client):
    row = rows(page(client))["faces v1"]
    assert row.get("class") == "waived"
    text = cell(row, "Promotion")
    assert re.search(r"until \d{4}-\d\d-\d\d \d\d:\d\d UTC \(in 2 days\)", text)
    assert "“Outage 4711, audit follows”" in text
    assert "Its audit is 40.0 days old" in text


def test_a_promoted_version_that_would_be_refused_stands_out_and_first(client):
    found = rows(page(client))
    assert next(iter(found)) == "signs v3"
    assert {name for name, row in found.items() if row.get("class") == "alarming"} == {"signs v3"}


def test_aliases_and_stage(client):
    assert "@blue @production Production" in words(rows(page(client))["scans v1"].cssselect("th")[0])


def test_tiles_count_what_their_views_show(client):
    document = page(client)
    for tile in document.cssselect(".tile"):
        shown = rows(lxml.html.fromstring(client.get(tile.get("href")).data))
        assert len(shown) == int(tile.cssselect("strong")[0].text), words(tile)
    counts = {words(tile.cssselect("span")[0]): int(tile.cssselect("strong")[0].text) for tile in document.cssselect(".tile")}
    assert counts == {
        "Promoted, but refused now": 1,
        "Waivers in force": 1,
        "Failed": 2,
        "Audit expired": 4,
        "Without a signed verdict": 4,
        "All versions": 13,
    }


def test_links_to_report_run_and_version_in_mlflow(client, registry):
    row = rows(page(client))["signs v2"]
    run_id = registry.client.get_model_version("signs", "2").tags["audit.run_id"]
    links = {link.text_content().split()[0]: link.get("href") for link in row.cssselect(".links a")}
    run = f"/#/experiments/{registry.client.get_run(run_id).info.experiment_id}/runs/{run_id}"
    assert links == {"Report": f"{run}/artifacts/report.html", "Run": run, "Version": "/#/models/signs/versions/2"}


def test_a_run_that_is_not_there_is_not_linked(client):
    row = rows(page(client))["parcels v1"]
    assert cell(row, "Open") == "Version of parcels v1"


def test_history_has_all_versions_newest_first_with_figures(client):
    document = page(client, "model", name="signs")
    assert list(rows(document)) == ["v5", "v4", "v3", "v2", "v1"]
    assert cell(rows(document)["v2"], "Figures") == "Clean accuracy 97.4 % Trigger outlier score 9.31"
    assert cell(rows(document)["v5"], "Figures") == "none"
    strip = [words(link) for link in document.cssselect(".strip a")]
    assert strip == ["v1 Pass", "v2 Fail", "v3 Pass", "v4 Inconclusive", "v5 Not audited"]


def test_history_of_no_model_is_404(client):
    assert "There is no model 'nothing'" in words(page(client, "model", 404, name="nothing"))


# ------------------------------------------------------------------------------------------- filters, order, pages


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"text": "SIGNS v2"}, {"signs v2"}),
        ({"text": "champion"}, {"signs v3", "faces v1"}),
        ({"text": "stop"}, {"signs v2"}),
        ({"text": "lovelace"}, {"faces v1"}),
        ({"text": "nothing like it"}, set()),
        ({"verdict": "inconclusive"}, {"signs v4"}),
        ({"verdict": "unsigned"}, {"parcels v1"}),
        ({"verdict": "invalid"}, {"parcels v2", "leaves v2"}),
        ({"verdict": "not audited"}, {"signs v5"}),
        ({"verdict": "none"}, {"parcels v1", "parcels v2", "leaves v2", "signs v5"}),
        ({"promotion": "allowed"}, {"scans v1"}),
        ({"promotion": "waived"}, {"faces v1"}),
        ({"promotion": "expired", "verdict": "pass", "text": "faces"}, {"faces v1", "faces v2"}),
        ({"promoted": "1"}, {"signs v3", "scans v1", "faces v1"}),
        ({"promoted": "1", "promotion": "refused"}, {"signs v3"}),
        ({"promoted": "0", "text": "scans"}, {"scans v1"}),
    ],
)
def test_filter(client, parameters, expected):
    assert set(versions(client, **parameters)) == expected


def test_order(client):
    assert versions(client, sort="name")[1:] == [  # without the hostile one
        "faces v2",
        "faces v1",
        "leaves v2",
        "leaves v1",
        "parcels v2",
        "parcels v1",
        "scans v1",
        "signs v5",
        "signs v4",
        "signs v3",
        "signs v2",
        "signs v1",
    ]
    assert versions(client, sort="name", descending="1")[:2] == ["signs v5", "signs v4"]
    assert versions(client, sort="audited", text="signs") == ["signs v4", "signs v2", "signs v3", "signs v1", "signs v5"]
    assert versions(client, sort="registered", text="signs") == ["signs v5", "signs v4", "signs v2", "signs v3", "signs v1"]
    assert versions(client, sort="verdict", text="signs") == ["signs v2", "signs v4", "signs v5", "signs v3", "signs v1"]


def test_headings_sort_and_turn_round_and_keep_the_filter(client):
    heading = page(client, sort="name", text="signs").cssselect("thead th")[0]
    assert heading.get("aria-sort") == "ascending"
    turned = lxml.html.fromstring(client.get(heading.cssselect("a")[0].get("href")).data)
    assert turned.cssselect("thead th")[0].get("aria-sort") == "descending"
    assert turned.cssselect("input[name=text]")[0].get("value") == "signs"
    assert len(turned.cssselect("thead th[aria-sort]")) == 1


def test_pages(client, monkeypatch):
    monkeypatch.setattr(overview, "PAGE_SIZE", 5)
    seen, document = [], page(client, sort="name")
    assert "Page 1 of 3" in words(document)
    while True:
        seen += rows(document)
        following = document.cssselect("a[rel=next]")
        if not following:
            break
        document = lxml.html.fromstring(client.get(following[0].get("href")).data)
    assert len(seen) == len(set(seen)) == 13
    assert seen == versions(client, sort="name", page=1) + versions(client, sort="name", page=2) + versions(
        client, sort="name", page=3
    )
    assert versions(client, sort="name", page=99) == versions(client, sort="name", page=3)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"verdict": "pas"}, "Did you mean 'pass'?"),
        ({"promotion": "x"}, "Valid names: allowed, expired, refused, waived."),
        ({"sort": "nmae"}, "Did you mean 'name'?"),
        ({"promoted": "yes"}, "'promoted' cannot be 'yes'."),
        ({"page": "0"}, "'page' must be a whole number from 1 on, got '0'."),
        ({"page": "-1"}, "got '-1'"),
        ({"page": "9" * 40}, "'page' must be"),
        ({"page": "<b>"}, "got '<b>'"),
    ],
)
def test_wrong_parameter_is_one_line(client, parameters, message):
    assert message in words(page(client, status=400, **parameters))


def test_view_and_its_address_are_one():
    view = View(text="a&b", verdict="none", promoted=True, sort="name", descending=True, page=3)
    assert view_of(view.parameters()) == view
    assert View().parameters() == {}


# ------------------------------------------------------------------------------------------------------- hostile text


def test_hostile_names_are_text_and_their_links_work(client, registry):
    response = client.get(ROOT)
    for raw in ("<img src=x", "<script>alert", "\u202e", 'onerror=alert(1)>"'):
        assert raw not in response.text
    row = next(row for name, row in rows(lxml.html.fromstring(response.data)).items() if "onerror" in name)
    link = row.cssselect("th a")[0]
    assert link.text_content() == HOSTILE.replace("\u202e", "\\u202e").replace("\u202c", "\\u202c")
    history = client.get(link.get("href"))
    assert history.status_code == 200
    assert "\u202e" not in history.text
    assert client.post(row.cssselect("form")[0].get("action")).status_code == 200
    picture = client.get(row.cssselect("img")[0].get("src"))
    assert picture.data == trigger_picture()
    assert cell(row, "Verdict") == "Fail class </td><script>a…t(2)</script>"


def test_hostile_search_text_stays_in_its_field(client):
    text = "\"><script>alert('\u202e')</script>"
    document = page(client, text=text)
    assert document.cssselect("input[name=text]")[0].get("value") == text
    assert [script.get("src") for script in document.cssselect("script")] == ["/backdoor-audit/page.js"]


def test_pages_carry_nothing_inline_and_refer_to_nowhere_else(client):
    for path in ("", "model?name=signs", "model?name=nothing", "?page=x"):
        text = client.get(ROOT + path).text
        document = lxml.html.fromstring(text)
        assert not document.cssselect("style, [style], iframe, object")
        assert not re.search(r"\son[a-z]+=", re.sub(r">[^<]*<|\"[^\"]*\"", "", text))
        for element in document.cssselect("[src], [href], [action]"):
            assert (element.get("src") or element.get("href") or element.get("action")).startswith(("/", "#"))


@pytest.mark.parametrize(
    "path", ["", "model?name=signs", "model?name=x", "page.css", "page.js", "icon.svg", "trigger.png?name=signs&version=1"]
)
def test_headers(client, path):
    headers = client.get(ROOT + path).headers
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == ("no-cache" if path in ("page.css", "page.js", "icon.svg") else "no-store")


def test_style_is_that_of_the_report_and_is_not_sent_twice(client):
    response = client.get(f"{ROOT}page.css")
    assert "--alert-wash" in response.text
    again = client.get(f"{ROOT}page.css", headers={"If-None-Match": response.headers["ETag"]})
    assert again.status_code == 304


def test_document_is_accessible(client):
    document = page(client)
    assert document.get("lang") == "en"
    assert len(document.cssselect("main")) == len(document.cssselect("h1")) == 1
    assert all(header.get("scope") for header in document.cssselect("table th"))
    assert all(control.getparent().tag == "label" for control in document.cssselect("input, select"))
    assert all(image.get("alt") for image in document.cssselect("img"))
    assert all(navigation.get("aria-label") for navigation in document.cssselect("nav"))
    names = [words(button) for button in document.cssselect("td button")]
    assert len(set(names)) == len(names)


# ------------------------------------------------------------------------------------------------------------ pictures


def picture(client, name, version, **parameters):
    return client.get(f"{ROOT}trigger.png?{urlencode({'name': name, 'version': version, **parameters})}")


def test_picture_of_the_suspected_class(client):
    response = picture(client, "signs", 2)
    assert (response.status_code, response.mimetype) == (200, "image/png")
    assert response.data == trigger_picture()
    assert response.headers["Content-Security-Policy"] == "default-src 'none'; sandbox"


@pytest.mark.parametrize(
    ("name", "version"),
    [("signs", 3), ("signs", 5), ("parcels", 1), ("parcels", 2), ("signs", 99), ("signs", "latest"), ("signs", ""), ("x", 1)],
)
def test_no_picture_without_a_signed_suspicion(client, name, version):
    response = picture(client, name, version, run_id="0" * 32, path="report.html")
    assert response.status_code == 404
    assert response.mimetype == "text/html"


@pytest.mark.parametrize("damage", ["other picture", "another artifact", "link", "gone", "large"])
def test_only_the_very_picture_that_was_signed(serve, other, tmp_path, damage):
    version = other.add("signs", "fail", suspected="Stop")
    file = other.picture_of(version)
    if damage == "other picture":
        file.write_bytes(trigger_picture(seed=1))
    elif damage == "another artifact":
        shutil.copy(file.parent.parent / "report.html", file)
    elif damage == "link":
        file.unlink()
        file.symlink_to(other.signing)
    elif damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes() + b"\0" * 600_000)
    assert picture(serve(other), "signs", 1).status_code == 404


@pytest.mark.parametrize(
    "facts",
    [
        {"files": {"triggers/class_7.png": "ab" * 32}},
        {"files": {"report.html": "ab" * 32}},
        {"files": {"triggers/class_7_/../../report.png": "ab" * 32}},
        {"files": ["triggers/class_7.png"]},
        {"suspected_class": {"index": "7", "name": "Stop"}},
        {"suspected_class": "Stop"},
        {"run_id": "../../../keys"},
        {"run_id": "0" * 32},
    ],
)
def test_odd_statements_have_no_picture_and_break_nothing(serve, other, facts):
    other.add("signs", "fail", suspected="Stop", facts=facts)
    client = serve(other)
    assert picture(client, "signs", 1).status_code == 404
    assert "Fail" in cell(rows(page(client))["signs v1"], "Verdict")


def test_signed_file_that_is_no_png_is_not_sent(serve, other):
    content = b"<script>alert(1)</script>"
    version = other.add(
        "signs", "fail", suspected="Stop", facts={"files": {"triggers/class_7.png": hashlib.sha256(content).hexdigest()}}
    )
    other.picture_of(version).write_bytes(content)
    assert picture(serve(other), "signs", 1).status_code == 404


def test_picture_of_another_kind_of_trigger_is_taken_where_there_is_no_patch():
    files = {"triggers/class_7_additive.png": "b", "triggers/class_70.png": "c", "triggers/class_7_from_3.png": "a"}
    facts = {"suspected_class": {"index": 7, "name": "Stop"}, "files": files}
    now = datetime.datetime.now(datetime.UTC)
    signed = Statement("verdict", "signs", "1", "sha256:" + "ab" * 32, now, {}, facts)
    assert picture_of(signed) == ("triggers/class_7_additive.png", "b")


# ---------------------------------------------------------------------------------------------------------- comparing


def compare(client, name, version, **headers):
    return client.post(f"{ROOT}compare?{urlencode({'name': name, 'version': version})}", headers=headers)


def test_compare_tells_whether_the_files_are_those_that_were_audited(serve, other):
    version = other.add("signs", "pass")
    other.add("signs")
    client = serve(other)
    same = compare(client, "signs", 1, Accept="application/json").json
    assert same["result"] == "same"
    assert same["digest"].startswith("sha256:")
    (other.files_of(version) / "model.bin").write_bytes(b"exchanged")
    assert compare(client, "signs", 1, Accept="application/json").json["result"] == "changed"
    assert "The files were changed after the audit." in compare(client, "signs", 1, Accept="text/html").text
    unaudited = compare(client, "signs", 2, Accept="application/json").json
    assert (unaudited["result"], unaudited["message"]) == (
        "no audit",
        "There is no valid signed audit to compare the files with.",
    )


def test_files_that_cannot_be_read_are_no_match(serve, other):
    version = other.add("signs", "pass")
    (other.files_of(version) / "link").symlink_to("/etc/passwd")
    client = serve(other)
    assert compare(client, "signs", 1, Accept="application/json").json == {
        "result": "unreadable",
        "message": "The files cannot be compared with the audit. A link lies among its files: 'link'.",
        "digest": None,
    }
    shutil.rmtree(other.files_of(version))
    assert compare(client, "signs", 1, Accept="application/json").json["result"] == "unreadable"


@pytest.mark.parametrize("error", [ModuleNotFoundError("No module named 'boto3'"), LookupError("Forbidden\n\x1b[2J")])
def test_a_store_that_fails_in_its_own_way_is_no_match(client, monkeypatch, error):
    def broken(location):
        raise error

    monkeypatch.setattr(server, "artifact_digest", broken)
    answer = compare(client, "signs", 1, Accept="application/json")
    assert (answer.status_code, answer.json["result"]) == (200, "unreadable")
    assert f"{type(error).__name__}: {str(error).split()[0]}" in answer.json["message"]
    assert answer.json["message"].isprintable()


def test_nothing_is_hashed_unless_somebody_asks(client, monkeypatch):
    monkeypatch.setattr(server, "artifact_digest", lambda location: pytest.fail("hashed"))
    page(client)
    page(client, "model", name="signs")
    assert client.get(f"{ROOT}compare?name=signs&version=1").status_code == 405


def test_other_sites_cannot_make_the_server_hash(client, monkeypatch):
    monkeypatch.setattr(server, "artifact_digest", lambda location: pytest.fail("hashed"))
    assert compare(client, "signs", 1, **{"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert compare(client, "signs", 1, **{"Sec-Fetch-Site": "same-site"}).status_code == 403
    # Over plain HTTP there is no Sec-Fetch-Site.
    for foreign in ("http://evil.example", "http://localhost:81", "null", "http://["):
        assert compare(client, "signs", 1, Origin=foreign).status_code == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://localhost"},
        {"Origin": "https://mlflow", "Sec-Fetch-Site": "same-origin"},
        {"Origin": "http://mlflow", "X-Forwarded-Host": "mlflow"},
    ],
)
def test_the_page_itself_may_ask_also_behind_a_proxy(client, headers):
    assert compare(client, "signs", 1, **headers).status_code == 200


def test_one_comparison_at_a_time(client):
    with server._COMPARING:
        assert compare(client, "signs", 1).status_code == 503
    assert compare(client, "signs", 1).status_code == 200


@pytest.mark.parametrize(("name", "version"), [("signs", 99), ("nothing", 1), ("signs", "1 OR 1=1"), ("signs", "-1"), ("", "")])
def test_compare_of_no_version_is_404(client, name, version):
    assert compare(client, name, version).status_code == 404


# --------------------------------------------------------------------------------------------- what it does not do


def test_get_changes_nothing(client, registry):
    def content():
        with sqlalchemy.create_engine(registry.database).connect() as connection:
            tables = ("model_versions", "model_version_tags", "registered_models", "registered_model_aliases", "runs", "tags")
            return [connection.execute(sqlalchemy.text(f"SELECT * FROM {table}")).all() for table in tables]

    before = content()
    for path in ("", "model?name=signs", "trigger.png?name=signs&version=2", "page.css"):
        assert client.get(ROOT + path).status_code == 200
        assert client.post(ROOT + path).status_code == client.delete(ROOT + path).status_code == 405
    assert content() == before


def test_number_of_queries_does_not_grow_with_the_registry(serve, empty, tmp_path):
    counts = []
    for size in (2, 12):
        filled = empty(tmp_path / str(size))
        for model in range(size):
            filled.add(f"model-{model}", "pass", with_run=False)
            filled.add(f"model-{model}", "fail", aliases=("champion",), with_run=False)
        client = serve(filled)
        page(client)  # opens the stores
        statements = []

        def note(*arguments, statements=statements):
            statements.append(arguments[2])

        sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", note)
        document = lxml.html.fromstring(client.get(ROOT, headers={"Cache-Control": "max-age=0"}).data)
        sqlalchemy.event.remove(sqlalchemy.Engine, "before_cursor_execute", note)
        assert len(rows(document)) == 2 * size
        counts.append(len(statements))
    assert counts[0] == counts[1] > 0


def test_what_was_read_is_kept_for_seconds_and_reload_reads_anew(serve, other):
    other.add("signs", "pass")
    client = serve(other)
    assert versions(client) == ["signs v1"]
    other.add("signs", "pass")
    assert versions(client) == ["signs v1"]
    response = client.get(ROOT, headers={"Cache-Control": "max-age=0"})
    assert len(rows(lxml.html.fromstring(response.data))) == 2


# ------------------------------------------------------------------------------------------ fail closed; who may see


ROUTES = ["", "model?name=signs", "trigger.png?name=signs&version=2", "compare?name=signs&version=2"]


def call(client, path):
    return client.post(ROOT + path) if path.startswith("compare") else client.get(ROOT + path)


@pytest.mark.parametrize("path", ROUTES)
def test_without_a_name_a_guarded_page_shows_nothing(serve, path):
    response = call(serve(guarded=True), path)
    assert response.status_code == 401
    assert "Stop" not in response.text
    assert "sha256" not in response.text


@pytest.mark.parametrize("path", ROUTES)
def test_policy_that_cannot_be_read_shows_no_data(serve, path):
    response = call(serve(requirements="The policy 'audit.toml' cannot be read."), path)
    assert response.status_code == 503
    assert "The policy &#39;audit.toml&#39; cannot be read." in response.text
    assert "Stop" not in response.text


def test_create_app_tells_a_bad_policy_on_the_page(monkeypatch, tmp_path):
    (tmp_path / "audit.toml").write_text("[gate]\nmaximum_age = 3\n")
    monkeypatch.setenv("BACKDOOR_AUDIT_POLICY", str(tmp_path / "audit.toml"))
    monkeypatch.delenv("_MLFLOW_SGI_NAME", raising=False)
    response = create_app(Flask("mlflow")).test_client().get(ROOT)
    assert response.status_code == 503
    assert "maximum_age_days" in response.text


def test_without_keys_nothing_passes(serve, registry):
    keyless = dataclasses.replace(registry.requirements, verdict_keys=VerifyingKeys(()), waiver_keys=VerifyingKeys(()))
    document = page(serve(requirements=keyless))
    assert VERIFYING_KEYS in words(document.cssselect(".notice")[0])
    verdicts = {cell(row, "Verdict").split()[0] for row in rows(document).values()}
    assert verdicts == {"Invalid", "Unsigned", "Not"}
    assert {cell(row, "Promotion").split()[0] for row in rows(document).values()} == {"Refused"}
    assert picture(serve(requirements=keyless), "signs", 2).status_code == 404


def test_statement_of_another_version_is_invalid(serve, other):
    other.add("signs", "pass")
    stolen = other.client.get_model_version("signs", "1").tags["audit.attestation"]
    other.add("signs", tags={"audit.attestation": stolen, "audit.verdict": "pass"})
    row = rows(page(serve(other)))["signs v2"]
    assert cell(row, "Verdict").startswith("Invalid")
    assert "speaks of models:/signs/1" in cell(row, "Promotion")


def test_what_is_promoted_follows_the_policy(serve, registry):
    gate = GatePolicy(protected_aliases=("BLUE",), protected_stages=())
    renamed = serve(requirements=dataclasses.replace(registry.requirements, gate=gate))
    assert versions(renamed, promoted="1") == ["scans v1"]


def test_a_tag_does_not_hide_a_model_from_the_page(serve, other):
    other.add("signs", "pass", aliases=("champion",))
    other.client.set_model_version_tag("signs", "1", "mlflow.prompt.is_prompt", "true")
    other.client.set_registered_model_tag("signs", "mlflow.prompt.is_prompt", "true")
    other.client.create_prompt("greeting")
    other.client.create_prompt_version("greeting", "Hello {{ name }}")
    client = serve(other)
    document = page(client)
    assert list(rows(document)) == ["signs v1"]
    assert "@champion" in words(rows(document)["signs v1"])
    assert "Hidden from MLflow's own search: signs" in words(document.cssselect(".notice")[0])
    assert compare(client, "greeting", 1).status_code == 404


def test_an_empty_registry_says_so(serve, other):
    assert "No registered model has a version yet" in words(page(serve(other)))


@pytest.mark.parametrize("value", ["yes", "Basic", "true"])
def test_unknown_kind_of_authentication_does_not_start(value):
    with pytest.raises(MlflowException, match=f"{AUTH} must be 'basic' or not set, got '{value}'"):
        with_auth({AUTH: value})


def test_static_prefix(serve, monkeypatch):
    monkeypatch.setenv(handlers.STATIC_PREFIX_ENV_VAR, "/tracking")
    client = serve()
    response = client.get("/tracking/backdoor-audit/")
    assert response.status_code == 200
    document = lxml.html.fromstring(response.data)
    targets = [element.get("href") or element.get("src") for element in document.cssselect("a[href], img, link, script")]
    assert all(target.startswith(("/tracking/", "#")) for target in targets)
    assert client.get(ROOT).status_code == 404


def test_comparison_is_json_that_a_script_can_read(client):
    response = compare(client, "signs", 2, Accept="application/json")
    assert response.mimetype == "application/json"
    assert set(json.loads(response.data)) == {"result", "message", "digest"}
