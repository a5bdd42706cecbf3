"""What a fit keeps of a domain: sums that add up, and a sample of the router's inputs.

One file per domain, so that a domain can be added or removed later without the others' text, and so that an
interrupted fit goes on with the next domain.

Shape legend: D width of what a gate takes (its parts side by side), N kept tokens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from modekit.errors import CheckpointError


@dataclass(frozen=True)
class SlotStatistics:
    """Of one router, x = what its gate took while the domain's own expert was active.

    Attributes:
        sum_D: sum of x, float64.
        outer_DD: sum of x x^T (this is X'X), float64.
        negative_D: mean x of the negative prompts, float64; zero when there are none.
        sample_ND: evenly spaced x, float16.
    """

    sum_D: torch.Tensor
    outer_DD: torch.Tensor
    negative_D: torch.Tensor
    sample_ND: torch.Tensor


@dataclass(frozen=True)
class DomainStatistics:
    """Of one domain, for every router.

    Attributes:
        tokens: how many x were seen; pads never count.
        slots: statistics in the order of the checkpoint's routers.
        source: what they were made from: settings and a digest of the text.
    """

    tokens: int
    slots: tuple[SlotStatistics, ...]
    source: dict[str, Any]

    def mean_D(self, slot: int) -> torch.Tensor:
        """Mean of x, float64. This is X'Y of the domain's column, per token."""
        return self.slots[slot].sum_D / self.tokens

    def save(self, path: Path) -> None:
        """Write atomically. X'X is symmetric: only its upper triangle is kept, in float32."""
        tensors = {}
        for number, slot in enumerate(self.slots):
            rows, columns = torch.triu_indices(*slot.outer_DD.shape)
            tensors[f"{number}.sum"] = slot.sum_D.contiguous()
            tensors[f"{number}.outer_upper"] = slot.outer_DD[rows, columns].float().contiguous()
            tensors[f"{number}.negative"] = slot.negative_D.contiguous()
            tensors[f"{number}.sample"] = slot.sample_ND.contiguous()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        # One metadata key: safetensors writes several in an order that differs from run to run.
        about = json.dumps({"tokens": self.tokens, "slots": len(self.slots), "source": self.source}, sort_keys=True)
        try:
            save_file(tensors, partial, metadata={"about": about})
        except SafetensorError as error:  # what safetensors makes of an OSError
            raise OSError(str(error)) from None
        partial.replace(path)


def load_statistics(path: Path) -> DomainStatistics | None:
    """Read a domain's statistics; None when there are none, or only an n-gram router's. Raises CheckpointError when damaged."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["about"])
            if "slots" not in about:  # of an n-gram router
                return None
            slots = []
            for number in range(int(about["slots"])):
                sum_D, upper = file.get_tensor(f"{number}.sum"), file.get_tensor(f"{number}.outer_upper").double()
                rows, columns = torch.triu_indices(len(sum_D), len(sum_D))
                outer_DD = torch.zeros((len(sum_D), len(sum_D)), dtype=torch.float64)
                outer_DD[rows, columns] = upper
                outer_DD[columns, rows] = upper
                negative_D, sample_ND = file.get_tensor(f"{number}.negative"), file.get_tensor(f"{number}.sample")
                slots.append(SlotStatistics(sum_D, outer_DD, negative_D, sample_ND))
            return DomainStatistics(int(about["tokens"]), tuple(slots), about["source"])
    except Exception as error:  # safetensors raises its own type, wrong shapes raise others
        raise CheckpointError(
            "the kept statistics are damaged", where=str(path), found=error,
            remedy="delete the file and run `modekit fit` with the text at hand",
        ) from None  # fmt: skip
