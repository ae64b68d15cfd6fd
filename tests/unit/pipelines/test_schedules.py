"""The files in ``pipelines/ci``: each by its own schema or linter, and their command lines by the real command line."""

from __future__ import annotations

import datetime
import getpass
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import mlflow.environment_variables
import pytest
import typer
import yaml
from cronsim import CronSim

from audit_plugin.cli import app
from tests.audited_registry import AuditedRegistry

ROOT = Path(__file__).parents[3]
CI = ROOT / "pipelines" / "ci"
FILES = sorted(path for path in CI.rglob("*") if path.is_file())
YAML_FILES = [path for path in FILES if path.suffix in (".yml", ".yaml")]
CRONTAB = CI / "cron" / "backdoor-audit"
WORKFLOWS = sorted((CI / "github").glob("*.yml"))
GITLAB = CI / "gitlab" / ".gitlab-ci.yml"
CRONJOB, RAYJOB = CI / "kubernetes" / "cronjob.yaml", CI / "kubernetes" / "rayjob.yaml"
SERVICE = CI / "systemd" / "backdoor-audit-scan.service"
DOCUMENTATION = ROOT / "docs" / "schedules.md"
VERSION = re.search(r"^version = (.+)$", (ROOT / "setup.cfg").read_text("utf-8"), re.MULTILINE)[1]
YAML_RULES = "{extends: default, rules: {line-length: {max: 150}, document-start: disable, truthy: {check-keys: false}, comments: {min-spaces-from-content: 1}}}"  # noqa: E501
PROGRAM = "backdoor-audit"
# Of KubeRay's RayJob, ray.io/v1; its schema is in no package.
RAYJOB_FIELDS = {
    *("entrypoint", "submissionMode", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "backoffLimit"),
    *("activeDeadlineSeconds", "submitterConfig", "submitterPodTemplate", "rayClusterSpec"),
}


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def check(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """A program of this Python's environment, or of the system."""
    program = shutil.which(str(command[0]), path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run([program, *map(str, command[1:])], capture_output=True, text=True, check=False, timeout=120)


def load(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def crontab() -> tuple[str, str, str]:
    """Expression, user and command of its one job."""
    lines = CRONTAB.read_text(encoding="utf-8").splitlines()
    (job,) = [line for line in lines if line and not line.startswith("#") and not re.match(r"[A-Z_]+=", line)]
    *when, user, command = job.split(maxsplit=6)
    return " ".join(when), user, command


def steps(workflow: Path) -> list[dict[str, Any]]:
    return [step for job in load(workflow)[0]["jobs"].values() for step in job["steps"]]


def pods(path: Path) -> dict[str, dict[str, Any]]:
    """Pod templates by a name of ours."""
    spec = load(path)[0]["spec"]
    if path == CRONJOB:
        return {"scan": spec["jobTemplate"]["spec"]["template"]}
    cluster = spec["rayClusterSpec"]
    workers = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return {"submitter": spec["submitterPodTemplate"], "head": cluster["headGroupSpec"]["template"], **workers}


def commands_in(script: str) -> Iterator[list[str]]:
    """Arguments of each ``backdoor-audit`` in a shell script; variables are left as they stand."""
    for line in script.replace("\\\n", " ").splitlines():
        tokens = shlex.shlex(line, posix=True, punctuation_chars=True)
        tokens.whitespace_split = True
        command: list[str] | None = None
        for token in [*tokens, ";"]:
            if command is not None and set(token) <= set("();<>|&"):
                yield command
                command = None
            elif command is not None:
                command.append(token)
            elif Path(token).name == PROGRAM:
                command = []


def commands() -> list[tuple[str, list[str]]]:
    found = [(named(CRONTAB), crontab()[2])]
    found += [(named(path), step["run"]) for path in WORKFLOWS for step in steps(path) if "run" in step]
    found += [(named(GITLAB), line) for job in load(GITLAB)[0].values() for line in job.get("script", ())]
    found += [(named(SERVICE), value) for key, value in settings(SERVICE) if key == "ExecStart"]
    found += [(named(CRONJOB), shlex.join([PROGRAM, *pods(CRONJOB)["scan"]["spec"]["containers"][0]["args"]]))]
    found += [(named(RAYJOB), load(RAYJOB)[0]["spec"]["entrypoint"])]
    shown = re.findall(r"^(?:ray .* -- )?(backdoor-audit .*)$", DOCUMENTATION.read_text(encoding="utf-8"), re.MULTILINE)
    found += [(named(DOCUMENTATION), line) for line in shown]
    return [(where, command) for where, script in found for command in commands_in(script)]


def settings(unit: Path) -> list[tuple[str, str]]:
    lines = unit.read_text(encoding="utf-8").splitlines()
    return [(key, value) for key, separator, value in (line.partition("=") for line in lines) if separator and key[0] != "#"]


def parse(command: list[str]) -> dict[str, Any]:
    """What the command line makes of it, without running anything."""
    group: Any = typer.main.get_command(app)
    subcommand = group.commands[command[0]]
    return dict(subcommand.make_context(command[0], command[1:]).params)


# ------------------------------------------------------------------------------------------------------ command lines


@pytest.mark.parametrize(("where", "command"), commands(), ids=lambda value: value if isinstance(value, str) else value[0])
def test_every_command_line_is_one(where: str, command: list[str]) -> None:
    assert parse(command)


def test_no_file_is_without_a_command_line() -> None:
    by_file = {where for where, _ in commands()}
    assert {named(path) for path in (CRONTAB, *WORKFLOWS, GITLAB, SERVICE, CRONJOB, RAYJOB, DOCUMENTATION)} == by_file


@pytest.mark.parametrize("command", [["scan", "--polcy", "x"], ["scan", "--engine", "spark"], ["scan", "--jobs", "0"], ["gate"]])
def test_a_wrong_command_line_would_be_noticed(command: list[str]) -> None:
    usage_error = typer.BadParameter.__base__  # click's own, or that of the copy that newer typers carry
    with pytest.raises(usage_error):
        parse(command)


def test_the_package_is_pinned_to_its_present_version() -> None:
    pins = {pin for path in FILES for pin in re.findall(r"mlflow-backdoor-audit==(\S+)", path.read_text(encoding="utf-8"))}
    images = {tag for path in FILES for tag in re.findall(r"/backdoor-audit:(\S+)", path.read_text(encoding="utf-8"))}
    assert pins == images == {VERSION}


# ------------------------------------------------------------------------------------- schemas and linters


@pytest.mark.parametrize("path", YAML_FILES, ids=named)
def test_yaml_is_well_formed(path: Path) -> None:
    done = check("yamllint", "--strict", "--config-data", YAML_RULES, path)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("schema", "path"), [*(("github-workflows", path) for path in WORKFLOWS), ("gitlab-ci", GITLAB)], ids=lambda value: str(value)
)
def test_the_ci_files_fit_their_schema(schema: str, path: Path) -> None:
    done = check("check-jsonschema", "--builtin-schema", f"vendor.{schema}", path)
    assert done.returncode == 0, done.stdout


def test_zizmor_has_nothing_against_the_workflows() -> None:
    done = check("zizmor", "--offline", "--no-config", "--persona=pedantic", *WORKFLOWS)
    assert done.returncode == 0, done.stdout + done.stderr


def test_hadolint_has_nothing_against_the_image() -> None:
    done = check("hadolint", CI / "kubernetes" / "Dockerfile")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", [CRONJOB, RAYJOB], ids=named)
def test_kubernetes_would_take_the_resources(path: Path) -> None:
    version = kubernetes_validate.latest_version()
    for resource in load(path):
        if resource["kind"] == "RayJob":
            assert resource["apiVersion"] == "ray.io/v1"
            assert set(resource["spec"]) <= RAYJOB_FIELDS
        else:
            kubernetes_validate.validate(resource, version, strict=True)
    for name, template in pods(path).items():
        metadata = {"name": name}
        # KubeRay sets what a container of a Ray pod is restarted for.
        kubernetes_validate.validate(
            {"apiVersion": "v1", "kind": "PodTemplate", "metadata": metadata, "template": template}, version, strict=True
        )


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    units = [shutil.copy(unit, tmp_path) for unit in SERVICE.parent.iterdir()]
    installed = tmp_path / SERVICE.name
    installed.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", installed.read_text("utf-8"), flags=re.M), "utf-8")
    done = check("systemd-analyze", "verify", "--man=no", *units)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_logrotate_takes_its_file(tmp_path: Path) -> None:
    file = tmp_path / "logrotate"
    text = (CI / "cron" / "logrotate").read_text(encoding="utf-8")
    file.write_text(text.replace("backdoor-audit backdoor-audit", f"{getpass.getuser()} {getpass.getuser()}"), "utf-8")
    file.chmod(0o644)
    done = check("logrotate", "--debug", "--state", tmp_path / "state", file)
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stderr


def test_each_schedule_scans_once_a_day_and_not_on_the_hour() -> None:
    expressions = [crontab()[0], load(CRONJOB)[0]["spec"]["schedule"]]
    expressions += [entry["cron"] for path in WORKFLOWS for entry in load(path)[0][True].get("schedule", ())]  # "on" is True
    expressions += re.findall(r"Pipeline schedules: (.+)", GITLAB.read_text(encoding="utf-8"))
    assert len(expressions) == 4
    for expression in expressions:
        times = CronSim(expression, datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC))
        first, second = next(times), next(times)
        assert second - first == datetime.timedelta(days=1)
        assert first.minute != 0
    done = check("systemd-analyze", "calendar", dict(settings(SERVICE.with_suffix(".timer")))["OnCalendar"])
    assert done.returncode == 0, done.stderr


def test_cron_reads_no_percent_sign_as_a_line_break() -> None:
    assert "%" not in crontab()[2]
    assert CRONTAB.read_text(encoding="utf-8").endswith("\n")  # cron ignores a last line without


# ------------------------------------------------------------------------------------------- secrets and privileges


@pytest.mark.parametrize("path", FILES, ids=named)
def test_no_secret_stands_in_a_file(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "-----BEGIN" not in text
    assert all((ROOT / run).exists() for run in re.findall(r"(?<![\w@/.-])[A-Za-z0-9+/]{32,}", text))  # base64, or a path
    for name, value in re.findall(r"\b([A-Z_]*(?:KEYS?|TOKEN|SECRET|PASSWORD))\s*[:=][ \t]*(\S.*)", text):
        allowed = r"(/\S+|%d/\S+|\$\{\{ (secrets|vars)\.\w+ \}\})"
        assert re.match(allowed, value), name


@pytest.mark.parametrize("path", FILES, ids=named)
def test_every_variable_is_read_by_somebody(path: Path) -> None:
    ours = "".join(
        file.read_text(encoding="utf-8")
        for folder in ("audit_plugin", "mlflow_plugins")
        for file in (ROOT / folder).rglob("*.py")
    )
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"\bBACKDOOR_AUDIT_[A-Z_]+", text):
        assert f'"{name}"' in ours, name
    for name in re.findall(r"\bMLFLOW_[A-Z_]+[A-Z]\b", text):
        assert hasattr(mlflow.environment_variables, name), name


@pytest.mark.parametrize("path", WORKFLOWS, ids=named)
def test_workflows_have_no_more_rights_than_they_need(path: Path) -> None:
    workflow = load(path)[0]
    assert workflow["permissions"] == {}
    (job,) = workflow["jobs"].values()
    needed = {"contents": "read"}
    if "gate" in path.name:
        needed |= {"actions": "read", "security-events": "write"}
    assert job["permissions"] == needed
    with_key = [step for step in job["steps"] if "BACKDOOR_AUDIT_SIGNING_KEY" in step.get("env", {})]
    assert [PROGRAM in step["run"] for step in with_key] == [True]  # and pip does not see it
    assert all(re.search(r"@[0-9a-f]{40}$", step["uses"]) for step in job["steps"] if "uses" in step)


@pytest.mark.parametrize(
    ("path", "name"), [(path, name) for path in (CRONJOB, RAYJOB) for name in pods(path)], ids=lambda value: str(value)
)
def test_pods_keep_the_restricted_pod_security_standard(path: Path, name: str) -> None:
    spec = pods(path)[name]["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & set(spec)
    for container in spec["containers"]:
        security = container["securityContext"]
        assert security == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["limits"]["memory"]
    assert {next(iter(set(volume) - {"name"})) for volume in spec["volumes"]} <= {"configMap", "secret", "emptyDir"}


def test_ray_workers_and_the_submitter_have_no_signing_key() -> None:
    with_key = [name for name, pod in pods(RAYJOB).items() if "signing" in yaml.safe_dump(pod).lower()]
    assert with_key == ["head"]
    assert load(RAYJOB)[0]["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_strangers_submit_no_jobs_to_ray() -> None:
    job, policy = load(RAYJOB)
    assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    selected = policy["spec"]["podSelector"]["matchLabels"]
    assert all(pod["metadata"]["labels"] == selected for pod in pods(RAYJOB).values())
    assert [next(iter(source)) for source in policy["spec"]["ingress"][0]["from"]] == ["podSelector", "namespaceSelector"]


def test_the_service_lets_the_sandbox_work() -> None:
    """bubblewrap needs namespaces and an uncovered /proc, torch memory that it may write and execute."""
    keys = dict(settings(SERVICE))
    forbidden = {"RestrictNamespaces", "ProtectKernelTunables", "ProtectKernelLogs", "ProtectProc", "ProcSubset"}
    assert not (forbidden | {"SystemCallFilter", "MemoryDenyWriteExecute"}) & set(keys)
    assert (keys["DynamicUser"], keys["NoNewPrivileges"], keys["ProtectSystem"]) == ("yes", "yes", "strict")


# --------------------------------------------------------------------------------------------------- two of them run


@pytest.fixture(scope="module")
def registry(start_server, tmp_path_factory) -> Iterator[tuple[AuditedRegistry, str]]:
    folder = tmp_path_factory.mktemp("schedules")
    with start_server(folder) as address:
        yield AuditedRegistry(folder), address


def run_in_shell(command: str, folder: Path, registry: AuditedRegistry, address: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "BACKDOOR_AUDIT_"))}
    environment = {
        **inherited,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "MLFLOW_TRACKING_URI": address,
        "BACKDOOR_AUDIT_SIGNING_KEY": str(registry.signing),
        "BACKDOOR_AUDIT_VERIFYING_KEYS": str(registry.verifying),
    }
    (folder / "audit.toml").touch()
    return subprocess.run(
        ["bash", "-ec", command], cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=200
    )


@pytest.mark.slow
def test_the_lines_of_cron_and_gitlab_do_what_they_should(registry, tmp_path) -> None:
    filled, address = registry
    (scan,) = load(GITLAB)[0]["backdoor-scan"]["script"]
    log = tmp_path / "scan.log"
    line = crontab()[2].replace("/var/log/backdoor-audit/scan.log", str(log)).replace("/var/lib/backdoor-audit", str(tmp_path))

    filled.add("digits", "pass", facts={"tool_version": VERSION})
    passed = run_in_shell(scan, tmp_path, filled, address)
    assert passed.returncode == 0, passed.stdout + passed.stderr
    assert (tmp_path / "summary" / "summary.html").is_file()
    quiet = run_in_shell(line, tmp_path, filled, address)
    assert (quiet.stdout, quiet.stderr) == ("", ""), "cron would mail it"
    assert "1 pass" in log.read_text(encoding="utf-8")

    filled.add("digits", "fail", facts={"tool_version": VERSION})
    mailed = run_in_shell(line, tmp_path, filled, address)
    assert mailed.stdout.startswith("Exit code 1\n")
    assert "models:/digits/2" in mailed.stdout
