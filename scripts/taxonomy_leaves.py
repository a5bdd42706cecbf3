"""Every leaf of Fig. 3 of "A Survey on Mixture of Experts" (arXiv:2407.06204): the part of modekit that it is, or a reason.

It is data for one page and its tests, so that it stands here and not in the package. A paper is its name and arXiv number;
those that are not on arXiv stand in the leaf's name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import yaml
from typer.main import get_command

from modekit.cli.shell import app
from modekit.errors import TrainingError
from modekit.recipes.read import parse_recipe
from modekit.training.settings import train_settings

EXPERTS = ("law", "code", "science")


class Part(Protocol):
    """What turns a leaf on."""

    @property
    def said(self) -> str:
        """As a user writes it."""
        ...

    def check(self) -> None:
        """Raise ModekitError where it is not there."""
        ...


@dataclass(frozen=True)
class Recipe:
    """Lines of a recipe; `adapters`: of one whose experts are adapters."""

    said: str
    adapters: bool = False

    def check(self) -> None:
        """Parse it into a recipe of three experts."""
        kind = "adapter" if self.adapters else "model"
        experts = [{"name": name, kind: f"./{name}", "text": f"./{name}.jsonl"} for name in EXPERTS]
        parse_recipe({"base_model": "./base", "experts": experts, **yaml.safe_load(f"{{{self.said}}}")}, where=self.said)


@dataclass(frozen=True)
class Training:
    """Lines of a training's settings."""

    said: str

    def check(self) -> None:
        """Parse them."""
        settings: dict[str, Any] = yaml.safe_load(f"{{{self.said}}}")
        train_settings(settings, where=self.said)


@dataclass(frozen=True)
class Command:
    """A command line."""

    said: str

    def check(self) -> None:
        """Look the command and its options up."""
        _, name, *words = self.said.split()
        commands = getattr(get_command(app), "commands", {})
        if name not in commands:
            raise TrainingError(
                "no such command", where=self.said, found=name, expected=", ".join(commands), remedy="correct it"
            )
        known = {option for each in commands[name].params for option in (*each.opts, *each.secondary_opts)}
        for word in words:
            if word.startswith("-") and word.partition("=")[0] not in known:
                raise TrainingError(
                    "no such option", where=self.said, found=word, expected=", ".join(known), remedy="correct it"
                )


@dataclass(frozen=True)
class Leaf:
    """A leaf of the figure.

    Attributes:
        group: its branch.
        papers: name and arXiv number, the one that began it first.
        part: what turns it on; None where there is none.
        test: file below tests/ and function.
        measured: a row of benchmarks/taxonomy.md, or another page of benchmarks/.
        note: what differs from the paper; without a part, the reason.
    """

    group: str
    name: str
    papers: tuple[str, ...]
    part: Part | None = None
    test: str = ""
    measured: str = ""
    note: str = field(default="", kw_only=True)


TOKEN_CHOICE = "Gates: sparse, by token"
FIXED = "Gates: sparse, not trained"
OTHER_GATES = "Gates: by expert, dense, soft"
LOSSES = "Auxiliary losses, capacity"
EXPERT = "Experts"
MOPE = "Mixtures of parameter-efficient experts"
SCHEMES = "Training and inference schemes"
DERIVATIVES = "Derivatives"
SYSTEMS = "Systems"
APPLICATIONS = "Applications"
DIAGNOSTICS = "Diagnostics"

_MIXTURES = "architecture/test_mixtures.py::"
_ARCHITECTURE = "architecture/test_architecture.py::"
_TRAIN = "training/test_train.py::"
_CHOICE = "architecture/test_survey_gates.py::"
_TRAINING_GATES = "training/test_gates.py::"
_DENSIFY = "conversion/test_densify.py::"
_UPCYCLE = "conversion/test_upcycle.py::"
_LATER = (
    "it looks at later tokens: what a token gets would change when the text goes on, so that generation is not what was trained"
)
_ENGINE = "the engine's part ([serve.md](serve.md#many-devices))"
_BASE = "it changes what the base computes, so that its fine-tunes are no longer what was trained"

GATES: list[Leaf] = [
    Leaf(
        TOKEN_CHOICE,
        "top-k",
        ("Shazeer 1701.06538", "GShard 2006.16668", "Mixtral 2401.04088"),
        Recipe("mixture: {top_k: 2}"),
        _MIXTURES + "test_a_mixture_is_the_weighted_sum_of_its_experts",
        "logistic, top-2",
    ),
    Leaf(
        TOKEN_CHOICE,
        "top-1",
        ("Switch 2101.03961",),
        Recipe("mixture: {top_k: 1}"),
        "sources/test_families.py::test_router_fixed_on_an_expert_is_the_model_with_its_parts",
        "logistic, top-1",
    ),
    Leaf(
        TOKEN_CHOICE,
        "top-p (count by probability)",
        ("Harder tasks 2403.07652",),
        Recipe("mixture: {top_p: 0.9}"),
        _MIXTURES + "test_top_p_takes_the_fewest_experts_that_reach_it",
        "logistic, top-p 0.9",
    ),
    Leaf(
        TOKEN_CHOICE,
        "noisy top-k, jitter",
        ("Shazeer 1701.06538", "Switch 2101.03961"),
        Recipe("mixture: {router: {noise: 1.0, jitter: 0.01}}"),
        _ARCHITECTURE + "test_training_adds_only_jitter_and_noise",
        "trained: noise",
        note="the noise's deviation is given, not learned",
    ),
    Leaf(
        TOKEN_CHOICE,
        "two levels of gates",
        ("Shazeer 1701.06538",),
        note="it saves gates from hundreds of experts on; a mixture of trained models has few",
    ),
    Leaf(
        TOKEN_CHOICE,
        "prototyping: top-1 in each group",
        ("M6-T 2105.15082",),
        Recipe("mixture: {groups: 2}"),
        _CHOICE + "test_the_best_of_each_group_is_chosen",
        "logistic, groups: 2",
    ),
    Leaf(
        TOKEN_CHOICE,
        "balanced assignment",
        ("BASE 2103.16716",),
        Training("gate: base"),
        _TRAINING_GATES + "test_base_gives_every_expert_as_many_tokens_at_the_best_sum",
        "trained: base",
    ),
    Leaf(
        TOKEN_CHOICE,
        "Sinkhorn",
        ("S-BASE 2202.01169",),
        Training("gate: sinkhorn"),
        _TRAINING_GATES + "test_a_sinkhorn_plan_has_equal_shares_of_all_experts",
        "trained: sinkhorn",
    ),
    Leaf(
        TOKEN_CHOICE,
        "DSelect-k",
        ("DSelect-k 2106.03760",),
        Training("gate: dselect"),
        _TRAINING_GATES + "test_dselect_is_top_k_where_its_steps_are_at_their_ends",
        "trained: dselect",
    ),
    Leaf(
        TOKEN_CHOICE,
        "sentence, task",
        ("Task-MoE 2110.03742", "Task-level MoE 2205.12701", "Uni-Perceiver-MoE 2206.04674"),
        Recipe("mixture: {top_k: 1, router: {fit: classifier}}"),
        "routing/test_classifier.py::test_the_decision_stays_after_the_prefix_and_is_causal",
        "classifier, per text",
        note="decided on the first tokens, since later ones are not known yet",
    ),
    Leaf(
        TOKEN_CHOICE,
        "a gate per task (MMoE, KDD 2018)",
        ("Survey 2407.06204",),
        note="where the task is known, [its label](labels.md) names the expert, and no gate is needed",
    ),
    Leaf(
        TOKEN_CHOICE,
        "cosine, low-dimensional",
        ("X-MoE 2204.09179",),
        Recipe("mixture: {router: {fit: cosine}}"),
        _CHOICE + "test_cosine_and_attention_are_the_papers_formulas",
        "cosine, top-2",
    ),
    Leaf(
        TOKEN_CHOICE,
        "attention router",
        ("Yuan 2.0-M32 2405.17976",),
        Recipe("mixture: {router: {fit: attention}}"),
        _CHOICE + "test_cosine_and_attention_are_the_papers_formulas",
        "attention, top-2",
    ),
    Leaf(
        TOKEN_CHOICE,
        "null experts",
        ("AdaMoE 2406.13233",),
        Recipe(
            "mixture: {unseen: base, router: {fit: lexical}}, experts: [{name: law, model: ./law, text: law.jsonl}, "
            "{name: general, model: base, text: wiki.jsonl}]"
        ),
        "routing/test_unseen.py::test_the_base_takes_all_of_a_token_and_of_no_other",
        "lexical, unseen: base",
        note="the base as an expert is the null expert",
    ),
    Leaf(
        TOKEN_CHOICE,
        "a threshold per expert",
        ("DYNMoE 2405.14297",),
        Recipe("mixture: {threshold: 0.3}"),
        _CHOICE + "test_whoever_reaches_its_threshold_is_chosen_or_the_best_where_none_does",
        "logistic, threshold 0.3",
    ),
    Leaf(
        TOKEN_CHOICE,
        "distilled, then frozen",
        ("StableMoE 2204.08396",),
        Recipe("mixture: {router: {fit: lexical}}"),
        "routing/test_lexical.py::test_the_table_is_the_same_in_both",
        "lexical, top-2",
        note="a table by token, as StableMoE's second stage; it learns from domains",
    ),
    Leaf(
        TOKEN_CHOICE,
        "contrast of chosen and unchosen experts",
        ("SCMoE 2405.14507",),
        note="a way to decode, of two passes of one model: the engine's sampler would have to know it",
    ),
    Leaf(
        TOKEN_CHOICE,
        "nested sizes",
        ("Flextron 2406.10260",),
        note="the sizes of one model are trained together; [budgets](recipe.md#mixture) cut experts to a size afterwards",
    ),
    Leaf(
        FIXED,
        "hash of the token",
        ("Hash Layers 2106.04426",),
        Recipe("mixture: {top_k: 1, router: {fit: hash}}"),
        _CHOICE + "test_hash_is_a_function_of_the_token_alone",
        "hash, top-1",
    ),
    Leaf(
        FIXED,
        "random, frozen",
        ("SMoE-Dropout 2303.01610",),
        Recipe("mixture: {router: {fit: random}}"),
        "sources/test_families.py::test_copies_of_one_model_are_that_model",
        "random, top-2",
    ),
    Leaf(
        FIXED,
        "random, drawn anew",
        ("THOR 2110.04260",),
        Training("what: [experts], gate: random"),
        _TRAINING_GATES + "test_random_experts_come_from_all_or_from_the_group_of_the_domain",
        "trained: random and consistency, experts alone",
    ),
    Leaf(
        FIXED,
        "domain, its posterior at inference",
        ("DEMix 2108.05036",),
        Recipe("mixture: {router: {fit: ngram}}"),
        "routing/test_ngram.py::test_the_table_is_naive_bayes_over_the_counted_ngrams",
        "ngram, top-2",
        note="the posterior is that of the text's tokens; DEMix takes the experts' own losses",
    ),
    Leaf(
        FIXED,
        "language or task, mapped",
        ("M2M-100 2010.11125", "Task-MoE 2110.03742"),
        Command("modekit eval OUT --labels all"),
        "evaluation/test_labels.py::test_by_gate_a_label_is_a_forced_pass",
        "own expert (oracle)",
    ),
    Leaf(
        FIXED,
        "domain group, random in it",
        ("PanGu-Sigma 2303.10845",),
        Training("what: [experts, routers], gate: domain-random, losses: {lm: 1, label: 0.1}"),
        _TRAINING_GATES + "test_random_experts_come_from_all_or_from_the_group_of_the_domain",
        "trained: domain-random, experts too",
    ),
    Leaf(
        OTHER_GATES,
        "expert choice",
        ("Expert Choice 2202.09368", "Brainformers 2306.00008"),
        note=_LATER,
    ),
    Leaf(
        OTHER_GATES,
        "dense",
        ("LoRAMoE 2312.09979", "MoLE 2404.13628", "DS-MoE 2404.05567"),
        Recipe("mixture: {method: gating}"),
        _MIXTURES + "test_many_mixtures_are_the_weighted_sums_of_their_experts",
        "logistic, dense",
    ),
    Leaf(
        OTHER_GATES,
        "dense, fixed weights",
        ("AdaMix 2205.12410",),
        Recipe("mixture: {method: linear}"),
        "sources/test_families.py::test_copies_under_a_linear_mixture_are_that_model",
        "fixed weights",
    ),
    Leaf(OTHER_GATES, "tokens merged", ("Soft MoE 2308.00951", "HOMOE 2311.14747"), note=_LATER),
    Leaf(
        OTHER_GATES,
        "experts merged, by segment",
        ("SMEAR 2306.03745", "Lory 2405.03133", "MEO 2310.09832"),
        Recipe("mixture: {method: gating, combine: parameters, router: {granularity: segment, segment: 64}}"),
        _CHOICE + "test_merged_experts_are_those_merged_by_hand",
        "logistic, experts merged by segment",
        note="SMEAR merges by the whole sequence, which is not causal",
    ),
    Leaf(
        OTHER_GATES,
        "low-rank or scaling experts, all weighed",
        ("MoV 2309.05444", "SMoLA 2312.00968"),
        Recipe("mixture: {method: gating}", adapters=True),
        _MIXTURES + "test_a_mixture_of_adapters_is_routed_by_what_its_gates_say",
        "adapter_cost.md",
    ),
]

TRAINED: list[Leaf] = [
    Leaf(
        LOSSES,
        "importance",
        ("Shazeer 1701.06538", "V-MoE 2106.05974"),
        Training("losses: {lm: 1, importance: 0.1}"),
        _TRAIN + "test_losses_are_their_formulas",
        "trained: importance",
    ),
    Leaf(
        LOSSES,
        "load",
        ("Shazeer 1701.06538",),
        Training("losses: {lm: 1, load: 0.1}"),
        _TRAINING_GATES + "test_the_load_is_the_smooth_share_of_tokens_that_an_expert_gets",
        "trained: load",
    ),
    Leaf(
        LOSSES,
        "balance",
        ("GShard 2006.16668", "Switch 2101.03961", "DeepSeekMoE 2401.06066", "Skywork-MoE 2406.06563"),
        Training("losses: {lm: 1, balance: 0.01}"),
        _TRAIN + "test_each_loss_falls_when_it_is_trained_on",
        "trained: balance",
    ),
    Leaf(
        LOSSES,
        "z",
        ("ST-MoE 2202.08906", "OpenMoE 2402.01739"),
        Training("losses: {lm: 1, z: 0.001}"),
        _TRAIN + "test_losses_are_their_formulas",
        "trained: z",
    ),
    Leaf(
        LOSSES,
        "mutual information",
        ("Mod-Squad 2212.08066", "ModuleFormer 2306.04640", "DS-MoE 2404.05567"),
        Training("losses: {lm: 1, mutual: 0.001}"),
        _TRAINING_GATES + "test_mutual_information_is_all_where_experts_say_the_domain_and_nothing_where_they_are_alike",
        "trained: mutual",
    ),
    Leaf(
        LOSSES,
        "consistency",
        ("THOR 2110.04260",),
        Training("what: [experts], gate: random, losses: {lm: 1, consistency: 5}"),
        _TRAINING_GATES + "test_consistency_is_the_mean_of_both_divergences",
        "trained: random and consistency, experts alone",
    ),
    Leaf(
        LOSSES,
        "capacity, overflow dropped",
        ("Switch 2101.03961", "Z-code M3 2109.10465"),
        Training("capacity: 1.25"),
        _TRAINING_GATES + "test_what_overflows_is_as_much_as_the_formula_says_and_the_first_stay",
        "trained: capacity 1.25, drop",
    ),
    Leaf(
        LOSSES,
        "overflow to the next",
        ("NLLB 2207.04672",),
        Training("capacity: 1.25, overflow: next"),
        _TRAINING_GATES + "test_no_expert_takes_more_than_its_capacity",
        "trained: capacity 1.25, next",
    ),
    Leaf(
        LOSSES,
        "random second expert",
        ("GShard 2006.16668",),
        Training("capacity: 1.25, overflow: random"),
        _TRAINING_GATES + "test_a_second_expert_is_taken_as_often_as_twice_its_weight_says",
        "trained: capacity 1.25, random second",
    ),
    Leaf(
        LOSSES,
        "batch-prioritised, in training",
        ("V-MoE 2106.05974",),
        Training("capacity: 1.25, priority: score"),
        _TRAINING_GATES + "test_batch_priority_drops_less_of_the_gates_mass_than_order_does",
        "trained: capacity 1.25, by score",
        note="at inference it is refused: it looks at later tokens",
    ),
    Leaf(
        SCHEMES,
        "original: all trained together",
        ("Switch 2101.03961", "ST-MoE 2202.08906"),
        Command("modekit train OUT --what all"),
        _TRAIN + "test_only_what_was_named_has_other_bytes",
        "training.md",
    ),
    Leaf(
        SCHEMES,
        "dense to sparse: copies",
        ("Sparse Upcycling 2212.05055", "MoE-LLaVA 2401.15947", "Tricks 2110.08246", "RMoE 2204.09636"),
        Command("modekit upcycle BASE OUT --experts 4 --top-k 2"),
        _UPCYCLE + "test_the_mixture_has_the_logits_of_the_dense_model",
        "taxonomy.md",
        note="RMoE's residual of a shared core: `always_on`",
    ),
    Leaf(
        SCHEMES,
        "dense to sparse: segments",
        ("DeepSeekMoE 2401.06066", "LLaMA-MoE 2406.16554"),
        Command("modekit upcycle BASE OUT --experts 4 --segments 2"),
        _UPCYCLE + "test_active_parameters_do_not_depend_on_segments",
        "taxonomy.md",
    ),
    Leaf(
        SCHEMES,
        "dense to sparse: channels grouped",
        ("MoEfication 2110.01786", "MoEBERT 2204.07675", "EMoE 2310.10908"),
        note="it saves work where most channels are zero, by ReLU; the gated FFNs here use nearly all for every token",
    ),
    Leaf(
        SCHEMES,
        "dense to sparse: gate from dense to top-k",
        ("EvoMoE 2112.14397",),
        Training("gate: dense-to-sparse"),
        _TRAINING_GATES + "test_dense_to_sparse_takes_fewer_experts_as_the_run_goes_on",
        "trained: dense-to-sparse",
    ),
    Leaf(
        SCHEMES,
        "dense training, sparse inference",
        ("DS-MoE 2404.05567",),
        Training("train_top_k: 0"),
        _TRAIN + "test_one_expert_per_token_is_trained_with_two_and_said_so",
        "trained: all experts, then two",
    ),
    Leaf(
        SCHEMES,
        "more experts at inference than in training",
        ("SMoE-Dropout 2303.01610",),
        Command("modekit fit OUT --top-k 4"),
        "routing/test_refit.py::test_a_changed_router_is_what_its_recipe_builds",
        note="k does not grow while a training runs",
    ),
    Leaf(
        SCHEMES,
        "sparse to dense: distillation",
        ("Switch 2101.03961", "OneS 2201.10890"),
        Command("modekit densify OUT DENSE --by distil"),
        _DENSIFY + "test_a_distillation_lowers_the_held_out_loss_and_says_what_it_keeps",
        "densify.md",
    ),
    Leaf(
        SCHEMES,
        "sparse to dense: sum, SVD",
        ("OneS 2201.10890",),
        Command("modekit densify OUT DENSE --by svd"),
        _DENSIFY + "test_of_one_expert_svd_of_full_rank_is_that_expert",
        "densify.md",
    ),
    Leaf(
        SCHEMES,
        "sparse to dense: average",
        ("EWA 2308.06093",),
        Command("modekit densify OUT DENSE --by average"),
        _DENSIFY + "test_the_average_is_the_mean_of_the_experts_and_has_the_base_s_class_and_size",
        "densify.md",
    ),
    Leaf(
        SCHEMES,
        "sparse to dense: pruned to one",
        ("MoE-Pruning 2206.00277",),
        Command("modekit densify OUT DENSE --by best"),
        _DENSIFY + "test_the_best_expert_is_that_of_the_lowest_loss",
        "densify.md",
    ),
    Leaf(
        SCHEMES,
        "experts pruned, compressed",
        ("ModuleFormer 2306.04640", "Compression of MoE 2406.02500"),
        Command("modekit remove OUT NAME"),
        "members/test_come_and_go.py::test_added_is_built_with_it_and_removed_is_built_without",
        "members.md",
        note="fewer bytes per expert: `budget` in the recipe",
    ),
    Leaf(
        SCHEMES,
        "near duplicates merged",
        ("MC-SMoE 2310.01334",),
        Command("modekit shrink OUT NEW --to 6"),
        "conversion/test_shrink.py::test_a_stranger_s_doubled_experts_become_one_without_loss",
        "densify.md",
    ),
    Leaf(
        SCHEMES,
        "models merged: average",
        ("Branch-Train-Merge 2208.03306",),
        Recipe("mixture: {modules: [q], backbone: average}"),
        "weights/test_merge.py::test_a_merge_is_its_equation",
        "scoreboard.md",
        note="the ensemble by posterior runs every model for every token: it is in the scoreboard alone",
    ),
    Leaf(
        SCHEMES,
        "models merged: FFN experts, averaged attention",
        ("Branch-Train-MiX 2403.07816",),
        Recipe("mixture: {modules: [mlp], backbone: average}"),
        "building/test_verify.py::test_merged_and_borrowed_backbones_are_proven_too",
        "scoreboard.md",
        note="then `modekit train OUT --what all`",
    ),
    Leaf(
        SCHEMES,
        "models merged: outputs fused",
        ("Fusion of Experts 2310.01542",),
        Recipe("mixture: {modules: all, top_k: 1, router: {fit: classifier, features: hidden}}"),
        "routing/test_classifier.py::test_hidden_features_are_a_linear_gate_of_the_mean",
        "classifiers.md",
    ),
]

KINDS: list[Leaf] = [
    Leaf(
        EXPERT,
        "FFN",
        ("GShard 2006.16668", "Switch 2101.03961"),
        Recipe("mixture: {modules: [mlp]}"),
        "sources/test_families.py::test_router_fixed_on_an_expert_is_the_model_with_its_parts",
        "demo.md",
    ),
    Leaf(
        EXPERT,
        "attention, keys and values shared",
        ("MoA 2210.05144", "JetMoE 2404.07413"),
        Recipe("mixture: {modules: [q, o]}"),
        _MIXTURES + "test_every_family_mixes_every_kind_of_expert",
        "demo.md",
    ),
    Leaf(
        EXPERT,
        "convolution",
        ("pMoE 2306.04073", "ADVMOE 2308.10110", "Chen et al. 2208.02813", "DeepMoE 1806.01531"),
        note="no language model here has such layers; state-space layers, which have, are mixed as whole layers",
    ),
    Leaf(
        EXPERT,
        "count",
        ("GLaM 2112.06905", "Meta-MoE 2112.10684", "DeepSpeed-MoE 2201.05596"),
        Command("modekit add OUT --name tax --model ./tax"),
        "members/test_come_and_go.py::test_added_is_built_with_it_and_removed_is_built_without",
        "scale.md",
    ),
    Leaf(
        EXPERT,
        "count per layer",
        ("MoLA 2402.08562", "DeepSpeed-MoE 2201.05596"),
        Recipe("experts: [{name: law, model: ./law, layers: [6-11]}, {name: code, model: ./code}]"),
        "planning/test_expert_layers.py::test_an_expert_is_the_base_where_it_has_no_layer",
    ),
    Leaf(
        EXPERT,
        "parameters of a published mixture",
        ("Mixtral 2401.04088",),
        Command("modekit plan CONFIG"),
        "sources/test_counting.py::test_counts_are_those_published",
    ),
    Leaf(
        EXPERT,
        "size",
        ("DeepSeekMoE 2401.06066", "LLaMA-MoE 2406.16554"),
        Recipe(
            "experts: [{name: law, model: ./law, as: lora, rank: 8}, {name: code, model: ./code, as: lora, budget: 0.125x}]"
        ),
        "building/test_budgets.py::test_it_takes_no_more_than_its_budget_and_is_proven",
        "expert_budget.md",
        note="segments of a dense FFN: `upcycle --segments`",
    ),
    Leaf(
        EXPERT,
        "size: one neuron each",
        ("PEER 2407.04153",),
        note="a million experts of one neuron are trained from nothing; a fine-tune is not made of such",
    ),
    Leaf(
        EXPERT,
        "frequency of layers",
        ("ST-MoE 2202.08906", "Jamba 2403.19887", "V-MoE 2106.05974"),
        Recipe("mixture: {layers: [0, 4-11]}"),
        "evaluation/test_inspect.py::test_where_routers_stand",
        "demo.md",
    ),
    Leaf(
        EXPERT,
        "activation",
        ("GLU variants 2002.05202", "GELU 1606.08415"),
        note="that of the base: its fine-tunes have no other",
    ),
    Leaf(
        EXPERT,
        "shared",
        ("DeepSeekMoE 2401.06066", "DeepSpeed-MoE 2201.05596", "NLLB 2207.04672", "MoCLE 2312.12379"),
        Recipe("mixture: {always_on: {expert: base, weight: 0.3}}"),
        _MIXTURES + "test_an_always_on_base_adds_its_share",
        "logistic, base always on",
    ),
    Leaf(
        EXPERT,
        "shared, from the layer before",
        ("ScMoE 2404.05019",),
        note=_BASE,
    ),
    Leaf(
        EXPERT,
        "static and dynamic parts",
        ("PAD-Net 2211.05528",),
        Recipe("mixture: {modules: [up]}"),
        _MIXTURES + "test_every_family_mixes_every_kind_of_expert",
        note="by module: what is not mixed is the backbone",
    ),
    Leaf(
        EXPERT,
        "made by a hypernetwork",
        ("HyperMoE 2402.12656",),
        note="its experts are outputs of a network that is trained with them; here experts are given",
    ),
    Leaf(
        MOPE,
        "in the FFN",
        ("LoRAMoE 2312.09979", "MixLoRA 2404.15159", "LLaVA-MoLE 2401.16160"),
        Recipe("mixture: {modules: [mlp], top_k: 1}", adapters=True),
        "sources/test_adapters.py::test_parts_of_an_adapter_that_are_not_mixed_are_the_base_s",
        "routers.md",
    ),
    Leaf(
        MOPE,
        "in attention",
        ("MoELoRA 2402.12851", "MoCLE 2312.12379", "SiRA 2311.09179"),
        Recipe("mixture: {modules: [q, k, v, o]}", adapters=True),
        "sources/test_adapters.py::test_parts_of_an_adapter_that_are_not_mixed_are_the_base_s",
        "routers.md",
    ),
    Leaf(
        MOPE,
        "in the block, in every layer",
        ("MoLE 2404.13628", "MOELoRA 2310.18339", "MeteoRA 2405.13053"),
        Recipe("mixture: {modules: auto}", adapters=True),
        "sources/test_adapters.py::test_a_mixture_fixed_on_an_adapter_is_the_model_of_peft",
        "routers.md",
    ),
    Leaf(
        MOPE,
        "(IA)3",
        ("MoV 2309.05444",),
        Recipe("mixture: {modules: auto}", adapters=True),
        "sources/test_adapters.py::test_ia3_folds_to_what_peft_merges",
    ),
    Leaf(
        MOPE,
        "bottleneck adapters",
        ("AdaMix 2205.12410", "MixDA 2306.05406"),
        note="PEFT has no such adapters, so that there are none to mix",
    ),
    Leaf(
        MOPE,
        "prefix, prompt (SMoP, EMNLP 2023)",
        ("Prefix-Tuning 2101.00190", "Prompt Tuning 2104.08691", "UniPELT 2110.07577"),
        Recipe("mixture: {top_k: 1}", adapters=True),
        "architecture/test_prefixes.py::test_an_expert_alone_is_its_own_model",
    ),
    Leaf(
        DERIVATIVES,
        "experts added over time",
        ("Lifelong-MoE 2305.12281",),
        Command("modekit add OUT --name tax --model ./tax"),
        "members/test_trained_mixtures.py::test_rows_that_were_trained_stay_and_the_new_one_is_fitted",
        "members.md",
    ),
    Leaf(DERIVATIVES, "tokens mixed over texts", ("MoT 2310.15961",), note=_LATER),
    Leaf(
        DERIVATIVES, "mixture of depths", ("MoD 2404.02258",), note=_BASE + "; its top-k over a sequence is not causal either"
    ),
    Leaf(DERIVATIVES, "layers shared over depth", ("WideNet 2107.11817", "SUT 2310.07096"), note=_BASE),
    Leaf(
        DERIVATIVES,
        "tokens split into heads",
        ("MH-MoE 2404.15045",),
        note=_BASE,
    ),
    Leaf(
        SYSTEMS,
        "computation: grouped kernels, dropless, placement",
        ("MegaBlocks 2211.15841", "ScatterMoE 2403.08245", "Tutel 2206.03382", "FastMoE 2103.13262", "FlexMoE 2304.03946"),
        note=_ENGINE,
    ),
    Leaf(
        SYSTEMS,
        "communication: expert parallelism, all-to-all",
        ("GShard 2006.16668", "HetuMoE 2203.14685", "TA-MoE 2302.09915", "ExFlow 2401.08383", "Lancet 2404.19429"),
        note=_ENGINE,
    ),
    Leaf(
        SYSTEMS,
        "training over processes",
        ("DeepSpeed-TED 2303.06318", "SE-MoE 2205.10034"),
        Command("modekit train OUT"),
        "training/test_launched.py::test_a_sharded_mixture_has_the_same_gradients",
        "training.md",
        note="under `torchrun` or `accelerate launch` with FSDP: data and shards, not experts",
    ),
    Leaf(
        SYSTEMS,
        "storage: offload, prefetch",
        ("EdgeMoE 2308.14352", "Pre-gated MoE 2308.12066"),
        None,
        _ARCHITECTURE + "test_device_maps_change_nothing",
        note=_ENGINE + "; transformers offloads to memory or disk by `device_map`, without prefetch",
    ),
    Leaf(
        APPLICATIONS,
        "language",
        ("DeepSeekMoE 2401.06066", "NLLB 2207.04672"),
        Command("modekit demo --translation"),
        "architecture/test_encoder_decoder.py::test_what_is_written_token_by_token_is_what_one_pass_says",
        "demo.md",
    ),
    Leaf(
        APPLICATIONS,
        "vision, recommendation",
        ("V-MoE 2106.05974", "ADVMOE 2308.10110"),
        note="modekit mixes language models",
    ),
    Leaf(
        APPLICATIONS,
        "several modalities",
        ("MoE-LLaVA 2401.15947", "Uni-MoE 2405.11273"),
        Recipe("output: {keep: wrapper}"),
        "architecture/test_pictures.py::test_routers_read_pictures_and_text",
        note="the language model is mixed; tower and projector are the base's",
    ),
    Leaf(
        DIAGNOSTICS,
        "load, entropy, similarity, by token",
        ("OpenMoE 2402.01739", "Mixtral 2401.04088"),
        Command("modekit inspect OUT"),
        "evaluation/test_inspect.py::test_how_far_the_token_alone_decides",
        "training.md",
    ),
    Leaf(
        DIAGNOSTICS,
        "drops by position",
        ("OpenMoE 2402.01739",),
        Training("capacity: 1.25"),
        _TRAINING_GATES + "test_early_tokens_are_served_first_and_the_log_shows_it",
    ),
]

LEAVES: list[Leaf] = [*GATES, *TRAINED, *KINDS]

PENDING: frozenset[str] = frozenset()
"""Leaves whose part, test or measurement is not there yet: a leaf that is whole must not stand here (tests/docs)."""
