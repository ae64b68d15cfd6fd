"""What the documentation claims of the code: keys, options, commands, links, tests."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer

from audit_plugin.cli import EXIT_CODES, EXIT_ERROR, EXIT_USAGE, FORMATS, app
from audit_plugin.policy import SECTIONS, Policy, load_policy
from audit_plugin.verdict import BLIND_SPOTS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
POLICY = (ROOT / "docs" / "policy.md").read_text(encoding="utf-8")
THREATS = (ROOT / "docs" / "threat-model.md").read_text(encoding="utf-8")
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]

POLICY_KEYS = [
    (section.name, key.name, key.default)
    for section in dataclasses.fields(Policy)
    if dataclasses.is_dataclass(section.default_factory)  # [clean_images] has no keys of its own
    for key in dataclasses.fields(section.default_factory)  # type: ignore[arg-type]
]


def section_of(page: str, heading: str) -> str:
    """The text below ``## heading``, up to the next one."""
    _, found, rest = page.partition(f"\n## {heading}\n")
    assert found, f"no section '## {heading}'"
    return rest.partition("\n## ")[0]


def code_blocks(page: str, language: str = "") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


def options_of(command: str) -> set[str]:
    return {spelling for parameter in COMMANDS[command].params for spelling in (*parameter.opts, *parameter.secondary_opts)}


def anchors(page: str) -> set[str]:
    """GitHub's names of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(("section", "key", "default"), POLICY_KEYS, ids=lambda value: str(value))
def test_every_policy_key_is_described_with_its_default(section: str, key: str, default: object) -> None:
    shown = "not set" if default is None else f"`{json.dumps(default)}`"  # as TOML writes it
    assert f"\n| `{key}` | {shown} | " in section_of(POLICY, f"[{section}]")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_no_brackets_that_rich_would_swallow(command: str) -> None:
    helps = [getattr(parameter, "help", None) or "" for parameter in COMMANDS[command].params]
    assert not [text for text in helps if re.search(r"\[[a-z_]+\]", text)]


def test_the_policy_page_describes_no_other_keys() -> None:
    for section in SECTIONS:
        described = re.findall(r"^\| `(\w+)` \|", section_of(POLICY, f"[{section}]"), re.MULTILINE)
        assert described == [key for name, key, _ in POLICY_KEYS if name == section]


@pytest.mark.parametrize("page", [README, POLICY], ids=["README.md", "docs/policy.md"])
def test_the_example_policies_are_valid(page: str, tmp_path: Path) -> None:
    (example,) = code_blocks(page, "toml")
    (tmp_path / "audit.toml").write_text(example, encoding="utf-8")
    assert load_policy(tmp_path / "audit.toml") != Policy()


def test_every_option_in_the_readme_exists() -> None:
    lines = [line.partition(" #")[0] for block in code_blocks(README) for line in block.splitlines()]
    used = [
        line.split() for line in [*lines, *re.findall(r"`(backdoor-audit [^`]*)`", README)] if line.startswith("backdoor-audit ")
    ]
    assert len(used) > 5
    for _, command, *arguments in used:
        assert command in COMMANDS, command
        assert {argument for argument in arguments if argument.startswith("-")} <= options_of(command)
    inline = {option for code in re.findall(r"`(-[^`]*)`", README) for option in code.split() if option.startswith("-")}
    assert "--policy" in inline
    assert inline <= set().union(*map(options_of, COMMANDS))


def test_every_option_of_run_is_in_the_readme() -> None:
    missing = {option for option in options_of("run") if option.startswith("--") and option not in README}
    assert missing <= {"--help", "--verbose", "--output"}  # -o is shown


def test_exit_codes_and_formats_are_those_of_the_command_line() -> None:
    rows = dict(re.findall(r"^\| (\d) \| (\w+)", README, re.MULTILINE))
    codes = {str(code): str(verdict) for verdict, code in EXIT_CODES.items()}
    assert rows == {**codes, str(EXIT_ERROR): "error", str(EXIT_USAGE): "usage"}
    cells = re.findall(r"^\| ((?:`[a-z]+`(?:, )?)+)(?: \(default\))? \| (?:standard output|needs? `-o`)", README, re.MULTILINE)
    assert tuple(name for cell in cells for name in re.findall(r"`([a-z]+)`", cell)) == FORMATS


def test_the_blind_spots_are_in_the_readme() -> None:
    unwrapped = " ".join(README.split())
    for sentence in BLIND_SPOTS:
        assert f"- {re.split(', so |[.]$', sentence)[0]}" in unwrapped


def test_the_two_commands_are_make_targets() -> None:
    blocks = code_blocks(section_of(README, "Two commands"))
    assert blocks == ["make demo\n", "make test\n"]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    named = {
        name for page in PAGES for name in re.findall(r"(?:^|`)make ([\w-]+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert {"demo", "test"} <= named <= set(targets)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_resolve(page: Path) -> None:
    content = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"", content):
        path, _, anchor = "".join(target).partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        linked = page.parent / path if path else page
        assert linked.exists(), f"{page.name} links to {path}"
        if anchor:
            assert anchor in anchors(linked.read_text(encoding="utf-8")), f"{page.name} links to {path}#{anchor}"


def test_the_tests_that_the_threat_model_names_exist() -> None:
    files = {
        path.name: path
        for folder in ("security", "unit", "integration", "e2e")
        for path in (ROOT / "tests" / folder).rglob("test_*.py")
    }
    named = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", THREATS)
    assert len(named) > 20
    for file, test in named:
        assert file in files, file
        functions = {
            node.name for node in ast.walk(ast.parse(files[file].read_text("utf-8"))) if isinstance(node, ast.FunctionDef)
        }
        assert not test or test in functions, f"{file}::{test}"
