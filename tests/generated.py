"""What a mixture generates is what its full pass says, one text at a time or in a batch."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer

from modekit.loaded.load import load_model


def check_generation(folder: Path) -> None:
    """Under left padding, with and without beams; greedy tokens against the argmax of a pass without a cache."""
    model = load_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    texts = ["fever artery lesion", "licence"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    for beams in (1, 3):
        said = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams, "pad_token_id": 0, "eos_token_id": None}
        made = model.generate(**batch, **said)
        for row, text in enumerate(texts):
            alone = model.generate(**tokenizer([text], return_tensors="pt"), **said)
            assert made[row, -12:].tolist() == alone[0, -12:].tolist()
            if beams == 1:
                whole = model(input_ids=alone).logits[0, -13:-1].argmax(-1)
                assert whole.tolist() == alone[0, -12:].tolist()
