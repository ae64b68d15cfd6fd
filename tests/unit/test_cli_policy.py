from __future__ import annotations

import dataclasses
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from audit_plugin.cli.policy import policy_text
from audit_plugin.policy import Policy, load_policy
from audit_plugin.promotion import default_suite_text, load_suite
from audit_plugin.report.schema import dumps, to_document
from tests.unit.report.conftest import failing, hostile, passing

Cli = Callable[..., "subprocess.CompletedProcess[str]"]

KEYS = [
    (section.name, key.name, key.default)
    for section in dataclasses.fields(Policy)
    if dataclasses.is_dataclass(section.default_factory)  # [clean_images] has no keys of its own
    for key in dataclasses.fields(getattr(Policy(), section.name))
]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def sections(text: str) -> dict[str, str]:
    parts = re.split(r"^\[(\w+)\]$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def report_file(report: Any) -> Path:
    path = Path("report.json")
    path.write_text(dumps(to_document(report)), encoding="utf-8")
    return path


# ---------------------------------------------------------------------------------------------------- policy init


def test_init_writes_a_policy_that_is_the_default_and_the_shipped_suite(cli: Cli) -> None:
    done = cli("policy", "init")
    assert (done.returncode, done.stderr) == (0, "")
    assert load_policy(Path("audit.toml")) == Policy()
    assert Path("promotion.json").read_text() == default_suite_text()
    assert 'suite = "promotion.json"' in done.stdout


def test_every_default_can_be_uncommented(tmp_path: Path) -> None:
    text = policy_text()
    set_ones = re.sub(r"^#(\w+ = (?!\.\.\.$))", r"\1", text, flags=re.MULTILINE)
    (tmp_path / "all.toml").write_text(set_ones, encoding="utf-8")
    policy = load_policy(tmp_path / "all.toml")
    # The suite is shown with the name under which it was written; without that, all is the default.
    assert policy.gate.suite == "promotion.json"
    assert dataclasses.replace(policy, gate=dataclasses.replace(policy.gate, suite=None)) == Policy()
    assert len(re.findall(r"^\w+ = ", set_ones, re.MULTILINE)) == sum(default is not None for *_, default in KEYS) + 1


@pytest.mark.parametrize(("section", "key", "default"), KEYS, ids=lambda value: str(value))
def test_every_key_has_its_meaning_above_it(section: str, key: str, default: object) -> None:
    lines = sections(policy_text())[section].splitlines()
    (place,) = [number for number, line in enumerate(lines) if line.startswith(f"#{key} = ")]
    assert re.match(r"# \S", lines[place - 1])


def test_a_changed_key_is_obeyed_and_lines_are_short() -> None:
    text = policy_text()
    Path("audit.toml").write_text(text.replace("#tau = 2.5", "tau = 3.0"), encoding="utf-8")
    assert load_policy(Path("audit.toml")).layerwise.tau == 3.0
    assert max(map(len, text.splitlines())) <= 100
    assert "](" not in text


@pytest.mark.parametrize("taken", ["audit.toml", "promotion.json"])
def test_init_overwrites_nothing(cli: Cli, taken: str) -> None:
    Path(taken).write_text("mine")
    done = cli("policy", "init")
    assert done.returncode == 4
    assert f"'{taken}' exists" in done.stderr
    assert Path(taken).read_text() == "mine"
    assert [path.name for path in Path().iterdir()] == [taken]


def test_init_does_not_write_through_a_dangling_link(cli: Cli) -> None:
    Path("audit.toml").symlink_to("elsewhere.toml")
    assert cli("policy", "init").returncode == 4
    assert not Path("elsewhere.toml").exists()


def test_init_makes_the_folder_of_a_named_file(cli: Cli) -> None:
    assert cli("policy", "init", "policies/vision.toml").returncode == 0
    assert load_policy(Path("policies/vision.toml")) == Policy()
    assert load_suite(Path("policies/promotion.json")) == load_suite(None)


@pytest.mark.parametrize("name", [".", "promotion.json"])
def test_init_wants_the_name_of_a_policy_file(cli: Cli, name: str) -> None:
    done = cli("policy", "init", name)
    assert done.returncode == 4
    assert "such as audit.toml" in done.stderr
    assert not list(Path().iterdir())


# --------------------------------------------------------------------------------------------------- policy check


def test_check_accepts_what_init_wrote(cli: Cli) -> None:
    cli("policy", "init")
    done = cli("policy", "check", "--policy", "audit.toml", "--suite", "promotion.json")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        f"audit.toml: a valid policy, digest {Policy().digest}",
        f"promotion.json: a valid promotion suite of 5 expectations, digest {load_suite(None).digest}",
    ]


def test_check_finds_the_suite_that_the_policy_names(cli: Cli) -> None:
    cli("policy", "init", "policies/audit.toml")
    policy = Path("policies/audit.toml")
    policy.write_text(policy.read_text().replace("#suite = ", "suite = "), encoding="utf-8")
    done = cli("policy", "check", "--policy", policy)
    assert done.returncode == 0
    assert "policies/promotion.json: a valid promotion suite" in done.stdout
    Path("policies/promotion.json").unlink()
    done = cli("policy", "check", "--policy", policy)
    assert done.returncode == 4
    assert "There is no promotion suite 'policies/promotion.json'" in done.stderr


@pytest.mark.parametrize(
    ("policy", "suite", "words"),
    [
        ("[layerwise]\ntaus = 3\n", "[]", "has no key 'taus'. Did you mean 'tau'?"),
        ("", "[]", "The promotion suite is empty"),
        ("", '[{"type": "x", "kwargs": {}}]', "Expectation 1 of the promotion suite is of a type that cannot be used here: 'x'."),
        (
            "",
            '[{"type": "expect_column_values_to_match_regex", "kwargs": {"column": "verdict", "regex": "("}}]',
            "Expectation 1 of the promotion suite could not be evaluated: Invalid regular expression",
        ),
    ],
)
def test_check_names_the_mistake(cli: Cli, policy: str, suite: str, words: str) -> None:
    Path("audit.toml").write_text(policy)
    Path("promotion.json").write_text(suite)
    done = cli("policy", "check", "--policy", "audit.toml", "--suite", "promotion.json")
    assert done.returncode == 4
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_check_says_what_the_suite_makes_of_a_report(cli: Cli) -> None:
    done = cli("policy", "check", "--report", report_file(passing()))
    assert done.returncode == 0
    assert done.stdout.startswith("the shipped suite: a valid promotion suite")
    assert done.stdout.endswith("report.json: the suite allows models:/cifar-classifier/7\n")
    done = cli("policy", "check", "--report", report_file(failing()))
    assert done.returncode == 1
    assert "  NOT MET  The audit's verdict is pass. (verdict is fail)\n" in done.stdout
    assert "  met      The audit rests on at least 200 clean images. (clean_images is 1500)\n" in done.stdout
    assert done.stdout.endswith("report.json: the suite does not allow models:/cifar-classifier/7\n")


def test_a_hostile_report_sends_nothing_to_the_terminal(cli: Cli) -> None:
    done = cli("policy", "check", "--report", report_file(hostile()))
    assert done.returncode == 1
    assert "\x1b" not in done.stdout + done.stderr
    assert r"does not allow \x1b[2J" in done.stdout


def test_check_refuses_what_is_no_report(cli: Cli) -> None:
    document = to_document(passing())
    del document["outcomes"]
    Path("report.json").write_text(json.dumps(document))
    done = cli("policy", "check", "--report", "report.json")
    assert done.returncode == 4
    assert "Not a valid audit report" in done.stderr
    assert cli("policy", "check", "--report", "none.json").returncode == 4


def test_check_of_nothing_is_a_mistake(cli: Cli) -> None:
    done = cli("policy", "check")
    assert done.returncode == 4
    assert "Nothing to check" in done.stderr
