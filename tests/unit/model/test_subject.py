"""A subject's copy that may be trained, and what becomes of its weights: in the exported graph and in a new subject."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from audit_plugin.errors import InapplicableError, SubjectError
from audit_plugin.maths.pixels import to_pixels
from audit_plugin.model.export import LOGITS, InBatches
from audit_plugin.model.load import Network, _probe
from audit_plugin.model.onnx_graph import read_model
from audit_plugin.model.onnx_to_torch import OnnxModule
from audit_plugin.model.runtime import Session
from audit_plugin.model.subject import check_parity, prepare_subject
from audit_plugin.model.torch_graph import plain_graph
from audit_plugin.types import InputSpec

SIZE, CLASSES = 8, 4
SPEC = InputSpec(SIZE, SIZE, 3, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
NAMES = tuple("abcd")


class Small(nn.Module):
    """Two convolutions, one with batch normalisation, whose features are flattened with ``view``."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.Conv2d(6, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.norm.running_mean += torch.rand(6)
        self.norm.running_var += torch.rand(6)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(6 * 16, CLASSES)

    def forward(self, images):
        values = torch.relu(self.norm(self.first(images)))
        values = self.pool(torch.relu(self.second(values)))
        return self.head(values.view(values.size(0), -1))


def exported(batch=None):
    example = torch.zeros(batch or 4, 3, SIZE, SIZE)
    return torch.export.export(Small().eval(), (example,), dynamic_shapes=None if batch else ({0: torch.export.Dim("batch")},))


def torch_network(batch=None) -> Network:
    network = _probe(plain_graph(exported(batch)), (batch or -1, 3, SIZE, SIZE), batch or -1)
    return dataclasses.replace(network, batch_size=batch)


def onnx_network(path, *, batch=None, constants=False) -> Network:
    model = torch.onnx.export(exported(batch), dynamo=True, verbose=False).model_proto
    onnx.save(with_constant_nodes(model) if constants else model, path / "model.onnx")
    return _probe(read_model(path / "model.onnx"), (batch or -1, 3, SIZE, SIZE), batch or -1)


def with_constant_nodes(model):
    """Every weight as the value of a ``Constant`` node; vectors as ``value_floats``, as some exporters write them."""
    nodes = []
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        vector = array.ndim == 1 and array.dtype == np.float32
        value = {"value_floats": array.tolist()} if vector else {"value": tensor}
        nodes.append(helper.make_node("Constant", [], [tensor.name], **value))
    nodes += model.graph.node
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


KINDS = ("pt2", "pt2-fixed", "onnx", "onnx-fixed", "onnx-constants")


@pytest.fixture(scope="module", params=KINDS)
def subject(request, tmp_path_factory):
    kind = request.param
    batch = 4 if kind.endswith("fixed") else None
    if kind.startswith("pt2"):
        network = torch_network(batch)
    else:
        network = onnx_network(tmp_path_factory.mktemp("onnx"), batch=batch, constants=kind.endswith("constants"))
    subject = prepare_subject(network, SPEC, flavour=kind[:4].strip("-"), class_names=NAMES)
    assert isinstance(subject.torch_module(), InBatches) == (batch is not None)
    return subject


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).integers(0, 256, (10, SIZE, SIZE, 3)).astype(np.uint8)


def logits_of(module, images):
    with torch.no_grad():
        return module(torch.from_numpy(to_pixels(images)))[-1].numpy()


def trained(subject, images):
    """A copy after two large steps towards wrong answers."""
    copied = subject.trainable_copy()
    optimizer = torch.optim.SGD([weight for weight in copied.parameters() if weight.requires_grad], lr=0.1)
    for _ in range(2):
        loss = nn.functional.cross_entropy(copied(torch.from_numpy(to_pixels(images)))[-1], torch.arange(len(images)) % CLASSES)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return copied


def test_a_copy_answers_alike_and_trains_every_weight(subject, images):
    copied = subject.trainable_copy()
    np.testing.assert_array_equal(logits_of(copied, images), logits_of(subject.torch_module(), images))
    before = [weight.detach().clone() for weight in copied.parameters()]
    trainable = [weight for weight in copied.parameters() if weight.requires_grad]
    # Convolutions, linear layer, and normalisation unless the exporter folded it into a convolution.
    assert sum(weight.numel() for weight in trainable) >= 6 * 27 + 6 * 54 + 6 + CLASSES * 97
    moved = trained(subject, images)
    assert all(not torch.equal(one, other) for one, other in zip(before, moved.parameters(), strict=True))
    assert not any(weight.requires_grad for weight in subject.torch_module().parameters())


def test_training_leaves_statistics_and_preprocessing_alone(subject, images):
    before, after = dict(subject.torch_module().named_buffers()), dict(trained(subject, images).named_buffers())
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


def test_training_a_copy_leaves_the_subject_alone(subject, images):
    before = subject.onnx_model.SerializeToString(), logits_of(subject.torch_module(), images), subject.logits(images)
    copied = trained(subject, images)
    subject.export(copied)
    subject.retrained(copied)
    assert subject.onnx_model.SerializeToString() == before[0]
    np.testing.assert_array_equal(logits_of(subject.torch_module(), images), before[1])
    np.testing.assert_array_equal(subject.logits(images), before[2])
    np.testing.assert_allclose(prepare_again(subject).logits(images), before[2], atol=1e-5)


def prepare_again(subject):
    return prepare_subject(subject.network, SPEC, flavour=subject.summary.flavour, class_names=NAMES)


def test_the_exported_graph_answers_as_the_trained_copy(subject, images):
    copied = trained(subject, images)
    expected = logits_of(copied, images)
    assert np.abs(expected - subject.logits(images)).max() > 0.05  # training did something
    found = Session(subject.export(copied).SerializeToString(), batch_size=subject.summary.batch_size).collect(images, LOGITS)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_retrained_subject_is_the_same_kind_of_subject(subject, images):
    copied = trained(subject, images)
    again = subject.retrained(copied)
    assert again.summary == subject.summary
    np.testing.assert_allclose(again.logits(images), logits_of(copied, images), atol=1e-4)
    assert len(check_parity(again, images)) == len(subject.summary.taps) + 1
    # Untouched, the way there and back changes nothing.
    np.testing.assert_allclose(subject.retrained(subject.trainable_copy()).logits(images), subject.logits(images), atol=1e-5)


def test_a_model_without_weights_has_nothing_to_train(make_subject):
    class Fixed(nn.Module):
        def forward(self, images):
            return images.mean(dim=(2, 3))

    with pytest.raises(InapplicableError, match="stores no trainable weights"):
        make_subject(Fixed(), 3, SIZE).trainable_copy()


def test_without_a_torch_form_there_is_no_copy(make_subject):
    subject = dataclasses.replace(make_subject(Small(), 3, SIZE), _module=None, _module_missing="NonZero not supported")
    with pytest.raises(InapplicableError, match="cannot be converted: NonZero not supported"):
        subject.trainable_copy()


def test_weights_that_the_model_does_not_store_are_named(tmp_path):
    model = onnx_network(tmp_path).program
    module = OnnxModule(model, [model.graph.output[0].name])
    renamed = onnx.ModelProto()
    renamed.CopyFrom(model)
    for tensor in renamed.graph.initializer:
        tensor.name = f"other_{tensor.name}"
    with pytest.raises(SubjectError, match="stores no weights named"):
        module.write_weights(renamed)


class Placed(nn.Module):
    """It makes tensors while it runs: positions of its pixels, a mask as long as the batch."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, CLASSES, 3), nn.Linear(CLASSES, CLASSES)

    def forward(self, images):
        values = self.conv(images * torch.linspace(0.5, 1, images.shape[-1]).to("cpu"))
        return self.head(torch.relu(values).mean((2, 3))) * torch.ones(images.shape[0], 1)


def test_what_a_graph_makes_while_it_runs_is_made_where_its_weights_are():
    """The device ``meta`` stands for a GPU: what is on two devices cannot be added there either."""
    program = torch.export.export(Placed().eval(), (torch.zeros(4, 3, SIZE, SIZE),), dynamic_shapes=({0: torch.export.Dim("b")},))
    network = _probe(plain_graph(program), (-1, 3, SIZE, SIZE), -1)
    subject = prepare_subject(network, SPEC, flavour="pt2", class_names=NAMES)
    pixels = torch.rand(2, 3, SIZE, SIZE)
    expected = subject.torch_module()(pixels)[-1]
    elsewhere = subject.trainable_copy().to("meta")
    assert elsewhere(pixels.to("meta"))[-1].device.type == "meta"
    torch.testing.assert_close(subject.torch_module()(pixels)[-1], expected, rtol=0, atol=0)
    assert elsewhere.to_empty(device="cpu")(pixels)[-1].device.type == "cpu"
