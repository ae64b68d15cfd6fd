"""Makes a pool of clean reference models, with which audits can say how unusual a model is.

python -m pipelines.calibrate pool models:/signs/3 models:/signs/4 ... --clean clean.npz -o signs.json   audits, and resumes
python -m pipelines.calibrate pool reports/*/report.json -o signs.json                                   of audits that were made
python -m pipelines.calibrate compare signs.json report.json ...                                         p-values of other audits
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from audit_plugin.calibration import FEWEST_REFERENCES, SETTINGS, Reference, ReferencePool, calibrate, check_pool, find_pool
from audit_plugin.errors import AuditError, UsageError
from audit_plugin.manifest import digest_of, manifest_of
from audit_plugin.policy import Policy, load_policy
from audit_plugin.report import load
from audit_plugin.report.sanitise import clean_text

app = typer.Typer(help="Pools of clean reference models.", no_args_is_help=True)
log = logging.getLogger("pipelines.calibrate")


@app.callback()
def _group() -> None:
    """One command a task."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")


@app.command()
def pool(
    models: Annotated[list[str], typer.Argument(help="report.json files, or models as 'backdoor-audit run' takes them.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The pool to write, a .json file.")],
    name: Annotated[str | None, typer.Option(help="Of the pool; the file's name if not given.")] = None,
    about: Annotated[
        str, typer.Option(help="What the models are, for whoever reads the pool: data, architectures, training.")
    ] = "",
    clean: Annotated[str | None, typer.Option(help="Clean images, for models that are still to be audited.")] = None,
    policy_file: Annotated[Path | None, typer.Option("--policy", help="Policy file, for models still to be audited.")] = None,
    reports: Annotated[Path | None, typer.Option(help="Folder that keeps the reports of such audits, to resume.")] = None,
    seed: Annotated[int, typer.Option(help="Of the splits and the searches.")] = 0,
) -> None:
    """Make a pool of models that are known to be clean.

    A model whose audit fails stays in: leaving false alarms out would make the pool say that there are none.
    """
    if output.suffix != ".json" or not output.parent.is_dir():
        raise typer.BadParameter(f"--output must be a .json file in a folder that exists, got '{output}'.")
    if clean is not None and len(models) < FEWEST_REFERENCES:  # before hours of audits
        raise typer.BadParameter(f"A pool needs at least {FEWEST_REFERENCES} models, got {len(models)}.")
    try:
        documents = _documents(models, clean, load_policy(policy_file), policy_file, reports, seed)
        made = pool_of(documents, name or output.stem, about)
    except AuditError as error:
        raise typer.BadParameter(str(error)) from error
    output.write_text(json.dumps(made.document(), indent=1) + "\n", encoding="utf-8")
    least = 1 / (len(made.references) + 1)
    log.info("%s: %d references, so that no p-value is below %.3g; digest %s", output, len(made.references), least, made.digest)
    if least > 0.05:
        log.info("For p-values of 0.05, 19 references are needed.")
    log.info('Policy:\n\n[calibration]\npool = "%s"', output)


@app.command()
def compare(
    pool_name: Annotated[str, typer.Argument(metavar="POOL", help="A pool's .json file, or the name of one that is shipped.")],
    reports: Annotated[list[Path], typer.Argument(help="report.json files.")],
) -> None:
    """Where audited models stand in a pool: one line each, the p-value of all statistics together and of each."""
    try:
        pool = find_pool(pool_name, Path())
        for path in reports:
            document = load(path)
            found = calibrate(*_measured(document, path), document["policy"], document["tool"]["version"], pool, alpha=0.5)
            name = clean_text(str(document["model"]["pinned_uri"]), 60)
            if found.problems:
                typer.echo(f"{name:<48} {document['decision']['verdict']:<13} not comparable: {' '.join(found.problems)}")
                continue
            each = ", ".join(f"{statistic} {p_value:.3f}" for statistic, p_value in found.p_values.items())
            typer.echo(f"{name:<48} {document['decision']['verdict']:<13} p = {found.p_value:.3f}   {each}")
    except AuditError as error:
        raise typer.BadParameter(str(error)) from error


def pool_of(documents: Sequence[Mapping[str, Any]], name: str, about: str) -> ReferencePool:
    """A pool of audits, given as the documents of their reports.

    Raises:
        UsageError: they are too few, or differ in what was measured, the settings or the version of the tool.
    """
    if not documents:
        raise UsageError("There are no audits to make a pool of.")
    settings = [{section: document["policy"].get(section) for section in SETTINGS} for document in documents]
    versions = {str(document["tool"]["version"]) for document in documents}
    if any(found != settings[0] for found in settings) or len(versions) > 1:
        raise UsageError("The audits were made with different settings or versions of the tool; audit all models alike.")
    references = []
    for document in documents:
        digest, traits, statistics = _measured(document, Path(str(document["model"]["pinned_uri"])))
        if document["decision"]["verdict"] == "fail":
            log.warning("%s is said to be clean, and its audit fails.", clean_text(str(document["model"]["pinned_uri"]), 80))
        references.append(Reference(digest, traits, statistics))
    made = ReferencePool(
        name=name,
        provenance={
            "about": about,
            "created": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "clean images": ", ".join(sorted({str(document["clean_set"]["digest"]) for document in documents})),
        },
        settings=settings[0],
        tool_version=versions.pop(),
        references=tuple(sorted(references, key=lambda entry: entry.digest)),
    )
    try:
        check_pool(made)
    except ValueError as error:
        raise UsageError(f"No pool can be made of these audits: {error}.") from error
    return made


def _measured(document: Mapping[str, Any], source: Path) -> tuple[str, dict[str, float], dict[str, float]]:
    found = document["calibration"]
    if not found or not found["statistics"]:
        raise UsageError(f"The audit of '{clean_text(source, 80)}' measured no statistics, so it cannot be compared.")
    return str(document["model"]["digest"]), dict(found["traits"]), dict(found["statistics"])


def _documents(
    models: Sequence[str], clean: str | None, policy: Policy, policy_file: Path | None, reports: Path | None, seed: int
) -> list[dict[str, Any]]:
    """The reports, in the order of the models; those that are not there yet are made and, with ``reports``, kept."""
    documents = []
    for place, model in enumerate(models, start=1):
        if model.endswith(".json"):
            documents.append(load(Path(model)))
            continue
        if clean is None:
            raise UsageError(f"'{clean_text(model, 80)}' is no report.json, so it is to be audited, and --clean is missing.")
        log.info("%d of %d, %s", place, len(models), clean_text(model, 80))
        documents.append(_audited(model, clean, policy, policy_file, reports, seed))
    return documents


def _audited(model: str, clean: str, policy: Policy, policy_file: Path | None, reports: Path | None, seed: int) -> dict[str, Any]:
    from audit_plugin.publishing import audit_pinned
    from audit_plugin.registry import fetch_images, pin
    from audit_plugin.report.write import write_report

    with tempfile.TemporaryDirectory(prefix="backdoor-audit-") as temporary:
        pinned = pin(model, Path(temporary) / "model")
        images = _content_digest(fetch_images(clean, Path(temporary) / "clean"))  # the path alone may come to hold other images
        asked = json.dumps([pinned.reference.digest, policy.digest, seed, images])
        folder = (reports or Path(temporary)) / hashlib.sha256(asked.encode()).hexdigest()[:16]
        if not (folder / "report.json").exists():
            command = ["backdoor-audit", "run", model, "--clean", clean, "--seed", str(seed)]
            command += ["--policy", str(policy_file)] if policy_file else []
            report = audit_pinned(pinned, clean, policy=policy, seed=seed, command=shlex.join(command))
            # Made beside its place, so that what is there is whole.
            folder.parent.mkdir(parents=True, exist_ok=True)
            part = Path(tempfile.mkdtemp(prefix="part-", dir=folder.parent))
            write_report(report, part, ["json"])
            part.rename(folder)
        return load(folder / "report.json")


def _content_digest(images: Path) -> str:
    """SHA-256 of an .npz file, or over the files of a folder with their names; of what is not there that of nothing."""
    if images.is_file():
        with images.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    return digest_of(manifest_of(images))


if __name__ == "__main__":
    app()
