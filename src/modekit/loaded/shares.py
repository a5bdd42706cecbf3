"""The gradients of a batch, in threads that each take a share of its rows.

A small model's products are too short to keep several cores busy with one of them at a time, and cores that wait for each
other after every product wait for whatever else the machine does. Shares wait for each other once per step, and each runs its
products in its own thread: measured beside other work, half the processor time and less than half the wall time of two
threads per product.

Shape legend: B batch, S sequence, T target of a pair, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import torch
from transformers import PreTrainedModel

from modekit.loaded.heads import head_of
from modekit.loaded.passes import inputs_of
from modekit.text.sequences import NO_LABEL, Batch


class Shares:
    """`count` threads over one model's weights, each with its part of torch's threads; 1 is the calling thread alone.

    Gradients are added in the order of the shares, so that the result does not depend on which is done first. Use in `with`.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._torch_threads = torch.get_num_threads()
        per_share = max(1, self._torch_threads // count)
        self._threads = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(per_share,))
        if count > 1:
            torch.set_num_threads(per_share)  # of this thread, too: threads that wait for work would take it from the shares

    def __enter__(self) -> Shares:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown()
        torch.set_num_threads(self._torch_threads)

    def run(self, jobs: Iterable[Callable[[], object]]) -> None:
        """Run jobs, which must not share what they write, and wait for all."""
        for _ in self._threads.map(_call, jobs) if self.count > 1 else map(_call, jobs):
            pass

    def gradients(self, loss: NextTokenLoss, parameters: Sequence[torch.nn.Parameter], batch: Batch) -> float:
        """The mean loss of a batch; unless it is not finite, the parameters have its gradients after."""
        if self.count == 1:
            whole = loss(batch, "mean")
            if torch.isfinite(whole):
                whole.backward()  # type: ignore[no-untyped-call]
            return float(whole.detach())
        tokens = batch.scored

        def share(place: int) -> tuple[float, tuple[torch.Tensor, ...]]:
            # Neighbouring rows are of similar length: every share takes one of them.
            part = loss(batch.share(place, self.count), "sum") / tokens
            return float(part.detach()), torch.autograd.grad(part, parameters, materialize_grads=True)

        found = list(self._threads.map(share, range(min(self.count, len(batch.rows)))))
        for place, parameter in enumerate(parameters):
            parameter.grad = found[0][1][place]
            for _, gradients in found[1:]:
                parameter.grad += gradients[place]
        return sum(part for part, _ in found)


class NextTokenLoss:
    """Cross-entropy of a batch's next tokens, or of its targets; pads are not predicted, and those of a causal model never
    reach the head.

    `pads_named`: whether attention is told which tokens are pads. On the right of a text they reach no real token of a causal
    model, and without them attention may skip what lies ahead. Encoders read to the right, too, and always are told.
    """

    def __init__(self, model: PreTrainedModel, *, bfloat16: bool, pads_named: bool) -> None:
        self._model = model
        self._head = head_of(model)
        self._bfloat16 = bfloat16
        self._pads_named = pads_named

    def __call__(self, batch: Batch, reduction: Literal["mean", "sum"]) -> torch.Tensor:
        """Loss in nats, over all predicted tokens."""
        inputs = inputs_of(self._model, batch)
        labels = batch.labels.to(self._model.device)
        keep = labels != NO_LABEL
        # No cache of converted weights: it is one for all threads, and no weight is used twice.
        with torch.autocast(self._model.device.type, torch.bfloat16, enabled=self._bfloat16, cache_enabled=False):
            if batch.target is not None:  # some families scale or shift between decoder and logits
                logits = self._model(**inputs, use_cache=False).logits[keep]
            else:
                named = inputs["attention_mask"] if self._pads_named else None
                hidden = self._model.model(
                    input_ids=inputs["input_ids"], attention_mask=named, use_cache=False
                ).last_hidden_state
                logits = self._head(hidden[:, :-1][keep])  # (real tokens, V)
        return torch.nn.functional.cross_entropy(logits.float(), labels[keep], reduction=reduction)


def _call(job: Callable[[], object]) -> None:
    job()
