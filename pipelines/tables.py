"""Measures the audit, the peers, the checks and the repairs on models whose backdoor is known.

python -m pipelines.benchmark tables zoo/ --data-dir data/ -o tables/

A measurement is one detector on one model with one seed. Each runs in a process of its own, so that its peak memory is its
own and a crash costs one measurement, and ends as one JSON file, written at once: what is there is not measured again. The true
trigger measures and never chooses.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import math
import multiprocessing
import os
import platform
import resource
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from audit_plugin.audit import audit, scorers_of
from audit_plugin.checks import LayerwiseScorer
from audit_plugin.checks.inversion import Budget, Goal, Patches, Perturbations, invert
from audit_plugin.errors import AuditError, InapplicableError, UsageError, nearest
from audit_plugin.manifest import digest_of, manifest_of
from audit_plugin.maths.pixels import to_pixels
from audit_plugin.maths.rates import auroc, quantile_threshold
from audit_plugin.model.fine_tuning import predicted, take_step
from audit_plugin.model.input_spec import resolve_class_names, resolve_input_spec
from audit_plugin.model.load import load_network
from audit_plugin.model.subject import Subject, prepare_subject
from audit_plugin.policy import Policy
from audit_plugin.repair import REPAIRS
from audit_plugin.types import (
    AuditReport,
    CalibrateSplit,
    FitSplit,
    ImageArray,
    InputScores,
    Intake,
    LabelArray,
    LabelledImages,
    Measured,
    ModelRef,
    Splits,
    TestSplit,
    Trigger,
    Verdict,
    class_measurements,
    trigger_search,
)
from audit_plugin.zoo import attacks
from pipelines.peers import INPUT_PEERS, MODEL_PEERS
from pipelines.zoo_models import CARD, MODEL, read_card
from pipelines.zoo_recipes import DATA

log = logging.getLogger("pipelines.tables")

State = Literal["measured", "inapplicable", "failed"]
Row = dict[str, Any]

AUDIT, CHECKS, REPAIR = "audit", "checks", "repairs"
DETECTORS = (AUDIT, *MODEL_PEERS, *INPUT_PEERS, CHECKS, REPAIR)
RESULTS = "results"

TOOL = "mlflow-backdoor-audit"
BY_POLICY = (AUDIT, CHECKS, REPAIR)
"""Detectors that do what the default policy says; a result of theirs belongs to that policy."""

MOST_STEPS = 60
"""Steps of fine-tuning after which a backdoor is not waited for any longer."""

SWEPT: Mapping[str, tuple[str, tuple[float, ...]]] = {LayerwiseScorer.name: ("tau", (1.0, 1.5, 2.0, 2.5, 3.0))}
"""Checks whose own threshold is varied: the name of its setting, and the values, which are cuts on the check's score."""

_FALSE_POSITIVE_RATE = 0.01
_TRIGGERED_SHARE = 0.05  # over the clean inputs that an input peer is given
# Of the inputs that are answered with one class, for a peer that compares inputs: activation clustering flags what holds less
# than 35 % of a class. With 43 classes one in twenty of all was two thirds of the target's, so that a perfect clustering lost.
_MOST_TRIGGERED_PERCENT = 15
_NO_TRIGGER = -100.0  # score of a model for which no class has a trigger at all: JSON knows no infinity
_SEARCH = Budget(steps=100, images_per_step=24, images_per_batch=512, flip_rate=0.9)
_POISONED_IMAGES, _CLEAN_IMAGES, _STEPS_BETWEEN_LOOKS = 10, 54, 2
_RETURN_IMAGES = 500
_PACKAGES = (TOOL, "torch", "onnxruntime", "onnxruntime-gpu", "numpy", "scipy", "adversarial-robustness-toolbox")


@dataclass(frozen=True)
class Job:
    """One measurement.

    Attributes:
        model: folder with the model and its card.
        clean_model: folder of a clean model on the same data, to compare repairs with; None if there is none.
        clean_images, test_images: most images that a detector is given, and most of the others that it is measured on.
    """

    model: Path
    detector: str
    seed: int
    output: Path
    data_dir: Path
    clean_images: int
    test_images: int
    clean_model: Path | None = None

    @property
    def file(self) -> Path:
        return self.output / RESULTS / self.model.name / f"{self.detector}-{self.seed}.json"

    @property
    def settings(self) -> Row:
        """What a result must agree in, so that it need not be measured again."""
        settings: Row = {"clean_images": self.clean_images, "test_images": self.test_images}
        if self.detector in BY_POLICY:
            settings["policy"] = Policy().digest
        if self.detector in INPUT_PEERS and INPUT_PEERS[self.detector].compares_inputs:
            settings["most_triggered_percent"] = _MOST_TRIGGERED_PERCENT
        return settings


@dataclass(frozen=True)
class Known:
    """A model whose truth is known.

    ``attack`` is None for a clean model; ``splits.test`` holds all images that are neither fitted nor calibrated on.
    """

    name: str
    subject: Subject
    splits: Splits
    attack: attacks.Attack | None

    @property
    def target_class(self) -> int:
        """0 where there is none."""
        return self.attack.target_class if isinstance(self.attack, attacks.AllToOne) else 0

    def triggered(self) -> tuple[ImageArray, NDArray[np.bool_]]:
        """All test images that the true trigger should move, stamped, and which of them it does move; none of a clean model."""
        test = self.splits.test
        if self.attack is None:
            return test.images[:0], np.zeros(0, dtype=np.bool_)
        wanted = self.attack.wanted(test.labels)
        victims = wanted != test.labels
        stamped = self.attack.stamp(test.images[victims])
        return stamped, np.asarray(self.subject.predict(stamped) == wanted[victims])


# ---------------------------------------------------------------------------------------------------- what to measure


def plan(
    zoo: Path,
    output: Path,
    data_dir: Path,
    *,
    detectors: Sequence[str] = DETECTORS,
    seeds: int = 1,
    limit: int | None = None,
    clean_images: int = 1000,
    test_images: int = 2000,
) -> list[Job]:
    """All measurements, model after model, clean and backdoored ones in turn, so that a part of them is a balanced zoo.

    Raises:
        UsageError: an unknown detector, or no model in ``zoo``.
    """
    for name in detectors:
        if name not in DETECTORS:
            raise UsageError(f"No detector is named '{name}'.{nearest(name, DETECTORS)}")
    cards = {file.parent: read_card(file) for file in sorted(zoo.glob(f"*/{CARD}"))}
    if not cards:
        raise UsageError(f"No model with a {CARD} is in '{zoo}'. Train some first: python -m pipelines.zoo train {zoo}")
    clean = [folder for folder, card in cards.items() if card["attack"] is None]
    backdoored = [folder for folder, card in cards.items() if card["attack"] is not None]
    order = sorted([*enumerate(clean), *enumerate(backdoored)], key=lambda place: place[0])
    first_clean = {(cards[folder]["data"], cards[folder]["architecture"]): folder for folder in reversed(clean)}
    return [
        Job(
            folder,
            detector,
            seed,
            output,
            data_dir,
            clean_images,
            test_images,
            first_clean.get((cards[folder]["data"], cards[folder]["architecture"])),
        )
        for _, folder in order[:limit]
        for seed in range(seeds)
        for detector in detectors
    ]


def run(jobs: Sequence[Job], *, parallel: int = 1, device: str | None = None) -> None:
    """Make every measurement that is not there yet; failed ones are made again.

    Args:
        parallel: how many at once; more than one makes the times incomparable.
        device: 'cpu' hides the GPU, 'cuda' insists on it, None takes it where torch has one.

    Raises:
        UsageError: an unknown device, or one that is not there.
    """
    if device not in (None, "cpu", "cuda"):
        raise UsageError(f"Expected the device cuda or cpu, got '{device}'.")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("torch has no working GPU here. Use --device cpu.")
    missing = [job for job in jobs if not _is_measured(job)]
    log.info("%d of %d measurements are there already.", len(jobs) - len(missing), len(jobs))
    os.environ["TQDM_DISABLE"] = "1"  # ART draws a bar for each model
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    context = multiprocessing.get_context("forkserver")  # children that have imported everything and computed nothing
    context.set_forkserver_preload([__name__])
    started, done, lock = time.perf_counter(), 0, threading.Lock()

    def make(job: Job) -> None:
        nonlocal done
        process = context.Process(target=measure, args=(job,))
        process.start()
        process.join()
        if process.exitcode:
            note = f"The process ended with exit code {process.exitcode}."
            _write(job, {"state": "failed", "note": note, "seconds": None, "peak_memory_mib": None})
        with lock:
            done += 1
            spent = time.perf_counter() - started
            rest = f"; about {spent / done * (len(missing) - done) / 60:.1f} min to go" if done < len(missing) else ""
            what = f"{job.model.name}, {job.detector}, seed {job.seed}: {_told(job)}"
            log.info("%d of %d, %s%s", len(jobs) - len(missing) + done, len(jobs), what, rest)

    with ThreadPoolExecutor(parallel) as pool:
        list(pool.map(make, missing))


def _is_measured(job: Job) -> bool:
    try:
        record = json.loads(job.file.read_text(encoding="utf-8"))
        card = read_card(job.model / CARD)
        agrees: bool = record["settings"] == job.settings and record["sha256"] == card["sha256"]
        return agrees and record["state"] != "failed"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _told(job: Job) -> str:
    record = json.loads(job.file.read_text(encoding="utf-8"))
    if record["state"] != "measured":
        return f"{record['state']}: {record['note']}"
    judgement = record.get("judgement")
    said = f"score {judgement['score']:.2f}, {'flagged' if judgement['flagged'] else 'not flagged'}, " if judgement else ""
    return f"{said}{record['seconds']:.0f} s"


# ------------------------------------------------------------------------------------------------- one measurement


def measure(job: Job) -> None:
    """Make one measurement and write it to its file; whatever goes wrong is written there too."""
    started = time.perf_counter()
    try:
        found: Row = {"state": "measured", "note": ""} | _DETECT[job.detector](job)
    except InapplicableError as error:
        found = {"state": "inapplicable", "note": str(error)}
    except Exception as error:  # the table goes on, and says that it failed
        found = {"state": "failed", "note": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    found.setdefault("seconds", time.perf_counter() - started)
    _write(job, found)


def _write(job: Job, found: Row) -> None:
    card = read_card(job.model / CARD)
    on_gpu = torch.cuda.is_initialized()
    record: Row = {
        "model": job.model.name,
        "detector": job.detector,
        "seed": job.seed,
        "settings": job.settings,
        "sha256": card["sha256"],
        "truth": {key: card.get(key) for key in _TRUTH} | {key: card["settings"].get(key) for key in _SETTINGS},
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "versions": {"python": platform.python_version()} | dict(_versions()),
        "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "peak_gpu_memory_mib": round(torch.cuda.max_memory_allocated() / 2**20) if on_gpu else None,
        **found,
    }
    job.file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = job.file.with_suffix(".part")
    unfinished.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(unfinished, job.file)


_TRUTH = ("attack", "data", "architecture", "hardness", "clean_accuracy", "attack_success_rate")
_SETTINGS = ("target_class", "poisoning_rate")  # of the attack


def _versions() -> Iterator[tuple[str, str]]:
    for package in _PACKAGES:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue


def load_known(folder: Path, job: Job) -> Known:
    """The model in ``folder`` with images that it was not trained on."""
    card = read_card(folder / CARD)
    network = load_network(folder / MODEL, Intake("pt2", MODEL, None))
    policy = Policy()
    spec = resolve_input_spec(network.input_shape, policy.model, {})
    names = resolve_class_names(network.class_count, policy.model, {})
    subject = prepare_subject(network, spec, flavour="pt2", class_names=names)
    attack = getattr(attacks, card["attack"])(**card["settings"]) if card["attack"] else None
    splits = split_of(DATA[card["data"]].load(job.data_dir).test, job.clean_images, job.test_images, job.seed)
    return Known(folder.name, subject, splits, attack)


def split_of(data: LabelledImages, clean_images: int, test_images: int, seed: int) -> Splits:
    """Half of the clean images to fit, half to calibrate with, and further images to test.

    Of few images at most two thirds are clean images, so that some are left to test.
    """
    clean_images = min(clean_images, 2 * len(data) // 3)
    order = np.random.default_rng(seed).permutation(len(data))
    fit, calibrate, test = np.split(order, [clean_images // 2, clean_images])
    test = test[:test_images]
    return Splits(
        FitSplit(data.images[fit], data.labels[fit]),
        CalibrateSplit(data.images[calibrate], data.labels[calibrate]),
        TestSplit(data.images[test], data.labels[test]),
    )


def clean_set(splits: Splits) -> LabelledImages:
    """All that a detector is given."""
    parts = (splits.fit, splits.calibrate)
    return LabelledImages(np.concatenate([part.images for part in parts]), np.concatenate([part.labels for part in parts]))


def _audit(job: Job) -> Row:
    """The whole audit, as a user runs it on files, with the default policy."""
    card = read_card(job.model / CARD)
    splits = split_of(DATA[card["data"]].load(job.data_dir).test, job.clean_images, job.test_images, job.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder, images = Path(temporary) / "model", Path(temporary) / "clean.npz"
        folder.mkdir()
        shutil.copyfile(job.model / MODEL, folder / MODEL)
        clean = clean_set(splits)
        np.savez(images, images=clean.images, labels=clean.labels)
        manifest = manifest_of(folder)
        started = time.perf_counter()
        report = audit(ModelRef(job.model.name, str(job.model), digest_of(manifest), manifest), folder, images, seed=job.seed)
        seconds = time.perf_counter() - started
    return {"judgement": judgement_of(report), "seconds": seconds, "provider": report.runtime.provider}


def judgement_of(report: AuditReport) -> Row:
    """The score is by how much the most conspicuous class stands out; flagged is what the verdict fails.

    With what it rests on, class by class, so that another rule can be tried on the same audits.
    """
    classes, pairs = trigger_search(report.outcomes), trigger_search(report.outcomes, of_pairs=True)
    if classes is None:
        raise InapplicableError("; ".join(reason.message for reason in report.decision.reasons) or "No trigger search ran.")
    of_class, of_pair = classes.most_suspicious, pairs.most_suspicious if pairs else None
    return {
        "score": max(of_class.outlier, _NO_TRIGGER),
        "pair_score": max(of_pair.outlier, _NO_TRIGGER) if of_pair else None,
        "flagged": report.decision.verdict is Verdict.FAIL,
        "verdict": str(report.decision.verdict),
        "reasons": [reason.code for reason in report.decision.reasons],
        "not_measured": list(report.decision.not_measured),
        "suspected_class": of_class.trigger.target_class,
        "triggers": [
            {
                "class": found.trigger.target_class,
                "family": found.trigger.family,
                "size": found.trigger.size,
                "size_ratio": None if math.isnan(found.size_ratio) else found.size_ratio,
                "success": found.success.value,
                "outlier": max(found.outlier, _NO_TRIGGER),
            }
            for found in classes.candidates
        ],
        "of_classes": {check: list(found.values) for check, found in class_measurements(report.outcomes).items()},
        "detection": {
            outcome.check: {
                threshold.rule: threshold.detection_rate.value
                for threshold in outcome.measurement.thresholds
                if threshold.detection_rate is not None
            }
            for outcome in report.outcomes
            if isinstance(outcome, Measured) and isinstance(outcome.measurement, InputScores)
        },
    }


def _judge(job: Job) -> Row:
    known = load_known(job.model, job)
    result = MODEL_PEERS[job.detector].judge(known.subject, clean_set(known.splits), np.random.default_rng(job.seed))
    judgement = dataclasses.asdict(result)
    return {"seconds": judgement.pop("seconds"), "judgement": judgement}


def _flag(job: Job) -> Row:
    """One row: the share of clean test images and of successful triggered ones that an input peer flags.

    It is given both at once, mixed as :func:`mixed_in` says; ``triggered_share`` is the share of triggered inputs among all that
    the model answers with one class, in the class where it is largest.
    """
    known, peer = load_known(job.model, job), INPUT_PEERS[job.detector]
    rng = np.random.default_rng(job.seed)
    test = known.splits.test.images
    stamped, moved = known.triggered()
    stamped = stamped[moved]
    answers, answers_to_stamped = known.subject.predict(test), known.subject.predict(stamped)
    chosen = mixed_in(answers, answers_to_stamped, peer.compares_inputs, rng)
    inputs = np.concatenate([test, stamped[chosen]])
    found = peer.judge_inputs(known.subject, clean_set(known.splits), inputs, rng)
    clean, triggered = slice(len(test)), slice(len(test), None)
    row: Row = {"check": job.detector, "rule": "its own"} | _rates(found.flagged[clean], found.flagged[triggered])
    row["triggered_share"] = _largest_share(answers, answers_to_stamped[chosen])
    if found.scores is not None:
        row["auroc"] = _area(found.scores[clean], found.scores[triggered])
    return {"inputs": [row]}


def mixed_in(clean: LabelArray, triggered: LabelArray, compares_inputs: bool, rng: np.random.Generator) -> NDArray[np.int64]:
    """Rows of the triggered inputs that are mixed into the clean ones, both given by the class that the model answers.

    At least one, and at most one to twenty clean inputs. For a peer that compares inputs also at most 15 % of those that are
    answered with any one class, clean ones included.
    """
    rows = rng.permutation(len(triggered))
    if compares_inputs:
        of_classes = []
        for label in np.unique(triggered):
            room = _MOST_TRIGGERED_PERCENT * int((clean == label).sum()) // (100 - _MOST_TRIGGERED_PERCENT)
            of_classes.append(rows[triggered[rows] == label][: max(room, 1)])
        rows = rng.permutation(np.concatenate([rows[:0], *of_classes]))
    return rows[: max(round(_TRIGGERED_SHARE * len(clean)), 1)]


def _largest_share(clean: LabelArray, triggered: LabelArray) -> float | None:
    """The largest share that triggered inputs have of the inputs answered with one class; None without any."""
    labels, counts = np.unique(triggered, return_counts=True)
    shares = [count / (count + (clean == label).sum()) for label, count in zip(labels, counts, strict=True)]
    return float(max(shares)) if shares else None


def _rates(clean: NDArray[np.bool_], triggered: NDArray[np.bool_]) -> Row:
    """Shares that are flagged; None of no images."""
    return {
        "false_positive_rate": float(clean.mean()),
        "clean_images": len(clean),
        "detection_rate": float(triggered.mean()) if len(triggered) else None,
        "triggered_images": len(triggered),
    }


def _check(job: Job) -> Row:
    """Each of the audit's checks on inputs and its baselines."""
    return {"inputs": list(detection_rows(load_known(job.model, job), job.seed))}


def detection_rows(known: Known, seed: int) -> Iterator[Row]:
    """For each check, baseline and threshold: false-positive rate, detection rate and AUROC on successful triggered images, and
    the AUROC on all triggered ones. Then both rates at every other value of a threshold in :data:`SWEPT`."""
    test = known.splits.test
    triggered, succeeded = known.triggered()
    for scorer in scorers_of(Policy()):
        started = time.perf_counter()
        try:
            fitted = scorer.fit(known.subject, known.splits.fit, np.random.default_rng(seed))
        except AuditError as error:
            yield {"check": scorer.name, "note": str(error)}
            continue
        seconds = round(time.perf_counter() - started, 1)
        parts = (known.splits.calibrate.images, test.images, triggered)
        scores = {scorer.name: [fitted.score(images) for images in parts]}
        for images in parts:
            for name, values in (fitted.baselines(images) if len(images) else {}).items():
                scores.setdefault(f"{scorer.name}: {name}", []).append(values)
        for name, (calibrated, clean, *attacked) in scores.items():
            suspicious = attacked[0] if attacked else clean[:0]
            cuts = {f"{_FALSE_POSITIVE_RATE:.0%} quantile": quantile_threshold(calibrated, _FALSE_POSITIVE_RATE)}
            cuts |= fitted.own_thresholds if name == scorer.name else {}
            areas = {"auroc": _area(clean, suspicious[succeeded]), "auroc_all_triggered": _area(clean, suspicious)}
            for rule, cut in cuts.items():
                rates = _rates(clean > cut, suspicious[succeeded] > cut)
                yield {"check": name, "rule": rule, **rates, **areas, "fit_seconds": seconds}
            setting, swept = SWEPT.get(name, ("", ()))
            for cut in swept:
                yield {"check": name, "swept": setting, "value": cut, **_rates(clean > cut, suspicious[succeeded] > cut)}


def _area(clean: NDArray[np.floating], triggered: NDArray[np.floating]) -> float | None:
    return auroc(clean, triggered) if len(triggered) else None


def _repair(job: Job) -> Row:
    known = load_known(job.model, job)
    if known.attack is not None and (not isinstance(known.attack, attacks.AllToOne) or isinstance(known.attack, attacks.TaCT)):
        raise InapplicableError("Repairs are measured on attacks that move every class to one.")
    compared = load_known(job.clean_model, job).subject if job.clean_model and known.attack else None
    return {"repairs": list(repair_rows(known, job.seed, compared))}


def repair_rows(known: Known, seed: int, clean: Subject | None = None) -> Iterator[Row]:
    """For each repair: accuracy, true attack success and accuracy of triggered images, and how fast the backdoor comes back.

    The repair itself sees recovered triggers of the true target class only; on a clean model those of class 0. ``clean`` is a
    model that never knew the backdoor, for comparison.
    """
    triggers = invert(
        known.subject.torch_module(),
        known.splits.fit,
        [Goal(known.target_class)],
        (Patches, Perturbations),
        _SEARCH,
        np.random.default_rng(seed),
    )
    yield {"repair": "none"} | _figures(known, known.subject, triggers)
    if known.attack and clean is not None:
        steps = steps_to_return(known, clean, seed)
        yield {"repair": "never backdoored"} | _figures(known, clean, triggers) | {"steps_to_return": steps}
    for repair in REPAIRS.values():
        started = time.perf_counter()
        try:
            repaired = repair().repair(known.subject, known.splits, triggers, np.random.default_rng(seed))
        except AuditError as error:
            yield {"repair": repair.name, "note": str(error)}
            continue
        row = {"repair": repair.name, "seconds": round(time.perf_counter() - started, 1)}
        row |= _figures(known, repaired.subject, triggers)
        row["steps_to_return"] = steps_to_return(known, repaired.subject, seed)
        yield row


def steps_to_return(known: Known, subject: Subject, seed: int) -> int | None:
    """Steps of fine-tuning, each on ten poisoned and 54 clean images, until half of the triggered images obey.

    None if they do not within :data:`MOST_STEPS`, or if there is no backdoor.

    A repair that only hides a backdoor lets it return in fewer steps than a clean model needs to learn it.
    """
    if known.attack is None:
        return None
    rng = np.random.default_rng(seed)
    fit, test = known.splits.fit, known.splits.test
    victims = np.flatnonzero(fit.labels != known.target_class)[:_POISONED_IMAGES]
    poisoned = torch.from_numpy(to_pixels(known.attack.stamp(fit.images[victims])))
    wanted = torch.full((len(poisoned),), known.target_class)
    clean, labels = torch.from_numpy(to_pixels(fit.images)), torch.from_numpy(fit.labels)
    held_out = test.images[test.labels != known.target_class][:_RETURN_IMAGES]
    triggered = torch.from_numpy(to_pixels(known.attack.stamp(held_out)))
    module = subject.trainable_copy()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)
    for step in range(MOST_STEPS + 1):
        if step % _STEPS_BETWEEN_LOOKS == 0 and float((predicted(module, triggered) == known.target_class).float().mean()) >= 0.5:
            return step
        rows = torch.from_numpy(rng.choice(len(labels), min(_CLEAN_IMAGES, len(labels)), replace=False))
        logits = module(torch.cat([poisoned, clean[rows]]))[-1]
        take_step(optimizer, functional.cross_entropy(logits, torch.cat([wanted, labels[rows]])))
    return None


def _figures(known: Known, subject: Subject, triggers: Sequence[Trigger]) -> Row:
    test = known.splits.test
    victims = test.labels != known.target_class
    figures: Row = {"clean_accuracy": float((subject.predict(test.images) == test.labels).mean())}
    for trigger in triggers:
        flipped = subject.predict(trigger.stamp(test.images[victims])) == known.target_class
        figures[f"recovered_{trigger.family}_success"] = float(flipped.mean())
    if known.attack:
        answers = subject.predict(known.attack.stamp(test.images[victims]))
        figures["attack_success_rate"] = float((answers == known.target_class).mean())
        figures["triggered_accuracy"] = float((answers == test.labels[victims]).mean())
    return figures


_DETECT: Mapping[str, Callable[[Job], Row]] = {
    AUDIT: _audit,
    **dict.fromkeys(MODEL_PEERS, _judge),
    **dict.fromkeys(INPUT_PEERS, _flag),
    CHECKS: _check,
    REPAIR: _repair,
}


def read_records(output: Path) -> list[Row]:
    """Every result below ``output``, sorted by model, detector and seed.

    Raises:
        UsageError: one of them is no result.
    """
    records = []
    for file in sorted((output / RESULTS).glob("*/*.json")):
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            records.append({key: record[key] for key in ("model", "detector", "seed", "state", "truth")} | record)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"'{file}' is no result ({error!r}). Delete it and run the command again.") from error
    return sorted(records, key=lambda record: (record["model"], DETECTORS.index(record["detector"]), record["seed"]))
