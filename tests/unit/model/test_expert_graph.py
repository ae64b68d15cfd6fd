"""Several networks in one ONNX graph: what goes in, what comes out, and that none disturbs another."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from audit_plugin.maths.pixels import to_pixels
from audit_plugin.model.expert_graph import AUXILIARY, EXPERT, OWN, TRIANGLE, append_expert_score
from audit_plugin.model.export import LOGITS
from audit_plugin.model.runtime import Session
from audit_plugin.zoo.architectures import SmallCnn
from audit_plugin.zoo.train import initialised

SIZE, CLASSES = 8, 4


@pytest.fixture(scope="module")
def subject(make_subject):
    return make_subject(initialised(lambda: SmallCnn(3, CLASSES, width=4), 0), 3, SIZE, mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.2))


def perturbed(subject, seed):
    copied = subject.trainable_copy()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in copied.parameters():
            weight += 0.3 * torch.randn(weight.shape, generator=generator)
    return copied


@pytest.fixture(scope="module")
def joined(subject):
    early, expert, auxiliary = (perturbed(subject, seed) for seed in (1, 2, 3))
    experts = [subject.export(early), subject.export(expert)]
    model = append_expert_score(subject.onnx_model, experts, subject.export(auxiliary), k=0.5, score="suspicion")
    return model, early, expert, auxiliary


def test_each_output_speaks_of_its_own_network(subject, joined):
    model, early, expert, auxiliary = joined
    onnx.checker.check_model(model, full_check=True)
    images = np.random.default_rng(0).integers(0, 256, (20, SIZE, SIZE, 3)).astype(np.uint8)
    found = Session(model.SerializeToString()).run(to_pixels(images))
    assert list(found) == [LOGITS, "suspicion", TRIANGLE, OWN, EXPERT, AUXILIARY]
    np.testing.assert_allclose(found[LOGITS], subject.logits(images), atol=1e-5)
    predicted = subject.predict(images)

    def probability(module):
        with torch.no_grad():
            softmax = nn.functional.softmax(module(torch.from_numpy(to_pixels(images)))[-1], dim=1).numpy()
        return softmax[np.arange(20), predicted]

    for name, module in ((OWN, subject.trainable_copy()), (EXPERT, expert), (AUXILIARY, auxiliary)):
        np.testing.assert_allclose(found[name], probability(module), atol=1e-5)
        assert found[name].shape == (20,)
    known = (probability(early) + probability(expert)) / 2
    np.testing.assert_allclose(found["suspicion"], found[OWN] + known - 0.5 * found[AUXILIARY], atol=1e-5)


def test_a_copy_that_knows_as_much_as_the_model_gives_its_own_confidence(subject):
    model = append_expert_score(subject.onnx_model, [subject.onnx_model], subject.onnx_model, k=0.2, score="suspicion")
    images = np.random.default_rng(0).integers(0, 256, (20, SIZE, SIZE, 3)).astype(np.uint8)
    found = Session(model.SerializeToString()).run(to_pixels(images))
    np.testing.assert_array_equal(found[EXPERT], found[AUXILIARY])
    np.testing.assert_allclose(
        found[EXPERT], nn.functional.softmax(torch.from_numpy(found[LOGITS]), dim=1).max(dim=1).values, atol=1e-6
    )
    np.testing.assert_allclose(found["suspicion"], 1.8 * found[EXPERT], atol=1e-6)


def test_the_models_that_are_joined_stay_as_they_were(subject):
    parts = [subject.onnx_model, subject.export(perturbed(subject, 1)), subject.export(perturbed(subject, 2))]
    before = [part.SerializeToString() for part in parts]
    append_expert_score(parts[0], [parts[1]], parts[2], k=0.5, score="suspicion")
    assert [part.SerializeToString() for part in parts] == before


def test_no_two_nodes_or_weights_share_a_name(joined):
    graph = joined[0].graph
    names = [output for node in graph.node for output in node.output if output] + [tensor.name for tensor in graph.initializer]
    assert len(names) == len(set(names))
