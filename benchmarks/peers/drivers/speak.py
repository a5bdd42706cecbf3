"""Scores of a model through pipes, for models that only their package opens; imported by drivers, in their environments."""

import os
import sys

import numpy
import torch


def serve(load) -> None:
    """Read a length and token ids, write the size of the vocabulary and the scores, until the pipe closes."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what packages print goes to the standard error
    model = load().eval()
    while head := sys.stdin.buffer.read(4):
        ids = numpy.frombuffer(sys.stdin.buffer.read(8 * int.from_bytes(head, "little")), "<i8")
        with torch.inference_mode():
            scores = model(input_ids=torch.from_numpy(ids.copy())[None], use_cache=False).logits[0].float().contiguous().numpy()
        out.write(scores.shape[1].to_bytes(4, "little") + scores.tobytes())
        out.flush()
