from __future__ import annotations

import dataclasses

import pytest

from audit_plugin.calibration import ReferencePool
from audit_plugin.errors import UsageError
from audit_plugin.policy import Policy, load_policy, policy_from
from audit_plugin.requirements import clean_images_of


def test_no_file_and_an_empty_file_are_the_defaults(tmp_path):
    (tmp_path / "audit.toml").write_text("")
    assert load_policy(None) == load_policy(tmp_path / "audit.toml") == Policy()


def test_values_arrive(tmp_path):
    (tmp_path / "audit.toml").write_text(
        '[model]\nmean = [0.5, 0.4, 0.3]\nclasses = ["cat", "dog", "cow", "emu"]\nlow = 0\n[layerwise]\ntau = 3\n'
    )
    policy = load_policy(tmp_path / "audit.toml")
    assert policy.model.mean == (0.5, 0.4, 0.3)
    assert policy.model.classes == ("cat", "dog", "cow", "emu")
    assert policy.model.low == 0.0
    assert policy.layerwise.tau == 3.0
    assert policy.verdict == Policy().verdict


def test_a_list_without_an_empty_default_is_read_too():
    assert policy_from({"scoring": {"checks": ["layerwise"]}}).scoring.checks == ("layerwise",)
    with pytest.raises(UsageError, match=r"\[scoring\] checks in the policy must be a list, got 'layerwise'"):
        policy_from({"scoring": {"checks": "layerwise"}})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"layerwize": {}}, r"no section \[layerwize\]. Did you mean 'layerwise'"),
        ({"layerwise": {"taus": 2}}, r"\[layerwise\] has no key 'taus'. Did you mean 'tau'"),
        ({"scoring": {"checks": ["layerwize"]}}, r"\[scoring\] checks .* 'layerwize', .* Did you mean 'layerwise'"),
        ({"scoring": {"checks": ["layerwise", "layerwise"]}}, r"\[scoring\] checks must name each check once"),
        ({"repair": {"method": "prunne"}}, r"\[repair\] method .* 'prunne', .* Did you mean 'prune'"),
        ({"model": {"mean": [0.5, 0.5]}}, r"\[model\] mean and std must hold one number, or one for each of three"),
        ({"layerwise": {"tau": "high"}}, r"\[layerwise\] tau in the policy must be float, got 'high'"),
        ({"layerwise": {"tau": True}}, "must be float, got True"),
        ({"trigger_inversion": {"steps": 1.5}}, "must be int, got 1.5"),
        ({"model": {"mean": 0.5}}, "must be a list, got 0.5"),
        ({"model": {"classes": ["a", 1]}}, r"\[model\] classes in the policy must be str, got 1"),
        ({"layerwise": 3}, r"Expected a section \[layerwise\]"),
        ({"layerwise": {"tau": -1.0}}, "tau must be positive"),
        ({"clean_set": {"fit_fraction": 0.9, "calibrate_fraction": 0.1}}, "leave a test split"),
        ({"verdict": {"clear_outlier": 4.0}}, "clear_outlier must not exceed"),
        ({"model": {"std": [0.0]}}, "std must be positive"),
        ({"model": {"clean_accuracy": 97.5}}, r"clean_accuracy must lie in \[0, 1\]"),
        ({"model": {"clean_accuracy": -0.1}}, r"clean_accuracy must lie in \[0, 1\]"),
        ({"layerwise": {"tau": float("inf")}}, r"\[layerwise\] tau in the policy must be a finite number, got inf"),
        ({"verdict": {"minimum_outlier": float("nan")}}, "must be a finite number, got nan"),
        ({"model": {"mean": [0.5, float("-inf")]}}, r"\[model\] mean in the policy must be a finite number, got -inf"),
        ({"layerwise": {"tau": 10**400}}, "must be a finite number"),
        ({"model": {"layout": "HWC"}}, "layout must be 'NCHW' or 'NHWC'"),
        ({"bad_expert": {"auxiliary_epochs": 4}}, "auxiliary_epochs must be at least 5"),
        ({"clean_images": {"digits": 3}}, r"\[clean_images\] digits in the policy must be str, got 3"),
        ({"clean_images": {"digits": {"v2": "a.npz"}}}, "digits in the policy must be str, got {'v2'"),
        ({"clean_images": {"digits": " "}}, "must name a file, a folder or an artifact URI"),
        ({"clean_images": {"digits": "https://me:hunter2@host/clean.npz"}}, "must not hold user names or passwords"),
        ({"clean_images": "clean.npz"}, r"Expected a section \[clean_images\]"),
        ({"neuron_noise": {"kept_accuracy": [0.75, 0.9]}}, "kept_accuracy must hold shares between 0 and 1, the largest first"),
        ({"neuron_noise": {"kept_accuracy": [1.0]}}, "kept_accuracy must hold shares"),
        ({"canaries": {"families": ["patch", "warp"]}}, "families must be among patch, blended, warped"),
        ({"canaries": {"families": ["warped"]}}, "required must name families that are planted"),
        ({"canaries": {"count": 0}}, "count must be at least 1"),
        ({"canaries": {"classes": 3}}, "classes must be at least 4"),
        ({"repair": {"accuracy_budget": 1.0}}, r"\[repair\] accuracy_budget must lie in \[0, 1\)"),
        ({"gate": {"maximum_age_days": 9999999}}, r"\[gate\] maximum_age_days .* at most 36,500"),
        ({"gate": {"maximum_waiver_days": 36500.5}}, r"\[gate\] .* maximum_waiver_days must be positive and at most 36,500"),
        ({"gate": {"maximum_waiver_days": 0}}, r"\[gate\] .* maximum_waiver_days must be positive"),
    ],
)
def test_mistakes_are_named(content, message):
    with pytest.raises(UsageError, match=message):
        policy_from(content)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(UsageError, match="no policy file"):
        load_policy(tmp_path / "none.toml")
    (tmp_path / "broken.toml").write_text("[model\n")
    with pytest.raises(UsageError, match="no readable TOML"):
        load_policy(tmp_path / "broken.toml")


def test_the_digest_speaks_of_values_not_of_spelling():
    spelled_out = policy_from({"layerwise": {"tau": 2.5}, "model": {}})
    assert spelled_out.digest == Policy().digest
    assert policy_from({"layerwise": {"tau": 2.6}}).digest != Policy().digest
    assert Policy().digest.startswith("sha256:")


CLEAN_IMAGES = """
[clean_images]
"vision-*" = "vision.npz"
"vision-digits" = "/data/digits.npz"
"vision-[!x]*" = "never.npz"
"*" = "runs:/0123/clean.npz"
"""


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("vision-digits", "/data/digits.npz"),
        ("vision-cats", "vision.npz"),
        ("Vision-cats", "runs:/0123/clean.npz"),
        ("vision-*", "vision.npz"),
    ],
)
def test_the_models_own_name_wins_then_the_first_pattern(tmp_path, name, source):
    (tmp_path / "audit.toml").write_text(CLEAN_IMAGES)
    assert load_policy(tmp_path / "audit.toml").clean_images_for(name) == source


def test_a_model_that_no_pattern_matches_has_no_clean_images(tmp_path):
    (tmp_path / "audit.toml").write_text('[clean_images]\n"digits-*" = "a.npz"\n')
    assert load_policy(tmp_path / "audit.toml").clean_images_for("digits") is None
    assert clean_images_of("digits", tmp_path / "audit.toml") is None
    assert clean_images_of("digits", None) is None


def test_relative_clean_images_start_at_the_policys_folder(tmp_path):
    (tmp_path / "audit.toml").write_text(CLEAN_IMAGES)
    found = [clean_images_of(name, tmp_path / "audit.toml") for name in ("vision-cats", "vision-digits", "other")]
    assert found == [str(tmp_path / "vision.npz"), "/data/digits.npz", "runs:/0123/clean.npz"]


def test_clean_images_are_recorded_but_decide_no_verdict(tmp_path):
    (tmp_path / "audit.toml").write_text(CLEAN_IMAGES)
    policy = load_policy(tmp_path / "audit.toml")
    assert policy_from({"clean_images": policy.document()["clean_images"]}) == policy
    assert list(policy.document()["clean_images"]) == ["vision-*", "vision-digits", "vision-[!x]*", "*"]
    assert policy.digest != Policy().digest
    assert policy.verdict_digest == Policy().verdict_digest


def test_a_quick_policy_plants_and_searches_once_and_has_another_digest():
    policy = policy_from({"canaries": {"families": ["patch", "warped"], "count": 3}, "trigger_inversion": {"steps": 77}})
    quick = policy.quick()
    assert (quick.canaries.count, quick.canaries.families) == (1, ("patch", "warped"))
    assert (quick.trigger_inversion.searches, quick.trigger_inversion.steps) == (1, 77)
    assert quick.digest != policy.digest
    assert quick.quick() == quick
    compared = dataclasses.replace(policy, reference_pool=ReferencePool("ours", {}, {}, "0.1.0", ()))
    assert compared.quick().trigger_inversion == policy.trigger_inversion
