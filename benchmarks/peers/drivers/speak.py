"""Scores of a model through pipes, for models that only their package opens; imported by drivers, in their environments."""

import os
import sys

import numpy
import torch


def serve(load) -> None:
    """Read a length and token ids; write the size of the vocabulary and the scores to the pipe that is named last."""
    model = load().eval()
    with os.fdopen(int(sys.argv[-1]), "wb") as out:
        while head := sys.stdin.buffer.read(4):
            ids = torch.from_numpy(numpy.frombuffer(sys.stdin.buffer.read(8 * int.from_bytes(head, "little")), "<i8").copy())
            with torch.inference_mode():
                scores = model(input_ids=ids[None], use_cache=False).logits[0].float().contiguous().numpy()
            out.write(scores.shape[1].to_bytes(4, "little") + scores.tobytes())
            out.flush()
