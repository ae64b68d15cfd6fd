"""The baseline: it keeps the accuracy and leaves its subject alone; what it does to a backdoor is not promised."""

from __future__ import annotations

import json

import numpy as np
import torch

from audit_plugin.repair import FineTuning


def weights_of(subject):
    return {name: value.clone() for name, value in subject.torch_module().state_dict().items()}


def test_the_copy_is_trained_and_the_original_is_not(attacked):
    before = weights_of(attacked.subject)
    repaired = FineTuning(epochs=2).repair(attacked.subject, attacked.splits, attacked.triggers, np.random.default_rng(0))
    after, copied = weights_of(attacked.subject), weights_of(repaired.subject)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(not torch.equal(before[name], copied[name]) for name in before)
    assert attacked.accuracy(repaired.subject) > attacked.accuracy(attacked.subject) - 0.03
    assert json.loads(json.dumps(repaired.facts)) == {"epochs": 2, "learning_rate": 0.01}


def test_triggers_play_no_part_and_the_seed_decides(attacked):
    def answers(triggers, seed):
        rng = np.random.default_rng(seed)
        repaired = FineTuning(epochs=1).repair(attacked.subject, attacked.splits, triggers, rng)
        return repaired.subject.logits(attacked.rest.images[:50])

    np.testing.assert_array_equal(answers(attacked.triggers, 0), answers((), 0))
    assert not np.array_equal(answers((), 0), answers((), 1))


def test_normalisation_keeps_its_statistics(attacked):
    repaired = FineTuning(epochs=1).repair(attacked.subject, attacked.splits, (), np.random.default_rng(0))
    before, after = (dict(subject.torch_module().named_buffers()) for subject in (attacked.subject, repaired.subject))
    statistics = [name for name in before if "running" in name]
    assert statistics
    assert all(torch.equal(before[name], after[name]) for name in statistics)
