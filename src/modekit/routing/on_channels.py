"""A lexical router on the channels of a native checkpoint: evidence in the embedding, gates that read its average.

The channels of the average pass a norm before each gate, which divides them by the size of the stream there. By how much is
measured on a little text: the gate of a layer multiplies with the median, over tokens, of what the average is over what
arrives. docs/lexical.md has the equations.

Shape legend: B batch, S sequence, E experts, J averages, V vocabulary, N = J E channels, D width of what a router reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from modekit.architecture.modekit_router import causal_average
from modekit.checkpoint.evidence import evidence_columns, evidence_values
from modekit.checkpoint.record import RouterRecord
from modekit.loaded.shapes import expert_view
from modekit.planning.channels import Channels
from modekit.routing.evidence import Averaging
from modekit.routing.fitting import FittedRouter, Fitting
from modekit.routing.token_text import TokenText
from modekit.text.sequences import TokenSequence, make_batches

_MEASURED_TOKENS = 1_024
"""Of all domains together, on which the size of the stream is measured: a dense pass of a large model is not free."""


def gates_on_channels(
    fitting: Fitting, texts: Sequence[TokenText], table_EJV: torch.Tensor, averaging: Averaging, record: RouterRecord
) -> FittedRouter:
    """Gates and evidence of a native checkpoint that has channels for them."""
    channels, embedding = fitting.checkpoint.carrier
    table_VN = table_EJV.permute(2, 1, 0).flatten(1).contiguous().numpy()
    columns = evidence_columns(channels, embedding, table_VN)
    factors = _factors(fitting, channels, texts, table_VN, evidence_values(columns, embedding), averaging)
    gates = []
    for slot, factor in zip(fitting.checkpoint.slots, factors, strict=True):
        gate_ED = np.zeros(slot.shape, np.float32)
        for number in range(table_VN.shape[1]):
            gate_ED[number % channels.experts, channels.context.start + number] = factor
        gates.append(gate_ED)
    return FittedRouter(gates, record, columns)


def _factors(
    fitting: Fitting,
    channels: Channels,
    texts: Sequence[TokenText],
    table_VN: np.ndarray,
    evidence_VN: np.ndarray,
    averaging: Averaging,
) -> list[float]:
    """Per router, by what the channels that reach it must be multiplied to be the average of the table."""
    view = expert_view(fitting.checkpoint, run=fitting.run)
    fitting.run.begin("measure the stream", len(texts))
    routers = view.router_inputs()
    weight: torch.Tensor = view.model.get_input_embeddings().weight
    weight.data[:, channels.evidence] = torch.from_numpy(evidence_VN).to(weight)
    table = torch.from_numpy(table_VN)
    found: list[list[torch.Tensor]] = [[] for _ in routers]
    wanted_BSN: torch.Tensor | None = None
    mask_BS: torch.Tensor | None = None

    def hook(slot: int) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def read(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            assert wanted_BSN is not None and mask_BS is not None
            arrived_BSN = args[0].reshape(*wanted_BSN.shape[:2], -1)[..., channels.context].float().cpu()
            size = (wanted_BSN * wanted_BSN).sum(-1)
            ratio = size / (arrived_BSN * wanted_BSN).sum(-1)
            found[slot].append(ratio[mask_BS & (size > 0) & ratio.isfinite()])

        return read

    handles = [module.register_forward_pre_hook(hook(slot)) for slot, module in enumerate(routers)]
    try:
        with torch.inference_mode():
            for place, text in enumerate(texts):
                view.use_expert(place)
                for batch in make_batches(_beginning(text, max(16, _MEASURED_TOKENS // len(texts)))):
                    mask_BS = batch.mask
                    wanted_BSN = _averages(table[batch.input_ids], batch.mask, averaging, channels.experts)
                    view.model.model(
                        input_ids=batch.input_ids.to(view.model.device),
                        attention_mask=batch.mask.long().to(view.model.device),
                        use_cache=False,
                    )
                fitting.run.progress("measure the stream", place + 1, len(texts))
    finally:
        for handle in handles:
            handle.remove()
    return [float(torch.cat(each).median()) for each in found]


def _averages(values_BSN: torch.Tensor, mask_BS: torch.Tensor, averaging: Averaging, experts: int) -> torch.Tensor:
    parts = torch.split(values_BSN, experts, dim=-1)
    said = [causal_average(part, mask_BS.float(), decay, None)[0] for part, decay in zip(parts, averaging.decays, strict=True)]
    return torch.cat(said, dim=-1)


def _beginning(text: TokenText, most: int) -> list[TokenSequence]:
    taken: list[TokenSequence] = []
    tokens = 0
    for ids, _ in text.sequences():
        if tokens >= most:
            break
        taken.append(TokenSequence(tuple(ids[: most - tokens].tolist()), 0))
        tokens += len(taken[-1].ids)
    return taken
