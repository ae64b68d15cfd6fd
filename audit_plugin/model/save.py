"""A network becomes a model file again, on its own input scale: ``.pt2`` for a torch graph, ``.onnx`` for an ONNX model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from audit_plugin.errors import ExportError
from audit_plugin.model.export import save
from audit_plugin.model.load import Network
from audit_plugin.model.onnx_graph import input_element
from audit_plugin.types import ONNX_FILE, PT2_FILE

_EXAMPLE_BATCH = 4  # torch.export makes a size of 1 a constant


def example_input(network: Network) -> NDArray[Any]:
    """Zeros of the type and in the shape that the network takes: of its only batch size, else of four images."""
    element = input_element(network.program) if isinstance(network.program, onnx.ModelProto) else np.dtype(np.float32)
    return np.zeros((network.batch_size or _EXAMPLE_BATCH, *network.input_shape[1:]), dtype=element)


def save_network(network: Network, folder: Path) -> Path:
    """Write ``model.pt2`` or ``model.onnx`` into ``folder``, which is made if missing; the batch size stays free where it is.

    Raises:
        ExportError: torch cannot export the graph, or the model does not fit into one file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(network.program, onnx.ModelProto):
        save(network.program, folder / ONNX_FILE)
        return folder / ONNX_FILE
    example = torch.from_numpy(example_input(network))
    dynamic = None if network.batch_size else ({0: torch.export.Dim.AUTO},)
    try:
        program = torch.export.export(network.program, (example,), dynamic_shapes=dynamic)
    except Exception as error:  # the exporter raises many kinds, some with a page of text
        raise ExportError(f"torch cannot export this model again: {str(error).strip().splitlines()[0][:300]}") from error
    torch.export.save(program, folder / PT2_FILE)
    return folder / PT2_FILE
