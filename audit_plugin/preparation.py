"""What an audit, a repair and a guard begin with: checked files, a loaded model, clean images in three splits."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from audit_plugin.data.clean_set import LoadedImages, load_images
from audit_plugin.data.splits import split
from audit_plugin.errors import CleanSetError
from audit_plugin.intake import inspect
from audit_plugin.model.input_spec import distrusted_tags, open_shape, resolve_class_names, resolve_input_spec
from audit_plugin.model.load import load_network
from audit_plugin.model.state import with_changed_state
from audit_plugin.model.subject import Subject, check_answers, check_parity, prepare_subject
from audit_plugin.model.unpickle import convert_pickle
from audit_plugin.policy import Policy
from audit_plugin.types import Intake, ModelRef, Splits, TapParity

_PARITY_IMAGES = 8
_ANSWERED_IMAGES = 24


@dataclass(frozen=True)
class Prepared:
    """A model that may be measured, and the images to do it with; ``suspects`` None when none were given."""

    intake: Intake
    subject: Subject
    clean: LoadedImages
    splits: Splits
    suspects: LoadedImages | None
    parity: tuple[TapParity, ...]


def prepare(
    model: ModelRef,
    folder: Path,
    clean: Path,
    policy: Policy,
    *,
    seed: int,
    suspects: Path | None = None,
    allow_pickle: bool = False,
    require_gpu: bool = False,
    stage: Callable[[str], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
) -> Prepared:
    """Check, load, read, export and compare; arguments as for :func:`audit_plugin.audit.audit`.

    Two calls with the same seed give the same splits.

    Args:
        stage: called with the name of each stage, which runs within what it returns.

    Raises:
        IntakeError, SubjectError, ExportError, CleanSetError: one clear line.
    """
    with tempfile.TemporaryDirectory(prefix="backdoor-audit-") as temporary:
        with stage("Checking the model's files"):
            intake = inspect(folder, allow_pickle=allow_pickle)
            file = folder / intake.data_path
            if intake.flavour == "pickle":
                file, intake = _without_pickle(folder, intake, policy, Path(temporary))

        with stage("Loading the model"):
            network = load_network(
                file,
                intake,
                architecture=policy.model.architecture,
                class_count=len(policy.model.classes) if policy.model.classes else None,
                input_shape=open_shape(policy.model),
            )
            spec = resolve_input_spec(network.input_shape, policy.model, model.tags)
            class_names = resolve_class_names(network.class_count, policy.model, model.tags)
            distrusted = distrusted_tags(spec, network.input_shape, policy.model, model.tags, intake.data_path)
            intake = with_changed_state(dataclasses.replace(intake, findings=(*intake.findings, *distrusted)), network)

    with stage("Reading the clean images"):
        loaded = load_images(clean, input_spec=spec, class_names=class_names)
        fractions = (policy.clean_set.fit_fraction, policy.clean_set.calibrate_fraction)
        splits = split(loaded.data, seed=seed, fractions=(*fractions, 1.0 - sum(fractions)), minimum_per_class=1)
        if not all(len(part) for part in (splits.fit, splits.calibrate, splits.test)):
            raise CleanSetError(f"{len(loaded.data)} clean images are too few for three splits; give at least 3 of some class.")
        suspicious = load_images(suspects, input_spec=spec, class_names=class_names, labels_required=False) if suspects else None

    with stage("Exporting to ONNX and comparing with torch"):
        subject = prepare_subject(network, spec, flavour=intake.flavour, class_names=class_names, require_gpu=require_gpu)
        check_answers(subject, splits.test.images[:_ANSWERED_IMAGES])
        parity = check_parity(subject, splits.test.images[:_PARITY_IMAGES])
    return Prepared(intake, subject, loaded, splits, suspicious, parity)


def _without_pickle(folder: Path, intake: Intake, policy: Policy, working_folder: Path) -> tuple[Path, Intake]:
    """Have a child process turn the pickle into an exported program, which passes the same static check."""
    shape = intake.signature.input_shape if intake.signature else open_shape(policy.model)
    file, finding = convert_pickle(folder, intake.data_path, shape, working_folder)
    return file, dataclasses.replace(intake, findings=(*intake.findings, finding, *inspect(file.parent).findings))
