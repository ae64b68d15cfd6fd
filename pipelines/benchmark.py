"""Benchmarks, as ratios measured side by side in one run.

python -m pipelines.benchmark overhead    the layer-wise scoring session against the bare forward session
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import typer
from onnx import TensorProto, helper
from rich.console import Console
from rich.table import Table

from audit_plugin.checks import LayerwiseScorer
from audit_plugin.model.export import LOGITS, save
from audit_plugin.model.load import Network
from audit_plugin.model.reductions import append_layerwise_score
from audit_plugin.model.runtime import Session
from audit_plugin.model.subject import prepare_subject
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
    with tempfile.TemporaryDirectory() as temporary:
        bare, scoring = Path(temporary) / "bare.onnx", Path(temporary) / "scoring.onnx"
        _export_both(bare, scoring)
        pixels = np.random.default_rng(0).integers(0, 256, (images, _SIZE, _SIZE, 3)).astype(np.uint8)
        sessions = {path: Session(path) for path in (bare, scoring)}
        outputs = {bare: [LOGITS], scoring: [LOGITS, LayerwiseScorer.name]}
        times: dict[Path, list[float]] = {bare: [], scoring: []}
        for _ in range(rounds + 1):  # the first round warms up
            for path, session in sessions.items():
                started = time.perf_counter()
                for _rows, _values in session.stream(pixels, outputs[path], batch=batch):
                    pass
                times[path].append(time.perf_counter() - started)
        provider = sessions[bare].provider
        memory = {path: _peak_memory(path, outputs[path], images, batch) for path in (bare, scoring)}
    ratios = [after / before for before, after in zip(times[bare][1:], times[scoring][1:], strict=True)]
    table = Table("session", "seconds (median)", "peak memory, MiB", title=f"{images} images, batches of {batch}, {provider}")
    for name, path in (("bare forward", bare), ("with layer-wise score", scoring)):
        table.add_row(name, f"{statistics.median(times[path][1:]):.2f}", f"{memory[path]:.0f}")
    _console.print(table)
    _console.print(
        f"time ratio: median {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}); "
        f"memory difference: {memory[scoring] - memory[bare]:+.0f} MiB"
    )


@app.command(hidden=True)
def peak_memory(model: Path, outputs: str, images: int, batch: int) -> None:
    """Run one session once and print this process's peak memory in MiB (called in a process of its own)."""
    pixels = np.zeros((images, _SIZE, _SIZE, 3), dtype=np.uint8)
    for _rows, _values in Session(model).stream(pixels, outputs.split(","), batch=batch):
        pass
    sys.stdout.write(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def _peak_memory(model: Path, outputs: list[str], images: int, batch: int) -> float:
    command = [sys.executable, "-m", "pipelines.benchmark", "peak-memory", str(model), ",".join(outputs), str(images), str(batch)]
    finished = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(finished.stdout))


def _export_both(bare: Path, scoring: Path) -> None:
    """Untrained weights, since speed does not depend on them; every layer that any class may sum is scored, the worst case."""
    import torch

    from audit_plugin.zoo.architectures import CifarResNet18

    example = torch.zeros(4, 3, _SIZE, _SIZE)
    program = torch.export.export(CifarResNet18(_CLASSES).eval(), (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    network = Network(plain_graph(program), (-1, 3, _SIZE, _SIZE), _CLASSES, None, False)
    names = tuple(str(label) for label in range(_CLASSES))
    subject = prepare_subject(network, InputSpec(_SIZE, _SIZE, 3), flavour="pt2", class_names=names)
    layers = (*subject.summary.taps, LOGITS)
    used = layers[len(layers) // 2 - 2 :]  # all that any class may sum
    values = subject.session.run(np.zeros((1, 3, _SIZE, _SIZE), dtype=np.float32), used)
    rng = np.random.default_rng(0)
    centroids: dict[str, FloatArray] = {layer: rng.random((_CLASSES, values[layer].size), dtype=np.float32) for layer in used}
    ones = np.ones(_CLASSES, dtype=np.float32)
    scored = append_layerwise_score(
        subject.onnx_model,
        centroids=centroids,
        weights=np.ones((_CLASSES, len(used)), dtype=np.float32),
        mean=ones,
        deviation=ones,
        score=LayerwiseScorer.name,
    )
    save(scored, scoring)
    save(_only_logits(subject.onnx_model), bare)


def _only_logits(model: onnx.ModelProto) -> onnx.ModelProto:
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    del copied.graph.output[:]
    copied.graph.output.append(helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, [None, _CLASSES]))
    return copied


if __name__ == "__main__":
    app()
