"""Run as a process of its own: texts that vLLM writes greedily, and the log-probability of each token."""

from __future__ import annotations

import json
import sys
from typing import Any


def main() -> None:
    """Settings as JSON on the standard input; the answer is the last line of the standard output."""
    wanted: dict[str, Any] = json.loads(sys.stdin.read())
    from vllm import LLM, SamplingParams

    model = LLM(**{"dtype": "float32", **wanted["settings"]})
    sampling = SamplingParams(temperature=0, max_tokens=wanted["count"], ignore_eos=True, logprobs=1)
    turns = []
    for _ in range(wanted["turns"]):
        prompts = [{"prompt_token_ids": ids} for ids in wanted["prompts"]]
        answers = model.generate(prompts, sampling, use_tqdm=False)
        turns.append(
            {
                "shared": [each.num_cached_tokens for each in answers],
                "answers": [
                    (
                        list(made.token_ids),
                        [step[token].logprob for token, step in zip(made.token_ids, made.logprobs, strict=True)],
                    )
                    for made in (each.outputs[0] for each in answers)
                ],
            }
        )
    sys.stdout.write("\n" + json.dumps(turns) + "\n")


if __name__ == "__main__":
    main()
