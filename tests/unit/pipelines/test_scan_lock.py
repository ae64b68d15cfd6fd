"""Who is alive, and who is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from werkzeug.test import EnvironBuilder
from werkzeug.wrappers import Request

from audit_plugin.errors import UsageError
from mlflow_plugins.webhook import read_delivery
from pipelines.scan import lock
from pipelines.scan.lock import HEARTBEAT_TAG, OWNER_TAG, STALE_SECONDS, is_alive
from pipelines.scan.notify import SECRET, URL, notify, parse_command

NOW = 1_000_000.0


def tags(age=0.0, **changes):
    return {OWNER_TAG: json.dumps(lock._this_process() | changes), HEARTBEAT_TAG: str(NOW - age)}


def test_this_process_is_alive_however_old_its_sign_of_life():
    assert is_alive(tags(age=1e6), NOW)


def test_a_process_of_this_machine_that_ended_is_not():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = lock._process_start(process.pid)
    assert is_alive(tags(pid=process.pid, started=started), NOW)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not is_alive(tags(pid=process.pid, started=started), NOW)  # a zombie
    process.communicate()
    assert not is_alive(tags(pid=process.pid, started=started), NOW)


def test_another_process_of_the_same_number_is_not_the_owner():
    assert not is_alive(tags(started="1"), NOW)


@pytest.mark.parametrize("elsewhere", [{"host": "another"}, {"boot": "another"}, {"namespace": "pid:[1]"}])
def test_elsewhere_the_sign_of_life_counts(elsewhere):
    assert is_alive(tags(age=STALE_SECONDS - 1, **elsewhere), NOW)
    assert not is_alive(tags(age=STALE_SECONDS + 1, **elsewhere), NOW)
    assert not is_alive(tags(age=-STALE_SECONDS - 1, **elsewhere), NOW)  # dated ahead, to block everybody for good


@pytest.mark.parametrize("owner", ["", "[]", "1", "{}", "[" * 100_000])
def test_an_owner_that_cannot_be_read_is_not_alive(owner):
    assert not is_alive({OWNER_TAG: owner, HEARTBEAT_TAG: str(NOW)}, NOW)


# ------------------------------------------------------------------------------------------------------ notification


@pytest.fixture
def receiver():
    """A real HTTP server: its address, and the requests that it got."""
    got = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            got.append((dict(self.headers), body))
            self.send_response(204 if self.path == "/good" else 302)
            self.send_header("Location", "/good")
            self.end_headers()

        def log_message(self, *arguments):
            return

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", got
    server.shutdown()
    server.server_close()


def test_an_address_gets_what_mlflows_webhook_would_sign(receiver):
    address, got = receiver
    secret = "a secret of many letters"
    notify({"event": "x"}, (), {URL: f"{address}/good", SECRET: secret})
    ((headers, body),) = got
    assert json.loads(body) == {"event": "x"}
    request = Request(EnvironBuilder(method="POST", headers=list(headers.items()), data=body).get_environ())
    assert read_delivery(request, secret, time.time()).body == body


def test_without_a_secret_there_is_no_signature(receiver):
    address, got = receiver
    notify({}, (), {URL: f"{address}/good"})
    assert "X-MLflow-Signature" not in got[0][0]


def test_a_redirection_is_not_followed_and_a_warning(receiver, caplog):
    address, got = receiver
    notify({}, (), {URL: f"{address}/elsewhere"})
    assert len(got) == 1
    assert "answered 302" in caplog.text


def test_an_address_that_does_not_answer_is_a_warning_without_its_password(caplog):
    notify({}, (), {URL: "http://user:secret@127.0.0.1:9/x"})
    assert "Nobody was notified" in caplog.text
    assert "secret" not in caplog.text


def test_a_command_gets_the_message_and_no_shell(tmp_path):
    target = tmp_path / "got; touch x"
    code = "import sys; open(sys.argv[1], 'w').write(sys.stdin.read())"
    notify({"event": "$(x)"}, (sys.executable, "-c", code, str(target)), {})
    assert json.loads(target.read_text()) == {"event": "$(x)"}
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("command", [("/nowhere/program",), (sys.executable, "-c", "raise SystemExit(3)")])
def test_a_command_that_fails_is_a_warning(command, caplog):
    notify({}, command, {})
    assert "notified" in caplog.text


def test_command_lines():
    assert parse_command(None) == ()
    assert parse_command("mail -s 'a b' ops") == ("mail", "-s", "a b", "ops")
    for wrong in ("mail 'x", "", "  "):
        with pytest.raises(UsageError):
            parse_command(wrong)
