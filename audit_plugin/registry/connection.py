"""The connection to MLflow: whether a server answers, its errors as one clear line, the experiment and pages of our runs."""

from __future__ import annotations

import math
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote, urlparse
from urllib.request import getproxies, proxy_bypass

import mlflow
import requests
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.tracking._model_registry.client import ModelRegistryClient

from audit_plugin.attestation import signer_from_environment
from audit_plugin.errors import RegistryError, nearest

EXPERIMENT = "backdoor-audits"
_SERVER_TIMEOUT_SECONDS = 5
NETWORK_ERRORS = (
    ConnectionError,
    TimeoutError,
    socket.gaierror,
    requests.exceptions.ConnectionError,
    requests.exceptions.Timeout,
    requests.exceptions.ChunkedEncodingError,
)


def check_server() -> None:
    """Find out whether anybody listens at a remote tracking server, instead of MLflow's minutes of retries.

    Who may come in, and by which certificate, is MLflow's to find out.

    Raises:
        RegistryError: it does not answer within seconds.
    """
    for uri in dict.fromkeys((mlflow.get_tracking_uri(), mlflow.get_registry_uri())):
        if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///").partition("?")[0]).is_file():
            # MLflow would create an empty one in the current folder.
            raise RegistryError(
                f"There is no MLflow database at {redacted(uri)}. Set MLFLOW_TRACKING_URI to your tracking server."
            )
        if not uri.startswith(("http://", "https://")):
            continue
        try:
            _knock(uri)
        except (OSError, ValueError) as error:
            raise RegistryError(
                f"The tracking server {redacted(uri)} does not answer ({error}). "
                "Check MLFLOW_TRACKING_URI, or start it with 'mlflow server'."
            ) from error


def check_writing() -> None:
    """Find out before minutes of work what would keep their result from being written.

    Raises:
        RegistryError: the tracking server does not answer.
        UsageError: the signing key that the environment names cannot be read.
    """
    check_server()
    signer_from_environment()


def _knock(uri: str) -> None:
    parsed = urlparse(uri)
    host, port = parsed.hostname or "", parsed.port or (443 if parsed.scheme == "https" else 80)
    if {parsed.scheme, "all"} & getproxies().keys() and not proxy_bypass(f"{host}:{port}"):
        return  # only the proxy can reach it
    with socket.create_connection((host, port), timeout=_SERVER_TIMEOUT_SECONDS) as connection:
        if parsed.scheme == "http":
            # The far end of a tunnel, or a server that hangs, takes connections too.
            connection.sendall(b"HEAD /health HTTP/1.0\r\n\r\n")
            if not connection.recv(1):
                raise ConnectionError("it closed the connection")


def describe_tracking() -> str:
    """The tracking URI, without credentials, after it answered.

    Raises:
        RegistryError: it does not answer.
    """
    check_server()
    uri: str = mlflow.get_tracking_uri()
    with teaching(uri):
        MlflowClient().search_experiments(max_results=1)
    return redacted(uri)


def run_page(experiment_id: str, run_id: str) -> str | None:
    """The address of a run in MLflow's UI; None without an HTTP server."""
    uri = mlflow.get_tracking_uri()
    if not uri.startswith(("http://", "https://")):
        return None
    return f"{redacted(uri).rstrip('/')}/#/experiments/{quote(experiment_id)}/runs/{quote(run_id)}"


def experiment_of(client: MlflowClient) -> str:
    """Id of the experiment ``backdoor-audits``, which is made if missing."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    return str(experiment.experiment_id if experiment else client.create_experiment(EXPERIMENT))


@contextmanager
def ended_if_it_fails(client: MlflowClient, run_id: str) -> Iterator[None]:
    """A run of ours does not look as if it went on when what it logs breaks off."""
    try:
        yield
    except BaseException:
        with suppress(RegistryError, MlflowException, OSError):  # the first error is the one to tell
            check_server()
            client.set_terminated(run_id, "KILLED")
        raise


def log_finite_metrics(client: MlflowClient, run_id: str, metrics: Mapping[str, float]) -> None:
    """Log what was measured: an infinite or undefined figure says that it was not."""
    for name, value in metrics.items():
        if math.isfinite(value):
            client.log_metric(run_id, name, value)


def registry_of(client: MlflowClient) -> ModelRegistryClient:
    """What the client itself speaks through. Its own methods refuse whatever a tag, which anybody can set, calls a prompt."""
    inner: ModelRegistryClient = client._get_registry_client()
    return inner


def known_models(client: MlflowClient, name: str) -> str:
    """A hint at what the name may have been meant to be."""
    return nearest(name, (model.name for model in client.search_registered_models(max_results=1000)))


@contextmanager
def teaching(uri: str) -> Iterator[None]:
    """MLflow's exceptions as one clear line."""
    try:
        yield
    except MlflowException as error:
        hint = ""
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            if name := re.match(r"models:/([^/@]+)", uri):
                hint = known_models(MlflowClient(), name[1])
            hint += f" Looked in {redacted(mlflow.get_registry_uri())}; set MLFLOW_TRACKING_URI for another server."
        raise RegistryError(f"MLflow: {one_line(str(error)).rstrip('.')}.{hint}") from error
    except NETWORK_ERRORS as error:
        raise RegistryError(f"The server that keeps {redacted(uri)} does not answer: {one_line(str(error))}") from error
    except OSError as error:
        raise RegistryError(f"The files of {redacted(uri)} cannot be read: {one_line(str(error))}") from error


def redacted(text: str) -> str:
    """``text`` without the user name and password of any URI in it.

    >>> redacted("http://user:secret@tracking.example:5000/path")
    'http://tracking.example:5000/path'
    """
    return re.sub(r"(?<=://)[^\s/?#]*@", "", text)


def one_line(text: str) -> str:
    """``text`` in one line, shortened and without credentials."""
    return redacted(" ".join(text.split()))[:400]
