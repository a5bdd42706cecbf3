"""Which of llama.cpp's ways to cut a text into words is a tokenizer's? Found by what they do.

llama.cpp knows each by a name, and its converter finds that by a hash of what a published tokenizer does to a text: a tokenizer
with other tokens has another hash though it cuts alike. So where the hash is unknown, a model of nothing but the tokenizer is
loaded under one name after the other, until one cuts texts as the tokenizer does. Imported by convert_process.py alone.
"""

from __future__ import annotations

import inspect
import json
import re
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from modekit.files.read import UNREADABLE, read_json

TEXTS = (
    "The heart moves blood through the body. It beats about a hundred thousand times a day, and rests only between two beats.",
    "def area(width, height):\n    # two sides, 3.14 would be for circles\n    return width * height\n\n\nprint(area(12, 7))\n",
    "Das Gericht hat die Klage abgewiesen; die Kosten tr\u00e4gt der Kl\u00e4ger. L'appel est recevable, s'il est motiv\u00e9.",
    "Item 27:  4,096 kg at 19.95 \u2013 \u201cas is\u201d, we're told\n\n\tTotal\t81,715.20  (VAT 7%)\n",
)
"""By which llama.cpp is compared with transformers: prose, code, other languages, numbers and white space."""
CUT_TEXTS = (
    *TEXTS,
    "\n \n\n \t\t  3 33 333 3333 33333 3.3 3..3 I've I'LL 'RE DON'T ======= ''''```\"\"\" \u043d\u0435\u0449\u043e "
    "\u6211\u60f3\u5728apple\u5de5\u4f5c1314\u5929\uff5e \U0001f680 camelCase HTTPServer x_y\r\n  z",
)
"""With what ways to cut differ in: digits, cases, apostrophes, signs, scripts."""
_FIRST = ("gpt-2", "llama-bpe", "qwen2", "smollm")
_WIDTH = 32
_LONGEST = 64  # characters
_PLACE, _UNNAMED = "tokenizer.ggml.pre", "?"
_FILLING = "modekit.filling"


def is_asked_for(folder: Path) -> bool:
    """Whether a tokenizer is of the kind of which llama.cpp must know how it cuts: BPE over bytes."""
    with suppress(*UNREADABLE, KeyError, TypeError):
        model = read_json(folder / "tokenizer.json")["model"]
        return model["type"] == "BPE" and not model.get("byte_fallback")
    return False


def name_of(tokenizer: Any, folder: Path) -> str:
    """llama.cpp's name for how a tokenizer, which lies in a folder, cuts. Raises ValueError where it has none."""
    from conversion.base import TextModel

    by_hash = TextModel.get_vocab_base_pre
    with suppress(NotImplementedError):
        found: str = by_hash(None, tokenizer)
        return found
    expected = {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in CUT_TEXTS}
    known: dict[str, None] = dict.fromkeys((*_FIRST, *re.findall(r'res = "([^"]+)"', inspect.getsource(by_hash))))
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "tokenizer.gguf"
        _write(file, tokenizer, folder)
        content = file.read_bytes()
        for name in known:
            file.write_bytes(_named(content, name))
            with suppress(RuntimeError, OSError):  # this llama.cpp does not know the name
                if dict(_cut(file, expected)) == expected:
                    return name
    raise ValueError("llama.cpp has no pre-tokenizer that cuts text as this tokenizer does")


def _write(file: Path, tokenizer: Any, folder: Path) -> None:
    """A model of one empty layer, with the tokenizer."""
    import gguf
    from conversion.base import TextModel

    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(_WIDTH)
    writer.add_embedding_length(_WIDTH)
    writer.add_feed_forward_length(_WIDTH)
    writer.add_block_count(1)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    model = TextModel.__new__(TextModel)
    model.dir_model, model.hparams, model.gguf_writer = folder, {"vocab_size": len(tokenizer)}, writer
    model.get_vocab_base_pre = lambda _: _UNNAMED
    model._set_vocab_gpt2()
    writer.add_string(_FILLING, " " * _LONGEST)
    square = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes = {"token_embd": (len(tokenizer), _WIDTH), "output_norm": (_WIDTH,)}
    shapes |= {f"blk.0.{name}": (_WIDTH,) for name in ("attn_norm", "ffn_norm")}
    shapes |= {f"blk.0.{name}": (_WIDTH, _WIDTH) for name in square}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float16 if len(shape) > 1 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _named(content: bytes, name: str) -> bytes:
    """The file with a name, and so much less filling that all other bytes stay where they are."""
    filling = " " * _LONGEST
    for key, before, after in ((_PLACE, _UNNAMED, name), (_FILLING, filling, filling[len(name) - len(_UNNAMED) :])):
        content = content.replace(_string(key, before), _string(key, after), 1)
    return content


def _string(key: str, value: str) -> bytes:
    """A key and its value as GGUF has them: 8 is the type of strings."""
    return key.encode() + (8).to_bytes(4, "little") + len(value).to_bytes(8, "little") + value.encode()


def _cut(file: Path, texts: Mapping[str, object]) -> Iterator[tuple[str, list[int]]]:
    """Each text with its tokens in llama.cpp. Raises RuntimeError where it cannot load the file."""
    from xllamacpp import CommonParams, Server

    params = CommonParams()
    params.model.path = str(file)
    params.hostnames, params.port, params.n_parallel, params.n_ctx, params.warmup = ["127.0.0.1"], 0, 1, _WIDTH, False
    server = Server(params)
    ask = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
    for text in texts:
        asked = json.dumps({"content": text, "add_special": False, "parse_special": True}).encode()
        request = urllib.request.Request(f"{server.listening_address}/tokenize", asked, {"Content-Type": "application/json"})
        with ask(request) as answer:
            yield text, json.load(answer)["tokens"]
