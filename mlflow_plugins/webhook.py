"""The receiver of MLflow's webhook ``model_version.created``: every new version of a registered model gets an audit.

    POST /backdoor-audit/webhook           signed by MLflow; 202 when the audit is queued
    GET  /backdoor-audit/webhook/health    {"queue_length": 0}

A delivery is a hint and nothing else: of its content only a name and a version number are read, and the registry is asked what
they are. The audit itself is a child process, ``backdoor-audit gate models:/name/version``. Deliveries are sent once and get
lost, so a scan of the whole registry on a schedule stays necessary.
"""

from __future__ import annotations

import atexit
import enum
import hmac
import json
import logging
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeGuard

from flask import Blueprint, Flask, Request, jsonify, request
from flask.typing import ResponseReturnValue
from werkzeug.exceptions import HTTPException

from audit_plugin.errors import AuditError, UsageError
from audit_plugin.policy import POLICY_VARIABLE, load_policy
from audit_plugin.registry import check_server, version_facts
from audit_plugin.report.sanitise import clean_text
from audit_plugin.requirements import clean_images_of
from audit_plugin.sandbox import has_ended
from mlflow_plugins.deliveries import signature_of

log = logging.getLogger(__name__)

SECRET = "BACKDOOR_AUDIT_WEBHOOK_SECRET"  # noqa: S105 - the name of the variable
PATH = "/backdoor-audit/webhook"
MAXIMUM_BODY_BYTES = 1024 * 1024
WINDOW_SECONDS = 300
RETRY_AFTER_SECONDS = 30  # MLflow tries three times more, all within the window
_SHORTEST_SECRET = 16
_LONGEST_NAME = 256
_LAST_LINES_BYTES = 8192


@dataclass(frozen=True)
class Hint:
    """The version that a delivery speaks about, as the sender names it."""

    name: str
    version: str

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.version}"


class Submitted(enum.Enum):
    """What became of a version that was handed to :class:`AuditJobs`."""

    QUEUED = enum.auto()
    PENDING = enum.auto()
    FULL = enum.auto()


CommandOf = Callable[[Hint], Sequence[str]]


class AuditJobs:
    """Audits that wait and run: ``workers`` child processes at a time, at most ``capacity`` waiting, none twice.

    ``command_of`` gives the command of a version or raises an AuditError that says why it is not audited. A job that takes longer
    than ``time_limit_seconds`` is interrupted, and killed with its whole process group ``grace_seconds`` later.
    """

    def __init__(
        self,
        command_of: CommandOf,
        *,
        workers: int = 1,
        capacity: int = 100,
        time_limit_seconds: float = 3600,
        grace_seconds: float = 10.0,
    ) -> None:
        self._command_of = command_of
        self._time_limit_seconds = time_limit_seconds
        self._grace_seconds = grace_seconds
        self._waiting: queue.Queue[Hint] = queue.Queue(capacity)
        self._pending: set[Hint] = set()  # waiting or running
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._workers = [threading.Thread(target=self._work, name=f"audit-{index}", daemon=True) for index in range(workers)]
        for worker in self._workers:
            worker.start()

    @property
    def queue_length(self) -> int:
        """How many audits wait; those that run are not among them."""
        return self._waiting.qsize()

    def submit(self, hint: Hint) -> Submitted:
        with self._lock:
            if hint in self._pending:
                return Submitted.PENDING
            if self._stopping.is_set():
                return Submitted.FULL
            try:
                self._waiting.put_nowait(hint)
            except queue.Full:
                return Submitted.FULL
            self._pending.add(hint)
            return Submitted.QUEUED

    def stop(self) -> None:
        """Interrupt the audits that run, drop those that wait, and return when all have ended."""
        self._stopping.set()
        for worker in self._workers:
            worker.join(self._grace_seconds + 5)  # one that asks a registry that hangs has no audit to end yet
        with suppress(queue.Empty):
            while True:
                log.warning("%s is not audited: the receiver was stopped.", clean_text(self._waiting.get_nowait().uri))

    def _work(self) -> None:
        while not self._stopping.is_set():
            try:
                hint = self._waiting.get(timeout=0.2)
            except queue.Empty:
                continue
            try:
                self._audit(hint)
            except AuditError as error:
                log.warning("%s is not audited: %s", clean_text(hint.uri), clean_text(error, 1000))
            except Exception as error:  # the next version must be audited all the same
                log.error("%s is not audited: %s: %s", clean_text(hint.uri), type(error).__name__, clean_text(error, 1000))
            finally:
                with self._lock:
                    self._pending.discard(hint)

    def _audit(self, hint: Hint) -> None:
        command = self._command_of(hint)
        # What the audit opens is hostile; the secret is not its business.
        environment = {name: value for name, value in os.environ.items() if name != SECRET}
        log.info("%s: the audit begins.", clean_text(hint.uri))
        with tempfile.TemporaryFile() as stderr:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env=environment,
                start_new_session=True,
            )
            stopped = self._wait(process)
            code = process.wait()
            last_line = clean_text(_last_line(stderr))
        if stopped:
            log.error("%s is not audited: %s. It said last: %s", clean_text(hint.uri), stopped, last_line)
        else:
            level = logging.INFO if code == 0 else logging.WARNING
            log.log(level, "%s: the audit ended with exit code %d: %s", clean_text(hint.uri), code, last_line)

    def _wait(self, process: subprocess.Popen[bytes]) -> str:
        """Wait until a job has ended, or end it; then why, else ''. Nothing of its process group is left."""
        deadline = time.monotonic() + self._time_limit_seconds
        reason = ""
        while not reason and not has_ended(process):
            if self._stopping.wait(0.1):
                reason = "the receiver was stopped"
            elif time.monotonic() > deadline:
                reason = f"it took longer than {self._time_limit_seconds:g} seconds"
        if reason:
            os.killpg(process.pid, signal.SIGINT)  # the audit ends its run in MLflow and removes its files
            deadline = time.monotonic() + self._grace_seconds
            while not has_ended(process) and time.monotonic() < deadline:
                time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
        return reason


def _last_line(stream: IO[bytes]) -> str:
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(size - _LAST_LINES_BYTES, 0))
    lines = stream.read().decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else ""


def gate_command(hint: Hint, policy_file: Path) -> list[str]:
    """The command that audits a version, as the registry and the policy file say now.

    Raises:
        RegistryError: there is no such version, or the server does not answer.
        UsageError: the policy cannot be read, or names no clean images for this model.
    """
    check_server()
    version = version_facts(hint.name, hint.version)
    clean = clean_images_of(version.name, policy_file)
    if clean is None:
        raise UsageError(f"No name or pattern in [clean_images] of '{policy_file}' matches '{version.name}'. Add one.")
    command = [sys.executable, "-m", "audit_plugin.cli", "gate", version.uri, "--clean", clean]
    return [*command, "--policy", str(policy_file)]


def start_jobs(policy_file: Path | None, *, workers: int = 1, time_limit_seconds: float = 3600) -> AuditJobs:
    """Jobs that audit with the clean images that a policy file names.

    Raises:
        UsageError: there is no policy file, it cannot be read, or it names no clean images.
    """
    if policy_file is None or not load_policy(policy_file).clean_images:
        raise UsageError(
            "The webhook needs a policy that says which clean images belong to which model: give --policy, or set "
            f'{POLICY_VARIABLE}, and add a section such as [clean_images] "digits" = "clean.npz".'
        )
    policy = policy_file.absolute()
    return AuditJobs(lambda hint: gate_command(hint, policy), workers=workers, time_limit_seconds=time_limit_seconds)


def secret_from_environment() -> str:
    """The secret that MLflow signs deliveries with.

    Raises:
        UsageError: none is set, or it is too short to keep anybody out.
    """
    secret = os.environ.get(SECRET, "")
    if len(secret) < _SHORTEST_SECRET:
        what = f"has fewer than {_SHORTEST_SECRET} characters" if secret else "is not set"
        raise UsageError(
            f"{SECRET} {what}. Set it to the secret that the webhook was created with; 'openssl rand -hex 32' makes one."
        )
    return secret


# ------------------------------------------------------------------------------------------------------- deliveries


@dataclass(frozen=True)
class Delivery:
    """What was signed; ``timestamp`` in Unix seconds."""

    identifier: str
    timestamp: int
    body: bytes


class RefusedError(Exception):
    """A request that is not taken: an HTTP status and one line for the sender."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Deliveries:
    """Remembers deliveries for as long as their timestamp would let them in again, at most ``capacity`` of them."""

    def __init__(self, capacity: int = 10_000) -> None:
        self._capacity = capacity
        self._expires: dict[str, int] = {}
        self._lock = threading.Lock()

    def take(self, delivery: Delivery, now: float) -> bool:
        """Whether it is new; it no longer is afterwards.

        Raises:
            RefusedError: too many came to remember one more.
        """
        with self._lock:
            self._expires = {known: end for known, end in self._expires.items() if end >= now}
            if delivery.identifier in self._expires:
                return False
            if len(self._expires) >= self._capacity:
                raise RefusedError(503, "Too many deliveries.")
            self._expires[delivery.identifier] = delivery.timestamp + WINDOW_SECONDS
            return True

    def give_back(self, delivery: Delivery) -> None:
        """The same delivery may come again."""
        with self._lock:
            self._expires.pop(delivery.identifier, None)


def read_delivery(request: Request, secret: str, now: float) -> Delivery:
    """The delivery in a request, after its signature and its age were checked.

    Raises:
        RefusedError: it is no JSON, too large, unsigned, signed with another secret, or more than five minutes old or early.
    """
    if request.mimetype != "application/json":
        raise RefusedError(415, "Expected application/json.")
    body = b"" if (request.content_length or 0) > MAXIMUM_BODY_BYTES else request.stream.read(MAXIMUM_BODY_BYTES + 1)
    if (request.content_length or len(body)) > MAXIMUM_BODY_BYTES:
        raise RefusedError(413, f"Expected at most {MAXIMUM_BODY_BYTES} bytes.")
    identifier = request.headers.get("X-MLflow-Delivery-Id", "")
    timestamp = request.headers.get("X-MLflow-Timestamp", "")
    signature = request.headers.get("X-MLflow-Signature", "")
    if not re.fullmatch(r"[\w-]{1,64}", identifier, re.ASCII) or not re.fullmatch(r"[0-9]{1,12}", timestamp):
        raise RefusedError(401, "The delivery's id or timestamp is missing or malformed.")
    if not hmac.compare_digest(signature_of(secret, identifier, timestamp, body).encode(), signature.encode()):
        raise RefusedError(401, "The signature is missing or wrong.")
    if abs(now - int(timestamp)) > WINDOW_SECONDS:
        raise RefusedError(401, f"The timestamp is more than {WINDOW_SECONDS} seconds off.")
    return Delivery(identifier, int(timestamp), body)


def read_hint(body: bytes) -> Hint | None:
    """The version that a body says was created; None for other events, and for other workspaces than this process's.

    Raises:
        RefusedError: the body is no event, or names no version.
    """
    try:
        event = json.loads(body)
    except (ValueError, RecursionError):
        raise RefusedError(400, "The body is no JSON.") from None
    if not isinstance(event, dict):
        raise RefusedError(400, "The body is no event.")
    if (event.get("entity"), event.get("action")) != ("model_version", "created"):
        return None
    workspace = event.get("workspace", "default")
    if workspace != os.environ.get("MLFLOW_WORKSPACE", "default"):
        log.warning("A version of the workspace %s is not audited: it is not this receiver's.", clean_text(workspace))
        return None
    data = event.get("data")
    name, version = (data.get("name"), data.get("version")) if isinstance(data, dict) else (None, None)
    if not _is_model_name(name) or not isinstance(version, str) or not re.fullmatch(r"[1-9][0-9]{0,9}", version):
        raise RefusedError(400, "The event names no version of a registered model.")
    return Hint(name, version)


def _is_model_name(name: object) -> TypeGuard[str]:
    """MLflow's rule, without what cannot be an argument of a command."""
    if not isinstance(name, str) or not name.strip() or len(name) > _LONGEST_NAME:
        return False
    return not set(name) & {"/", ":", "\0"} and not any("\ud800" <= character <= "\udfff" for character in name)


# ------------------------------------------------------------------------------------------------------------ Flask


def blueprint(secret: str, jobs: AuditJobs, *, clock: Callable[[], float] = time.time) -> Blueprint:
    """The two routes; ``clock`` gives Unix seconds."""
    routes = Blueprint("backdoor_audit_webhook", __name__, url_prefix=PATH)
    deliveries = Deliveries()

    @routes.post("")
    def receive() -> ResponseReturnValue:
        now = clock()
        try:
            delivery = read_delivery(request, secret, now)
            hint = read_hint(delivery.body)
            if hint is None:
                return jsonify(status="ignored"), 200
            if not deliveries.take(delivery, now):
                return jsonify(status="ignored"), 200
            submitted = jobs.submit(hint)
            if submitted is Submitted.FULL:
                deliveries.give_back(delivery)  # MLflow repeats it under the same id
                raise RefusedError(503, f"{clean_text(hint.uri)} is not audited: too many audits wait.")
        except RefusedError as refusal:
            log.warning("A delivery was refused with status %d: %s", refusal.status, refusal)
            headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if refusal.status == 503 else {}
            return jsonify(error=str(refusal)), refusal.status, headers
        return jsonify(status="queued" if submitted is Submitted.QUEUED else "pending"), 202

    @routes.get("/health")
    def health() -> ResponseReturnValue:
        return jsonify(queue_length=jobs.queue_length)

    return routes


def register(app: Flask) -> None:
    """Add the webhook to another Flask app, with secret and policy file from the environment; jobs end with the process.

    Raises:
        UsageError: ``BACKDOOR_AUDIT_WEBHOOK_SECRET`` or ``BACKDOOR_AUDIT_POLICY`` does not do.
    """
    secret, policy = secret_from_environment(), os.environ.get(POLICY_VARIABLE)
    jobs = start_jobs(Path(policy) if policy else None)
    atexit.register(jobs.stop)
    app.register_blueprint(blueprint(secret, jobs))


def create_app(secret: str, jobs: AuditJobs) -> Flask:
    """An app with these routes alone."""
    app = Flask("backdoor-audit-webhook", static_folder=None)
    app.register_blueprint(blueprint(secret, jobs))

    @app.errorhandler(HTTPException)
    def refuse(error: HTTPException) -> ResponseReturnValue:
        allowed = getattr(error, "valid_methods", None)
        return jsonify(error=error.name), error.code or 500, {"Allow": ", ".join(sorted(allowed))} if allowed else {}

    return app


def serve(host: str, port: int, secret: str, jobs: AuditJobs) -> None:
    """Serve the webhook until SIGTERM or Ctrl-C, and end the jobs then."""
    import waitress

    def stop(number: int, frame: object) -> None:
        raise SystemExit

    # Waitress refuses by itself, before it reads them, bodies that are far too large.
    server = waitress.create_server(create_app(secret, jobs), host=host, port=port, max_request_body_size=2 * MAXIMUM_BODY_BYTES)
    signal.signal(signal.SIGTERM, stop)
    log.info("Listening on http://%s:%d%s", host, port, PATH)
    try:
        server.run()
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        server.close()
        jobs.stop()
