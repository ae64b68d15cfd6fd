"""``backdoor-audit policy``: begin a policy file and a promotion suite, and check them."""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import re
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from audit_plugin.errors import UsageError
from audit_plugin.policy import SECTIONS, Policy, load_policy

SUITE_FILE = "promotion.json"
_EXAMPLES = {("gate", "suite"): SUITE_FILE}
"""What to show for keys that are not set by default."""
_WIDTH = 100
_REFUSED = 1

policy_app = typer.Typer(
    help="Begin and check a policy file and a promotion suite.", no_args_is_help=True, rich_markup_mode="rich"
)


@policy_app.command()
def init(
    file: Annotated[Path, typer.Argument(help="Policy file to write; promotion.json goes beside it.")] = Path("audit.toml"),
) -> int:
    """Write a policy file with every default, commented out, and the shipped promotion suite. Nothing is overwritten."""
    from audit_plugin.promotion import default_suite_text

    if file.is_dir() or file.name == SUITE_FILE:
        raise UsageError(f"Expected the name of a policy file to write, such as audit.toml, got '{file}'.")
    contents = {file: policy_text(), file.with_name(SUITE_FILE): default_suite_text()}
    for path in contents:
        if path.exists() or path.is_symlink():
            raise UsageError(f"'{path}' exists, and nothing is overwritten. Choose another folder.")
    file.absolute().parent.mkdir(parents=True, exist_ok=True)
    for path, content in contents.items():
        with path.open("x", encoding="utf-8") as stream:
            stream.write(content)
        _say(f"Wrote {path}")
    _say(f'The suite holds once [gate] suite = "{SUITE_FILE}" is set in the policy.')
    return 0


@policy_app.command()
def check(
    policy: Annotated[Path | None, typer.Option(help="Policy file, audit.toml.")] = None,
    suite: Annotated[Path | None, typer.Option(help="Promotion suite. Else the policy's, else the shipped one.")] = None,
    report: Annotated[Path | None, typer.Option(help="A report.json, to see what the suite makes of it.")] = None,
) -> int:
    """Check a policy file and a promotion suite. Exit code 4 for a mistake in one, 1 for a report that is not allowed."""
    if policy is None and suite is None and report is None:
        raise UsageError("Nothing to check: give --policy audit.toml, --suite promotion.json, or both.")
    from audit_plugin.promotion import check_suite, judge_document, load_suite
    from audit_plugin.report.schema import load
    from audit_plugin.requirements import suite_path

    found = load_policy(policy)
    if policy is not None:
        _say(f"{policy}: a valid policy, digest {found.digest}")
    place = suite or suite_path(found.gate, policy)
    expectations = load_suite(place)
    document = None if report is None else load(report)
    check_suite(expectations)
    name = "the shipped suite" if place is None else str(place)
    _say(f"{name}: a valid promotion suite of {len(expectations.expectations)} expectations, digest {expectations.digest}")
    if document is None:
        return 0
    promotion = judge_document(document, expectations)
    for result in promotion.results:
        _say(f"  {'met    ' if result.success else 'NOT MET'}  {result.description} ({result.observed})")
    _say(f"{report}: the suite {'allows' if promotion.allowed else 'does not allow'} {document['model']['pinned_uri']}")
    return 0 if promotion.allowed else _REFUSED


def policy_text() -> str:
    """A policy file with every section, and every key commented out, at its default, below what it means."""
    lines = [
        *_prose("Policy of backdoor-audit. Every key is shown with its default; to change one, remove the # before it."),
        "",
    ]
    page = importlib.resources.files("audit_plugin").joinpath("policy.md").read_text(encoding="utf-8")
    for section in SECTIONS:
        described = page.partition(f"\n## [{section}]\n")[2].partition("\n## ")[0]
        introduction = described.partition("\n|")[0]
        meanings = dict(re.findall(r"^\| `(\w+)` \| .*? \| (.*) \|$", described, re.MULTILINE))
        lines += ["", *_prose(introduction), f"[{section}]", ""]
        defaults = getattr(Policy(), section)
        if not dataclasses.is_dataclass(defaults):  # [clean_images], whose keys are the user's own
            lines.append('#"digits-*" = "clean/digits.npz"')
            continue
        for key in dataclasses.fields(defaults):
            default = key.default if key.default is not None else _EXAMPLES.get((section, key.name))
            value = "..." if default is None else json.dumps(default)
            lines += [*_prose(meanings.get(key.name, "")), f"#{key.name} = {value}"]
    return "\n".join(lines) + "\n"


def _prose(markdown: str) -> list[str]:
    """A paragraph of ``docs/policy.md`` as comment lines."""
    text = re.sub(r"\[([^\]]+)\]\(([^)]+)\)", r"\1 (docs/\2)", " ".join(markdown.split()))
    return textwrap.wrap(text, _WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)


def _say(line: str) -> None:
    """Print a line whose control characters, of a path or of a model's name, do not reach the terminal."""
    from audit_plugin.report.sanitise import clean_text

    typer.echo(clean_text(line, 1000))
