"""Twin-Merging (arXiv:2406.15479): a shared model plus what each expert has beyond it, compressed, by weights of a text.

The shared model is task arithmetic with a factor of 0.3, W_s = W + 0.3 sum of (W_e - W). What an expert has beyond it keeps
its first singular values, V_e = SVD_r(W_e - W_s). A router of three layers with a softmax reads the shared model's last hidden
state at the last token and is trained to name the domain; a text's weights are W_s + sum of p_e V_e.
Since text is read from left to right, the router reads the first PREFIX tokens, whose own predictions are the shared model's.

Shape legend: B batch, S sequence, D hidden, E experts, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.func import functional_call
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from peers.bounds import PREFIX, models_of, moved
from peers.choose import choose
from peers.peer import Formula, Made, Peer, Pool
from peers.pool import read_text
from peers.wemoe import FACTOR

SHARES = (0.1, 0.25, 0.5)
"""Of the singular values of a matrix; the paper's tables keep 0.1."""


def kept(difference: torch.Tensor, share: float) -> torch.Tensor:
    """The nearest matrix whose rank is that share of the largest; of another tensor all."""
    if difference.dim() < 2:
        return difference
    left_DR, values_R, right_RD = torch.linalg.svd(difference, full_matrices=False)
    rank = rank_of(difference, share)
    return (left_DR[:, :rank] * values_R[:rank]) @ right_RD[:rank]


def rank_of(matrix: torch.Tensor, share: float) -> int:
    """How many singular values stay."""
    return max(1, round(share * min(matrix.shape)))


@dataclass(frozen=True)
class Twin:
    """Weights of a text are the shared ones plus the experts' own, as the router weighs them by its first tokens.

    own: of each expert, by name, what it has beyond `shared`.
    """

    shared: PreTrainedModel
    own: Sequence[Mapping[str, torch.Tensor]]
    router: Pipeline

    @cached_property
    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: each.detach() for name, each in self.shared.named_parameters()}

    @torch.inference_mode()
    def logits(self, ids_BS: torch.Tensor) -> torch.Tensor:
        """The shared model's, and behind the prefix those of the merged one."""
        before = self.shared(input_ids=ids_BS[:, :PREFIX], use_cache=False).logits[:, : PREFIX - 1]
        if ids_BS.shape[1] < PREFIX:
            return self.shared(input_ids=ids_BS, use_cache=False).logits
        shares_E = self.router.predict_proba(embedded(self.shared, ids_BS[:, :PREFIX]))[0].tolist()
        arguments = {"input_ids": ids_BS, "use_cache": False}
        merged = functional_call(self.shared, self.merged(shares_E), kwargs=arguments)
        return torch.cat([before, merged.logits[:, PREFIX - 1 :]], 1)

    def merged(self, shares_E: Sequence[float]) -> dict[str, torch.Tensor]:
        """Weights of a text."""
        return {
            name: each + sum(share * own[name] for share, own in zip(shares_E, self.own, strict=True) if name in own)
            for name, each in self._weights.items()
        }


@torch.inference_mode()
def embedded(model: PreTrainedModel, ids_BS: torch.Tensor) -> list[list[float]]:
    """(B, D): the last hidden state at the last token."""
    return model.base_model(input_ids=ids_BS, use_cache=False).last_hidden_state[:, -1].tolist()


def trained_router(pool: Pool, shared: PreTrainedModel) -> Pipeline:
    """Names the domain of every piece of PREFIX tokens of the fit text."""
    tokenizer, rows, labels = AutoTokenizer.from_pretrained(pool.base), list[list[float]](), list[int]()
    for place, path in enumerate(pool.text.values()):
        ids = [tokenizer(document)["input_ids"] for document in read_text(path)]
        pieces = [each[start : start + PREFIX] for each in ids for start in range(0, len(each) - PREFIX + 1, PREFIX)]
        for start in range(0, len(pieces), 64):
            rows += embedded(shared, torch.tensor(pieces[start : start + 64]))
        labels += [place] * len(pieces)
    hidden = shared.config.hidden_size
    layers = MLPClassifier((hidden, hidden), early_stopping=True, random_state=pool.seed)
    return make_pipeline(StandardScaler(), layers).fit(rows, labels)


def twin(pool: Pool, _out: Path) -> Made:
    shared = AutoModelForCausalLM.from_pretrained(pool.base, dtype=torch.float32).eval()
    base, experts = {name: each.clone() for name, each in shared.state_dict().items()}, models_of(pool)
    shared.load_state_dict(moved(base, [each.state_dict() for each in experts], [FACTOR] * len(experts)))
    router, weights = trained_router(pool, shared), dict(shared.named_parameters())
    share, made = choose(pool, SHARES, partial(_made, shared, weights, experts, router))
    note = f"the first {PREFIX} tokens weigh it and are the shared model's; kept singular values {share:g} of {SHARES}"
    return Made(made.model, note, made.total, made.active, engines="none")


def _made(
    shared: PreTrainedModel,
    weights: Mapping[str, torch.Tensor],
    experts: Sequence[PreTrainedModel],
    router: Pipeline,
    share: float,
) -> Made:
    differences = [
        {name: each.detach() - weights[name].detach() for name, each in expert.named_parameters()} for expert in experts
    ]
    changed = [{name: each for name, each in difference.items() if each.any()} for difference in differences]
    own = [{name: kept(each, share) for name, each in difference.items()} for difference in changed]
    total = sum(each.numel() for each in weights.values())
    numbers = sum(
        rank_of(each, share) * sum(each.shape) if each.dim() > 1 else each.numel() for expert in own for each in expert.values()
    )
    return Made(Twin(shared, own, router), total=total + numbers, active=total)


TWIN: list[Peer] = [Formula("Twin-Merging", twin, "2406.15479, formula")]
