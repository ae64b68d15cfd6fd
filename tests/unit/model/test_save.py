"""A network that is written and read back by way of the static check answers as before, and takes the same batches."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from audit_plugin.intake import inspect
from audit_plugin.model.load import Network, _probe, load_network
from audit_plugin.model.save import example_input, save_network
from audit_plugin.model.torch_graph import plain_graph
from audit_plugin.zoo.architectures import SmallCnn
from audit_plugin.zoo.train import initialised

SHAPE = (1, 16, 16)


class Insisting(nn.Module):
    """A network that takes five images and no others."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, pixels):
        return self.inner(pixels).view(5, 10)


def network(form) -> Network:
    inner = initialised(lambda: SmallCnn(1, 10, width=4), 0).eval()
    batch = 5 if form.endswith("of five") else None
    module = Insisting(inner) if form == "pt2 of five" else inner
    dynamic = None if batch else ({0: torch.export.Dim("batch")},)
    program = torch.export.export(module, (torch.zeros(batch or 4, *SHAPE),), dynamic_shapes=dynamic)
    if form.startswith("onnx"):
        exported = torch.onnx.export(program, dynamo=True, verbose=False)
        return _probe(exported.model_proto, (batch or -1, *SHAPE), batch or -1)
    return _probe(plain_graph(program), (batch or -1, *SHAPE), batch or -1)


def answers(of: Network, values):
    if isinstance(of.program, onnx.ModelProto):
        session = pytest.importorskip("onnxruntime").InferenceSession(
            of.program.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        return session.run(None, {session.get_inputs()[0].name: values})[0]
    with torch.no_grad():
        return of.program(torch.from_numpy(values)).numpy()


@pytest.mark.parametrize("form", ["pt2", "pt2 of five", "onnx", "onnx of five"])
def test_written_and_read_back(form, tmp_path):
    original = network(form)
    file = save_network(original, tmp_path / "new" / "folder")
    assert file.name == ("model.onnx" if form.startswith("onnx") else "model.pt2")
    intake = inspect(file.parent)
    assert not intake.findings
    again = load_network(file, intake)
    assert again.batch_size == original.batch_size == (5 if form.endswith("of five") else None)
    assert again.parameter_count == original.parameter_count
    values = np.random.default_rng(0).random((original.batch_size or 7, *SHAPE), dtype=np.float32)
    np.testing.assert_allclose(answers(again, values), answers(original, values), rtol=1e-5, atol=1e-6)


def test_example_fits_the_network():
    assert example_input(network("pt2")).shape == (4, *SHAPE)
    assert example_input(network("pt2 of five")).shape == (5, *SHAPE)
