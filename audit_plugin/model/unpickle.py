"""Turns a pickled module into a ``.pt2`` inside the sandbox (``--allow-pickle``), so that the audit itself never unpickles.

``python -m audit_plugin.model.unpickle MODEL.pth OUT.pt2 -1,3,32,32`` is the child's half; :func:`convert_pickle` the caller's.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from audit_plugin.errors import SandboxError
from audit_plugin.intake import inspect
from audit_plugin.sandbox import Limits, run_isolated
from audit_plugin.types import IntakeFinding

_TIMEOUT_SECONDS = 600.0
_EXAMPLE_BATCH = 4  # torch.export makes a size of 1 a constant
_FILE = "model.pt2"

_log = logging.getLogger(__name__)


def convert_pickle(folder: Path, data_path: str, input_shape: Sequence[int], working_folder: Path) -> tuple[Path, IntakeFinding]:
    """Export the pickled module ``folder / data_path`` in a child process and check what came out.

    Args:
        folder: the model's folder, which ``inspect(folder, allow_pickle=True)`` called a pickle.
        data_path: its data file, relative to the folder.
        input_shape: shape of the input, batch first; -1 for a free batch.
        working_folder: created if missing; the child may write here.

    Returns:
        ``working_folder / "exported" / "model.pt2"``, alone in its folder, having passed the ordinary check of a .pt2; and
        what the report must say of how it was opened.

    Raises:
        SandboxError: when the module could not be unpickled or exported.
        IntakeError: when the exported file fails the check.
    """
    exported = working_folder.resolve() / "exported"
    try:
        exported.mkdir(parents=True)
    except FileExistsError as error:
        raise SandboxError(f"{exported} exists already. Give a fresh working folder for each conversion.") from error
    shape = ",".join(str(size) for size in input_shape)
    isolation = run_isolated(
        __name__,
        [str((folder / data_path).resolve()), str(exported / _FILE), shape],
        working_folder=working_folder,
        readable=[folder],
        limits=Limits(seconds=_TIMEOUT_SECONDS),
    )
    finding = IntakeFinding(
        data_path, f"A pickle, whose code ran in a child process with {isolation.summary}; accepted with --allow-pickle."
    )
    if not isolation.is_complete:
        _log.warning("%s: %s", data_path, finding.message)
    inspect(exported)
    return exported / _FILE, finding


def export_pickle(model_path: Path, exported_path: Path, input_shape: Sequence[int]) -> None:
    """Unpickle (which runs whatever code is in the file) and export. Only for the child process.

    Raises:
        TypeError: when the file holds no module.
        ValueError: when the shape leaves more than the batch free.
    """
    import torch  # not needed by the caller

    batch, *image = input_shape
    if any(size < 1 for size in image):
        raise ValueError(f"Expected an input shape with a free batch at most, got {tuple(input_shape)}.")
    module = torch.load(model_path, map_location="cpu", weights_only=False)
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"Expected a pickled torch.nn.Module, got {type(module).__name__}.")
    module.eval()
    program = None
    if batch < 1:
        try:
            program = torch.export.export(
                module, (torch.rand(_EXAMPLE_BATCH, *image),), dynamic_shapes=({0: torch.export.Dim.AUTO},)
            )
        except Exception as error:  # torch raises many types here, and a fixed batch may still work
            _log.warning("No dynamic batch: %s", error)
    if program is None:
        program = torch.export.export(module, (torch.rand(max(batch, 1), *image),))
    torch.export.save(program, exported_path)


if __name__ == "__main__":
    export_pickle(Path(sys.argv[1]), Path(sys.argv[2]), [int(size) for size in sys.argv[3].split(",")])
