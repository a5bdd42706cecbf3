"""A weight difference D (O, I) that is kept in a few bits per number: D = (code - (2^P - 1) / 2) step, a step per row.

The codes lie in planes of one bit, the lowest first, eight numbers of a row in a byte. They are unpacked where they are used:
of a linear map all of them in every pass, of an embedding the rows that are looked up.

Shape legend: B batch, S sequence, O and I width out and in (of an embedding O tokens), P bits, C bytes of a plane's row, X any.
"""

from __future__ import annotations

import torch
from torch import nn


class FewBits(nn.Module):
    """y = D x, or of an embedding y = D[x]."""

    codes: torch.Tensor

    def __init__(self, outputs: int, inputs: int, bits: int, *, looked_up: bool) -> None:
        super().__init__()
        self.inputs, self.looked_up = inputs, looked_up
        self.register_buffer("codes", torch.zeros(outputs, bits, -(-inputs // 8), dtype=torch.uint8))
        self.steps = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Of x (X, I), or of ids (X,), (X, O) or (X, I) in a dtype."""
        if self.looked_up:
            return self._rows(self.codes[x], self.steps[x].to(dtype))
        return nn.functional.linear(x, self._rows(self.codes, self.steps.to(x.dtype)))

    def _rows(self, codes_XPC: torch.Tensor, steps_X: torch.Tensor) -> torch.Tensor:
        """The numbers (X, I) that codes and steps stand for."""
        bits, places = codes_XPC.shape[-2], torch.arange(8, dtype=torch.uint8, device=codes_XPC.device)
        level_XI = torch.zeros((), dtype=torch.uint8, device=codes_XPC.device)
        for plane in range(bits):
            level_XI = level_XI + (((codes_XPC[..., plane, :, None] >> places) & 1) << plane)
        centred_XI: torch.Tensor = level_XI.flatten(-2)[..., : self.inputs].to(steps_X.dtype) - (2**bits - 1) / 2
        return centred_XI * steps_X[..., None]
