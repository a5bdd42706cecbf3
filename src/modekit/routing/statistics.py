"""What a fit keeps of a domain: sums that add up, and a sample of the router's inputs.

One file per domain, so that a domain can be added or removed later without the others' text, and so that an
interrupted fit goes on with the next domain.

Shape legend: L layers, D hidden, N kept tokens.
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
class DomainStatistics:
    """Of one domain, x = what the router of each layer read while the domain's own expert was active.

    Attributes:
        tokens: how many x were seen; pads never count.
        sum_LD: sum of x, float64.
        outer_LDD: sum of x x^T (this is X'X), float64.
        negative_LD: mean x of the negative prompts, float64; zero when there are none.
        sample_LND: evenly spaced x, float16.
        source: what they were made from: settings and a digest of the text.
    """

    tokens: int
    sum_LD: torch.Tensor
    outer_LDD: torch.Tensor
    negative_LD: torch.Tensor
    sample_LND: torch.Tensor
    source: dict[str, Any]

    @property
    def mean_LD(self) -> torch.Tensor:
        """Mean of x, float64. This is X'Y of the domain's column, per token."""
        return self.sum_LD / self.tokens

    def save(self, path: Path) -> None:
        """Write atomically. X'X is symmetric: only its upper triangle is kept, in float32."""
        rows, columns = torch.triu_indices(self.outer_LDD.shape[1], self.outer_LDD.shape[2])
        tensors = {
            "sum": self.sum_LD.contiguous(),
            "outer_upper": self.outer_LDD[:, rows, columns].float().contiguous(),
            "negative": self.negative_LD.contiguous(),
            "sample": self.sample_LND.contiguous(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        # One metadata key: safetensors writes several in an order that differs from run to run.
        about = json.dumps({"tokens": self.tokens, "source": self.source}, sort_keys=True)
        try:
            save_file(tensors, partial, metadata={"about": about})
        except SafetensorError as error:  # what safetensors makes of an OSError
            raise OSError(str(error)) from None
        partial.replace(path)


def load_statistics(path: Path) -> DomainStatistics | None:
    """Read a domain's statistics; None when there are none. Raises CheckpointError when they are damaged."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["about"])
            sum_LD, upper = file.get_tensor("sum"), file.get_tensor("outer_upper")
            hidden = sum_LD.shape[1]
            rows, columns = torch.triu_indices(hidden, hidden)
            outer_LDD = torch.zeros((sum_LD.shape[0], hidden, hidden), dtype=torch.float64)
            outer_LDD[:, rows, columns] = upper.double()
            outer_LDD[:, columns, rows] = upper.double()
            return DomainStatistics(
                int(about["tokens"]), sum_LD, outer_LDD, file.get_tensor("negative"), file.get_tensor("sample"),
                about["source"],
            )  # fmt: skip
    except Exception as error:  # safetensors raises its own type, wrong shapes raise others
        raise CheckpointError(
            "the kept statistics are damaged", where=str(path), found=error,
            remedy="delete the file and run `modekit fit` with the text at hand",
        ) from None  # fmt: skip
