"""What a training moves towards. Every loss is a sum over real tokens, so that parts of a step add up; pads never count.
(balance is of means over the tokens of a part: it depends on how a step is cut.)

Shape legend: N tokens, V vocabulary, C classes that two distributions are compared over (the vocabulary, or some of its
tokens and all others as one), E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

GENERIC = -1
"""Label of a token of no domain."""


def language_model(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """Sum of -log p(target), float32."""
    return torch.nn.functional.cross_entropy(logits_NV.float(), targets_N, reduction="sum")


def forward_kl(student_NC: torch.Tensor, teacher_NC: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of KL(teacher || student), of log-probabilities (N, C) (arXiv:1503.02531)."""
    return torch.nn.functional.kl_div(student_NC, teacher_NC, reduction="sum", log_target=True)


def reverse_kl(student_NC: torch.Tensor, teacher_NC: torch.Tensor) -> torch.Tensor:
    """The same of KL(student || teacher), which does not reach for what the student cannot say (arXiv:2306.08543)."""
    return torch.nn.functional.kl_div(teacher_NC, student_NC, reduction="sum", log_target=True)


def teacher_ce(student_NC: torch.Tensor, teacher_NC: torch.Tensor) -> torch.Tensor:
    """The same of -sum p_teacher log p_student: forward_kl and the teacher's entropy, which no student changes."""
    return -(teacher_NC.exp() * student_NC).sum()


def total_variation(student_NC: torch.Tensor, teacher_NC: torch.Tensor) -> torch.Tensor:
    """The same of 1/2 sum |p_teacher - p_student|, between 0 and 1."""
    return 0.5 * (teacher_NC.exp() - student_NC.exp()).abs().sum()


DIVERGENCES: Mapping[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "teacher_ce": teacher_ce,
    "total_variation": total_variation,
}
"""How far a student is from a teacher, by what a setting calls it."""


def distillation(name: str, student_NV: torch.Tensor, teacher_NV: torch.Tensor, temperature: float) -> torch.Tensor:
    """Sum over tokens of one of DIVERGENCES between a student's and a teacher's logits (N, V) at a temperature, float32.

    All but total_variation count T^2, so that their gradient is as large at every temperature (arXiv:1503.02531, Section 2).
    """
    both = ((logits_NV.float() / temperature).log_softmax(-1) for logits_NV in (student_NV, teacher_NV))
    value = DIVERGENCES[name](*both)
    return value if name == "total_variation" else temperature**2 * value


def domain_label(logits_NE: torch.Tensor, labels_N: torch.Tensor, base: int | None) -> torch.Tensor:
    """Sum over tokens of the cross-entropy of a router against the domain's own expert.

    GENERIC tokens are to go to the expert that is the base, or to all alike where none is.
    """
    experts = logits_NE.shape[-1]
    if base is not None:
        labels_N = torch.where(labels_N == GENERIC, base, labels_N)
    targets_NE = torch.nn.functional.one_hot(labels_N.clamp_min(0), experts).to(logits_NE.dtype)
    targets_NE[labels_N == GENERIC] = 1.0 / experts
    return -(targets_NE * logits_NE.log_softmax(-1)).sum()


def load_balance(logits_NE: torch.Tensor, top_k: int) -> torch.Tensor:
    """E sum_e f_e P_e, the share of tokens sent to an expert times its mean probability (Eq. 4, arXiv:2101.03961): 1 when both
    are spread evenly; times the number of tokens, so that it adds up.
    """
    count, experts = logits_NE.shape
    if count == 0:
        return logits_NE.sum()
    taken_NE = torch.zeros_like(logits_NE).scatter(-1, logits_NE.topk(top_k, dim=-1).indices, 1.0 / top_k)
    return count * experts * (taken_NE.mean(0) * logits_NE.softmax(-1).mean(0)).sum()


def z_loss(logits_NE: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of (log sum exp of the logits)^2 (Eq. 5, arXiv:2202.08906)."""
    return logits_NE.logsumexp(-1).square().sum()
