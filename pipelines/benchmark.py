"""Benchmarks, as ratios measured side by side in one run.

python -m pipelines.benchmark overhead    the layer-wise scoring session against the bare forward session
python -m pipelines.benchmark guard       a guarded model against the bare model; fails above a time ratio of 1.15
python -m pipelines.benchmark gate        calls on the registry with and without the promotion gate
python -m pipelines.benchmark scan        versions a minute with several workers over those with one
python -m pipelines.benchmark tables      the audit, published detectors, checks and repairs on the models of a zoo
"""

from __future__ import annotations

import functools
import json
import logging
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import typer
from rich.console import Console
from rich.table import Table

from audit_plugin.checks import LayerwiseScorer
from audit_plugin.errors import AuditError
from audit_plugin.model.export import LOGITS, save
from audit_plugin.model.guarded import IS_SUSPICIOUS, SUSPICION, guarded_model
from audit_plugin.model.load import Network
from audit_plugin.model.reductions import append_layerwise_score
from audit_plugin.model.runtime import Session
from audit_plugin.model.subject import Subject, prepare_subject
from audit_plugin.model.torch_graph import plain_graph
from audit_plugin.types import FloatArray, InputSpec

app = typer.Typer(help="Benchmarks: ratios measured side by side in one run.", no_args_is_help=True)
_console = Console(highlight=False)

_SIZE, _CLASSES = 32, 10


@app.callback()
def _group() -> None:
    """One command a benchmark."""


@app.command()
def overhead(
    images: Annotated[int, typer.Option(help="Images scored in one pass.")] = 2000,
    rounds: Annotated[int, typer.Option(help="Passes of each session, in turn.")] = 5,
    batch: Annotated[int, typer.Option(help="Images in one batch.")] = 128,
) -> None:
    """Time and peak memory of the layer-wise scoring session over the bare forward session: ResNet-18 with the CIFAR-10 stem."""
    subject = _subject()
    scored = _append_score(subject)(subject.onnx_model, score=LayerwiseScorer.name)
    bare, scoring = (LOGITS,), (LOGITS, LayerwiseScorer.name)
    models = {"bare forward": (subject.onnx_model, bare), "with layer-wise score": (scored, scoring)}
    _compare(models, images, rounds, batch)


@app.command()
def guard(
    images: Annotated[int, typer.Option(help="Images scored in one pass.")] = 2000,
    rounds: Annotated[int, typer.Option(help="Passes of each session, in turn.")] = 5,
    batch: Annotated[int, typer.Option(help="Images in one batch.")] = 128,
    limit: Annotated[float, typer.Option(help="Largest time ratio (median) that is accepted.")] = 1.15,
) -> None:
    """Time and peak memory of a guarded ResNet-18 (CIFAR-10 stem) over the bare model: exit code 1 above the limit."""
    subject = _subject()
    guarded = guarded_model(subject.network, _append_score(subject), threshold=1.0)
    outputs = (LOGITS, SUSPICION, IS_SUSPICIOUS)
    models = {"bare model": (subject.onnx_model, (LOGITS,)), "guarded model": (guarded, outputs)}
    ratio = _compare(models, images, rounds, batch)
    if ratio > limit:
        _console.print(f"the time ratio is above {limit}", style="red")
        raise typer.Exit(1)


@app.command()
def gate(
    rounds: Annotated[int, typer.Option(help="Calls of each kind on each store, in turn.")] = 300,
    megabytes: Annotated[int, typer.Option(help="Size of the files of the version that is promoted.")] = 200,
    limit: Annotated[float, typer.Option(help="Largest ratio of an unprotected call that is accepted.")] = 1.05,
) -> None:
    """Time of registry calls with the promotion gate over those without, on SQLite: exit code 1 above the limit."""
    from pipelines.gate_timing import time_gate  # needs MLflow, which a machine for the other benchmarks may lack

    with tempfile.TemporaryDirectory() as folder:
        timings = time_gate(Path(folder), rounds=rounds, megabytes=megabytes)
    table = Table("call", "plain, ms", "gated, ms", "hashing, ms", "ratio", box=None)
    for timing in timings:
        figures = (timing.plain, timing.gated, timing.hashing)
        table.add_row(timing.call, *(f"{1000 * figure:.2f}" for figure in figures), f"{timing.ratio:.3f}")
    _console.print(table)
    if (worst := max(timing.ratio for timing in timings if not timing.hashing)) > limit:
        _console.print(f"the ratio {worst:.3f} is above {limit}", style="red")
        raise typer.Exit(1)


@app.command()
def scan(
    versions: Annotated[int, typer.Option(min=2, help="Digit classifiers in the registry.")] = 8,
    jobs: Annotated[int, typer.Option(min=2, help="Workers to compare with one.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Scans of each kind, in turn.")] = 1,
    engine: Annotated[list[str] | None, typer.Option(help="'local', 'ray'; both by default.")] = None,
    limit: Annotated[float, typer.Option(help="Smallest ratio (median) that is accepted.")] = 1.7,
) -> None:
    """Versions a minute that a scan audits with several workers over those with one: exit code 1 below the limit."""
    from pipelines.scan_timing import time_scans  # needs MLflow, as above

    with tempfile.TemporaryDirectory() as folder:
        found = time_scans(Path(folder), versions=versions, engines=engine or ["local", "ray"], jobs=jobs, rounds=rounds)
    table = Table("engine", "workers", "versions a minute", "ratio", box=None)
    for timing in found:
        table.add_row(timing.engine, str(timing.jobs), f"{timing.per_minute:.2f}", f"{timing.ratio:.2f}")
    _console.print(table)
    medians = {
        name: statistics.median(timing.ratio for timing in found if timing.engine == name and timing.jobs > 1)
        for name in {timing.engine for timing in found}
    }
    if min(medians.values()) < limit:
        _console.print(f"the ratio {min(medians.values()):.2f} is below {limit}", style="red")
        raise typer.Exit(1)


@app.command()
def tables(
    zoo: Annotated[Path, typer.Argument(help="Folder that 'python -m pipelines.zoo train' filled.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for results, tables and plots; resumes what is there.")],
    data_dir: Annotated[Path, typer.Option(help="Images, as for 'pipelines.zoo train'.")] = Path("data"),
    only: Annotated[str | None, typer.Option(help="Detectors, separated by commas; all by default.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Models, clean and backdoored in turn; all by default.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Measure with seeds 0 to one less than this.")] = 1,
    clean_images: Annotated[int, typer.Option(min=100, help="Clean images that a detector is given.")] = 1000,
    test_images: Annotated[int, typer.Option(min=100, help="Further images on which everything is measured.")] = 2000,
    jobs: Annotated[int, typer.Option(min=1, help="Measurements at once; with more than one, times say nothing.")] = 1,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; the GPU if not given and torch has one.")] = None,
) -> None:
    """Measure every detector on every model of a zoo: one result file each, then CSV, Markdown and plots of all there are."""
    from pipelines.table_report import write_report
    from pipelines.tables import DETECTORS, plan, read_records, run

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    chosen = only.split(",") if only else DETECTORS
    try:
        run(
            plan(
                zoo,
                output,
                data_dir,
                detectors=chosen,
                seeds=seeds,
                limit=limit,
                clean_images=clean_images,
                test_images=test_images,
            ),
            parallel=jobs,
            device=device,
        )
        write_report(read_records(output), output)
    except AuditError as error:
        _console.print(str(error), style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from error
    _console.print(f"tables and plots: {output / 'tables.md'}", markup=False, soft_wrap=True)


def _compare(models: dict[str, tuple[onnx.ModelProto, tuple[str, ...]]], images: int, rounds: int, batch: int) -> float:
    """Run two models in turn, each with the outputs named; print time and memory, return the median ratio of their times."""
    pixels = np.random.default_rng(0).integers(0, 256, (images, _SIZE, _SIZE, 3)).astype(np.uint8)
    with tempfile.TemporaryDirectory() as temporary:
        files = {name: Path(temporary) / f"{index}.onnx" for index, name in enumerate(models)}
        for name, (model, outputs) in models.items():
            save(_only(model, outputs), files[name])
        sessions = {name: Session(file) for name, file in files.items()}
        times: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(rounds + 1):  # the first round warms up
            for name, session in sessions.items():
                started = time.perf_counter()
                for _rows, _values in session.stream(pixels, models[name][1], batch=batch):
                    pass
                times[name].append(time.perf_counter() - started)
        memory = {name: _peak_memory(file, models[name][1], images, batch) for name, file in files.items()}
    bare, more = models
    ratios = [after / before for before, after in zip(times[bare][1:], times[more][1:], strict=True)]
    provider = sessions[bare].provider
    table = Table("session", "seconds (median)", "peak memory, MiB", title=f"{images} images, batches of {batch}, {provider}")
    for name in models:
        table.add_row(name, f"{statistics.median(times[name][1:]):.2f}", f"{memory[name]:.0f}")
    _console.print(table)
    ratio = statistics.median(ratios)
    _console.print(
        f"time ratio: median {ratio:.3f} ({min(ratios):.3f} to {max(ratios):.3f}); "
        f"memory difference: {memory[more] - memory[bare]:+.0f} MiB"
    )
    return ratio


@app.command(hidden=True)
def peak_memory(model: Path, outputs: str, images: int, batch: int) -> None:
    """Run one session once and print this process's peak memory in MiB (called in a process of its own)."""
    pixels = np.zeros((images, _SIZE, _SIZE, 3), dtype=np.uint8)
    for _rows, _values in Session(model).stream(pixels, outputs.split(","), batch=batch):
        pass
    sys.stdout.write(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def _peak_memory(model: Path, outputs: Sequence[str], images: int, batch: int) -> float:
    command = [sys.executable, "-m", "pipelines.benchmark", "peak-memory", str(model), ",".join(outputs), str(images), str(batch)]
    finished = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(finished.stdout))


def _subject() -> Subject:
    """Untrained weights, since speed does not depend on them."""
    import torch

    from audit_plugin.zoo.architectures import CifarResNet18

    example = torch.zeros(4, 3, _SIZE, _SIZE)
    program = torch.export.export(CifarResNet18(_CLASSES).eval(), (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    network = Network(plain_graph(program), (-1, 3, _SIZE, _SIZE), _CLASSES, None, False)
    names = tuple(str(label) for label in range(_CLASSES))
    return prepare_subject(network, InputSpec(_SIZE, _SIZE, 3), flavour="pt2", class_names=names)


def _append_score(subject: Subject) -> Callable[..., onnx.ModelProto]:
    """Adds the layer-wise score of every layer that any class may sum, the worst case."""
    layers = (*subject.summary.taps, LOGITS)
    used = layers[len(layers) // 2 - 2 :]
    values = subject.session.run(np.zeros((1, 3, _SIZE, _SIZE), dtype=np.float32), used)
    rng = np.random.default_rng(0)
    centroids: dict[str, FloatArray] = {layer: rng.random((_CLASSES, values[layer].size), dtype=np.float32) for layer in used}
    ones = np.ones(_CLASSES, dtype=np.float32)
    weights = np.ones((_CLASSES, len(used)), dtype=np.float32)
    return functools.partial(append_layerwise_score, centroids=centroids, weights=weights, mean=ones, deviation=ones)


def _only(model: onnx.ModelProto, outputs: Sequence[str]) -> onnx.ModelProto:
    """Without the other outputs, whose computing or copying would be timed too."""
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    kept = [output for output in model.graph.output if output.name in outputs]
    del copied.graph.output[:]
    copied.graph.output.extend(kept)
    return copied


if __name__ == "__main__":
    app()
