"""What a training moves towards. Every loss is a sum over real tokens, so that parts of a step add up; pads never count.
(balance and importance are products of means over the tokens of a part: they depend on how a step is cut.)

    lm               -log p(next token)
    distill          T^2 KL(teacher || student), the teacher being the domain's own expert (arXiv:1503.02531)
    distill_reverse  T^2 KL(student || teacher), which does not reach for what the student cannot say (arXiv:2306.08543)
    label            -log p(router takes the domain's own expert), mean over routers
    balance          E sum_e f_e P_e: share of tokens sent to an expert times its mean probability (Eq. 4, arXiv:2101.03961)
    importance       squared coefficient of variation of the experts' summed weights (Eq. 7, arXiv:1701.06538)
    z                (log sum exp of a router's logits)^2, mean over routers (Eq. 5, arXiv:2202.08906)

Shape legend: N tokens, V vocabulary, E experts.
"""

from __future__ import annotations

import torch

GENERIC = -1
"""Label of a token of no domain."""


def language_model(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """Sum of -log p(target), float32."""
    return torch.nn.functional.cross_entropy(logits_NV.float(), targets_N, reduction="sum")


def distillation(student_NV: torch.Tensor, teacher_NV: torch.Tensor, temperature: float, *, reverse: bool) -> torch.Tensor:
    """Sum over tokens of T^2 KL(teacher || student), or of T^2 KL(student || teacher), float32."""
    student = (student_NV.float() / temperature).log_softmax(-1)
    teacher = (teacher_NV.float() / temperature).log_softmax(-1)
    divergence = torch.nn.functional.kl_div(
        *((teacher, student) if reverse else (student, teacher)), reduction="sum", log_target=True
    )
    return temperature**2 * divergence


def domain_label(logits_NE: torch.Tensor, labels_N: torch.Tensor, base: int | None) -> torch.Tensor:
    """Sum over tokens of the cross-entropy of a router against the domain's own expert.

    GENERIC tokens are to go to the expert that is the base, or to all alike where none is.
    """
    experts = logits_NE.shape[-1]
    generic_N = labels_N == GENERIC
    targets_NE = torch.nn.functional.one_hot(labels_N.clamp_min(0), experts).to(logits_NE.dtype)
    if base is None:
        targets_NE = torch.where(generic_N[:, None], torch.full_like(targets_NE, 1.0 / experts), targets_NE)
    else:
        of_base = torch.nn.functional.one_hot(torch.tensor(base, device=logits_NE.device), experts).to(logits_NE.dtype)
        targets_NE = torch.where(generic_N[:, None], of_base, targets_NE)
    return -(targets_NE * logits_NE.log_softmax(-1)).sum()


def load_balance(logits_NE: torch.Tensor, top_k: int) -> torch.Tensor:
    """E sum_e f_e P_e, 1 when tokens and probabilities are spread evenly; times the number of tokens, so that it adds up."""
    count, experts = logits_NE.shape
    if count == 0:
        return logits_NE.sum()
    taken_NE = torch.zeros_like(logits_NE).scatter(-1, logits_NE.topk(top_k, dim=-1).indices, 1.0 / top_k)
    return count * experts * (taken_NE.mean(0) * logits_NE.softmax(-1).mean(0)).sum()


def importance(logits_NE: torch.Tensor) -> torch.Tensor:
    """Squared coefficient of variation of the experts' summed probabilities, times the number of tokens."""
    if len(logits_NE) == 0:
        return logits_NE.sum()
    sums_E = logits_NE.softmax(-1).sum(0)
    variation: torch.Tensor = sums_E.var(unbiased=False) / sums_E.mean().square()
    return len(logits_NE) * variation


def z_loss(logits_NE: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of (log sum exp of the logits)^2."""
    return logits_NE.logsumexp(-1).square().sum()
