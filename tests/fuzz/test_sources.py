"""Whatever strangers write, what reads it before there is a checkpoint ends in a plan or in modekit's own error, soon.

Every target begins with a good file and opens the real door on hostile variants of it (tests/mutations.py). `make test` takes a
few hundred inputs of each, `make test-all` 23,800 together.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)

from adapter_folders import PREFIX, UP, write_adapter
from chatting import word_tokenizer
from conftest import SMALL, VOCAB, Workshop, character_tokenizer, save, tiny_model
from modekit.building.preview import memory_of
from modekit.errors import ModekitError, SourceError
from modekit.planning.make import make_plan
from modekit.planning.reuse import digest_of
from modekit.recipes.read import load_recipe, parse_recipe
from modekit.sources.contents import OpenFiles, read_header
from modekit.sources.families import FAMILIES
from modekit.sources.source import ModelSource, open_source
from modekit.text.documents import read_documents
from modekit.text.sequences import encode
from mutations import VALUES, Raw, hostile_bytes, hostile_json, inputs, limited, written
from pair_models import PAIR_FAMILIES
from quantised import FORMS, quantise
from wrapped_models import WRAPPED, wrapped_config

RANDOM = {"router": {"fit": "random"}}
MOST_TEXT = 20_000
"""Characters of any message."""
QUICK, SLOW = 100, 1_200
TARGETS = [
    "headers",
    "configs",
    "families",
    "wrappers",
    "indexes",
    "packed",
    "adapters",
    "recipes",
    "tokenizers",
    "vocabularies",
    "texts",
    "tables",
]


def write_headers(folder: Path, model_type: str, **overrides: Any) -> None:
    """A model of zeros without their room on disk: config, header, and a file of that length."""
    pair = model_type in PAIR_FAMILIES
    sizes = PAIR_FAMILIES[model_type] if pair else SMALL
    with torch.device("meta"):
        kind = AutoModelForSeq2SeqLM if pair else AutoModelForCausalLM
        model = kind.from_config(AutoConfig.for_model(model_type, **{**sizes, **overrides}), dtype=torch.float32)
    write_model(folder, model)


def write_model(folder: Path, model: PreTrainedModel) -> None:
    """The same of any model; its tensors may be on no device."""
    header: dict[str, Any] = {}
    position = 0
    skipped = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    for name, tensor in model.state_dict().items():
        if name not in skipped and not name.endswith("coder.embed_tokens.weight"):
            stop = position + tensor.numel() * 4
            header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [position, stop]}
            position = stop
    folder.mkdir()
    model.config.save_pretrained(folder)
    write_weights(folder / "model.safetensors", json.dumps(header).encode(), position)


def write_weights(path: Path, header: bytes, data: int) -> None:
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        stream.truncate(8 + len(header) + max(data, 0))


def header_of(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length])


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A base, an expert and an adapter of few and small tensors, and texts."""
    root = tmp_path_factory.mktemp("fuzz")
    for name in ("base", "law"):
        write_headers(root / name, "llama", num_hidden_layers=2)
        character_tokenizer().save_pretrained(root / name)
    write_adapter(root / "code", {name: each for name, each in UP.items() if ".2." not in name})
    (root / "text").mkdir()
    experts = [{"name": "law", "model": "./law"}, {"name": "code", "adapter": "./code"}]
    return Workshop(root, {"base_model": "./base", "experts": experts, "mixture": RANDOM})


def refused_or_done(door: Callable[[], object]) -> bool:
    """Open a door under limits; it must do its work, or refuse in a short message that can be printed."""
    with limited():
        try:
            door()
        except ModekitError as error:
            message = str(error)
            assert len(message) < MOST_TEXT
            message.encode()
            assert "\x1b" not in message
            return False
    return True


class Counted:
    """How many inputs a target has seen, of which how many were refused: both must happen, else the test is none."""

    def __init__(self) -> None:
        self.done = self.refused = 0

    def saw(self, is_done: bool) -> None:
        self.done += is_done
        self.refused += not is_done

    def check(self, count: int) -> None:
        assert self.done + self.refused >= count * 0.95, (self.done, self.refused)
        assert self.done and self.refused


@pytest.mark.parametrize("count", [QUICK, pytest.param(SLOW, marks=pytest.mark.slow)])
@pytest.mark.parametrize("target", TARGETS)
def test_only_own_errors_come_out(bench: Workshop, target: str, count: int, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(bench.root, root)
    strategy, door = globals()[f"fuzz_{target}"](root, bench.recipe)
    counted = Counted()

    @inputs(count)
    @given(strategy)
    def run(content: Any) -> None:
        counted.saw(refused_or_done(lambda: door(content)))

    run()
    counted.check(count)


Target = tuple[st.SearchStrategy[Any], Callable[[Any], object]]


def planned(root: Path, recipe: dict[str, Any]) -> object:
    plan = make_plan(parse_recipe(recipe), root)
    return digest_of(plan), memory_of(plan), plan.parameters(), json.dumps(dict(plan.config))


def fuzz_headers(root: Path, recipe: dict[str, Any]) -> Target:
    """Of weights: what is accepted here, the safetensors library accepts, too."""
    path = root / "law" / "model.safetensors"
    header, size = header_of(path), path.stat().st_size
    data = size - 8 - len(json.dumps(header).encode())
    small, position = {}, 0
    for name in sorted(header)[:3]:
        begin, end = header[name]["data_offsets"]
        small[name] = {**header[name], "data_offsets": [position, position + end - begin]}
        position += end - begin
    lengths = st.sampled_from([0] * 9 + [-1, 1, 8])
    metadata = st.sampled_from(
        [{}] * 5 + [{"__metadata__": {"format": "pt"}}, {"__metadata__": {"a": 1}}, {"__metadata__": None}]
    )
    text = metadata.flatmap(
        lambda more: st.one_of(
            st.just(json.dumps({**header, **more})), hostile_json({**header, **more}), hostile_json({**small, **more}, most=2)
        )
    )

    def door(drawn: tuple[bytes, int, bool]) -> object:
        content, more, is_small = drawn
        write_weights(path, content, (position if is_small else data) + more)
        try:
            tensors = read_header(path, where="law")
        except SourceError:
            return planned(root, recipe)
        with safe_open(path, "np") as opened:
            assert set(opened.keys()) == set(tensors)
        return planned(root, recipe)

    return st.tuples(hostile_bytes(text), lengths, st.booleans()), door


def fuzz_configs(root: Path, recipe: dict[str, Any]) -> Target:
    """Of base and expert alike, so that what both say is not refused as a difference."""
    config = json.loads((root / "base" / "config.json").read_text())
    config |= {"rope_scaling": None, "layer_types": None, "head_dim": 8, "sliding_window": None}
    more = {key: value for key, value in config.items() if key not in {"architectures", "transformers_version", "dtype"}}

    def door(content: bytes) -> object:
        for name in ("base", "law"):
            (root / name / "config.json").write_bytes(content)
        return planned(root, recipe)

    return hostile_bytes(hostile_json(more)), door


def fuzz_families(root: Path, recipe: dict[str, Any]) -> Target:
    """A config of every family, as native and as modekit mixture."""
    configs = {}
    for family in FAMILIES:
        if not family.variant:
            write_headers(root / family.model_type, family.model_type, **({} if family.pair else {"head_dim": 8}))
        configs[family.model_type] = json.loads((root / family.model_type / "config.json").read_text())
    kinds = st.sampled_from(sorted(configs))
    strategy = kinds.flatmap(
        lambda kind: st.tuples(st.just(kind), hostile_bytes(hostile_json(configs[kind])), st.sampled_from(["auto", "plain"]))
    )

    def door(drawn: tuple[str, bytes, str]) -> object:
        kind, content, form = drawn
        (root / kind / "config.json").write_bytes(content)
        experts = [{"name": "one", "model": "base"}, {"name": "two", "model": f"./{kind}"}]
        return planned(root, {"base_model": f"./{kind}", "experts": experts, "mixture": RANDOM, "output": {"format": form}})

    return strategy, door


def fuzz_wrappers(root: Path, _: dict[str, Any]) -> Target:
    """Settings within settings that lie, of base and expert alike or of one, and names of a language model and of others."""
    configs, headers, sizes = {}, {}, {}
    for case in WRAPPED:
        with torch.device("meta"):
            write_model(root / case, AutoModelForImageTextToText.from_config(wrapped_config(case), dtype=torch.float32))
        shutil.copytree(root / case, root / f"{case} expert")
        configs[case] = json.loads((root / case / "config.json").read_text())
        headers[case] = header_of(root / case / "model.safetensors")
        sizes[case] = max(entry["data_offsets"][1] for entry in headers[case].values())

    @st.composite
    def drawn(draw: st.DrawFn) -> tuple[str, bytes, bytes, bool]:
        case = draw(st.sampled_from(sorted(configs)))
        text = configs[case]["text_config"]
        nested = hostile_json(text).map(lambda inner: json.dumps(configs[case]).replace(json.dumps(text), inner))
        config = draw(hostile_bytes(st.one_of(nested, hostile_json(configs[case]))))
        few = {name: headers[case][name] for name in draw(st.lists(st.sampled_from(sorted(headers[case])), max_size=4))}
        others = {f"{draw(st.sampled_from(_STRANGE))}{name.rpartition('language_model.')[2]}": few[name] for name in few}
        header = json.dumps({**headers[case], **others})
        return case, config, header.encode(), draw(st.booleans())

    def door(drawn: tuple[str, bytes, bytes, bool]) -> object:
        case, config, header, both = drawn
        for folder in (root / case, root / f"{case} expert")[not both :]:
            (folder / "config.json").write_bytes(config)
        write_weights(root / f"{case} expert" / "model.safetensors", header, sizes[case])
        experts = [{"name": "one", "model": f"./{case} expert"}]
        try:
            return planned(root, {"base_model": f"./{case}", "experts": experts, "mixture": RANDOM})
        finally:
            (root / case / "config.json").write_text(json.dumps(configs[case]))

    return drawn(), door


_STRANGE = ["model.", "language_model.model.", "model.language_model.", "", "model.visual.", "language_model."]


def fuzz_indexes(root: Path, _: dict[str, Any]) -> Target:
    """The index of shards, and a specialist's record."""
    shard = (root / "law" / "model.safetensors").rename(root / "law" / "model-00001-of-00001.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(list(header_of(shard))[:4], shard.name)}

    def door(content: bytes) -> object:
        (root / "law" / "model.safetensors.index.json").write_bytes(content)
        (root / "law" / "specialist.json").write_bytes(content)
        return open_source("law", "./law", root / "law")

    return hostile_bytes(hostile_json(index)), door


def fuzz_packed(root: Path, _: dict[str, Any]) -> Target:
    """Settings and headers of every quantised form; what is opened is read, too."""
    save(tiny_model(num_hidden_layers=1, intermediate_size=64), root / "plain")
    configs, headers, data = {}, {}, {}
    for number, form in enumerate(FORMS):
        quantise(root / "plain", root / str(number), form)
        content = (root / str(number) / "model.safetensors").read_bytes()
        length = int.from_bytes(content[:8], "little")
        headers[form], data[form] = json.loads(content[8 : 8 + length]), content[8 + length :]
        configs[form] = json.loads((root / str(number) / "config.json").read_text())["quantization_config"]
    plain = json.loads((root / "plain" / "config.json").read_text())

    def variants(form: str) -> st.SearchStrategy[Any]:
        good, header = json.dumps(configs[form]), json.dumps(headers[form])
        hostile = st.one_of(
            st.tuples(hostile_json(configs[form]), st.just(header)),
            st.tuples(st.just(good), hostile_json(headers[form], most=2)),
            st.tuples(st.just(good), st.just(header)),
        )
        return st.tuples(st.just(form), hostile, st.binary(max_size=40), st.integers(0, len(data[form]) - 1))

    def door(drawn: tuple[str, tuple[str, str], bytes, int]) -> object:
        form, (said, header), damage, place = drawn
        folder = root / "plain"
        (folder / "config.json").write_text(f'{json.dumps(plain)[:-1]}, "quantization_config": {said}}}')
        content = data[form][:place] + damage + data[form][place + len(damage) :]
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header.encode())) + header.encode() + content)
        return read_all(open_source("m", "m", folder))

    return st.sampled_from(list(FORMS)).flatmap(variants), door


def read_all(source: ModelSource) -> int:
    """Bytes of all tensors."""
    with OpenFiles() as opened:
        return sum(len(chunk) for ref in source.tensors.values() for chunk in opened.chunks(ref))


def fuzz_adapters(root: Path, recipe: dict[str, Any]) -> Target:
    """Config and header."""
    folder = root / "code"
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {
        "exclude_modules": None,
        "modules_to_save": None,
        "rank_pattern": {"up_proj": 4},
        "alpha_pattern": {r"layers\.1\..*": 8},
        "layers_to_transform": None,
        "layers_pattern": None,
        "use_rslora": False,
        "bias": "none",
        "init_lora_weights": True,
    }
    header = header_of(folder / "adapter_model.safetensors")
    header.pop("__metadata__", None)
    data = max(entry["data_offsets"][1] for entry in header.values())
    configs = hostile_bytes(hostile_json(config, most=4))
    headers = st.one_of(st.just(json.dumps(header).encode()), hostile_bytes(hostile_json(header)))

    def door(drawn: tuple[bytes, bytes]) -> object:
        (folder / "adapter_config.json").write_bytes(drawn[0])
        write_weights(folder / "adapter_model.safetensors", drawn[1], data)
        return planned(root, recipe)

    return st.tuples(configs, headers), door


TAGS = ("int x", "bool x", "float x", "timestamp x", "binary x", "null x", "str 3", "int ''", "map [a]", "omap [a]", "set {a}")
NUMBERS = "2001-99-99 2001-01-01 0b1 0o17 017 1:99:99 1_000 1e400 .inf .nan -.inf"
YAML = [
    *(f"!!{tag}" for tag in TAGS),
    *NUMBERS.split(),
    *"-|%@~\t",
    "!!python/object/apply:os.system [x]",
    "*a",
    "&a [*a]",
    "0x" + "f" * 9_000,
    '"\\ud800"',
    "? [a]\n: b",
    "<<: {a: b}",
    "{<<: [{a: b}, {c: d}]}",
    "&b {<<: *b}",
    "''",
    "[" * 400,
    "{[a]: b}",
]


def fuzz_recipes(root: Path, recipe: dict[str, Any]) -> Target:
    """YAML, some of it that only YAML says; recipes with most of the keys that there are."""
    full = {
        **recipe,
        "eval": {"law": ["./text/law.jsonl"]},
        "output": {"format": "modekit", "dtype": "source", "shard_size": "5GB"},
        "mixture": {
            "method": "routing",
            "top_k": 2,
            "modules": ["mlp"],
            "layers": [0, "0-1"],
            "backbone": {"method": "ties", "scale": 1.0},
            "always_on": {"expert": "law", "weight": 0.5},
            "router": {"fit": "random", "seed": 1, "granularity": "context", "decay": [0.5]},
        },
    }
    weights = {**recipe, "mixture": {"method": "linear", "weights": {"law": 1, "code": 2.5}, "backbone": "base"}}
    only_yaml = st.booleans().flatmap(lambda only: st.sampled_from([Raw(text) for text in YAML]) if only else VALUES)

    @st.composite
    def text(draw: st.DrawFn) -> str:
        good = draw(st.sampled_from([full, weights, recipe]))
        kind = draw(st.sampled_from(["json", "yaml", "yaml", "yaml", "good"]))
        if kind == "json":
            return draw(hostile_json(good))
        lines = yaml.safe_dump(good).split("\n")
        for _ in range(0 if kind == "good" else draw(st.integers(1, 2))):
            place = draw(st.integers(0, len(lines) - 1))
            key, colon, _old = lines[place].partition(":")
            lines[place] = f"{key}{colon} {written(draw(only_yaml))}" if colon else written(draw(only_yaml))
        return "\n".join(lines)

    def door(content: bytes) -> object:
        (root / "recipe.yaml").write_bytes(content)
        return planned(root, load_recipe(root / "recipe.yaml").model_dump(mode="json", by_alias=True, exclude_unset=True))

    return hostile_bytes(text()), door


def fuzz_tokenizers(root: Path, recipe: dict[str, Any]) -> Target:
    """Of the base, whose ids must fit and whose files are copied, and of the expert, whose must be the same."""
    tokenizer = json.loads((root / "base" / "tokenizer.json").read_text())
    vocab = dict(list(tokenizer["model"]["vocab"].items())[:5])
    bpe = {**tokenizer, "model": {"type": "BPE", "vocab": vocab, "merges": ["a b", ["c", "d"]]}}
    unigram = {**tokenizer, "model": {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]]}}
    texts = hostile_bytes(st.one_of(*(hostile_json(each) for each in (bpe, unigram, tokenizer, vocab))))

    def door(drawn: tuple[bytes, str, bool]) -> object:
        content, name, both = drawn
        for folder in ("base", "law"):
            for old in ("tokenizer.json", "vocab.json"):
                (root / folder / old).unlink(missing_ok=True)
        for folder in ("base", "law") if both else ("base",):
            (root / folder / name).write_bytes(content)
        return planned(root, recipe)

    return st.tuples(texts, st.sampled_from(["tokenizer.json", "vocab.json"]), st.booleans()), door


def fuzz_vocabularies(root: Path, recipe: dict[str, Any]) -> Target:
    """Of an expert that has more tokens than the base, and of an adapter that saves them."""
    shutil.rmtree(root / "law")
    write_headers(root / "law", "llama", num_hidden_layers=2, vocab_size=VOCAB + 2)
    said = json.loads((root / "base" / "tokenizer.json").read_text())
    few = {**said["model"], "vocab": {"<pad>": 0, "<s>": 1}, "unk_token": "<pad>"}
    (root / "base" / "tokenizer.json").write_text(json.dumps({**said, "model": few, "added_tokens": []}))
    more = {**few, "vocab": {**few["vocab"], "<|im_start|>": 96}}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    added = {**said, "model": more, "added_tokens": [{"id": 97, "content": "<|im_end|>", **flags}]}
    rows = np.zeros((VOCAB, SMALL["hidden_size"]), np.float32)
    saved = f"{PREFIX.removesuffix('layers.')}embed_tokens.weight"
    write_adapter(root / "code", {**{name: each for name, each in UP.items() if ".2." not in name}, saved: rows})
    config = json.loads((root / "code" / "adapter_config.json").read_text())
    texts = st.one_of(hostile_json(added, most=2), hostile_json({"<|im_start|>": 96, "<|im_end|>": 97}))
    indices = hostile_json({**config, "modules_to_save": ["embed_tokens"]}, most=1)

    def door(drawn: tuple[bytes, str, bytes]) -> object:
        content, name, settings = drawn
        for old in ("tokenizer.json", "vocab.json", "added_tokens.json", "generation_config.json"):
            (root / "law" / old).unlink(missing_ok=True)
        (root / "law" / name).write_bytes(content)
        (root / "code" / "adapter_config.json").write_bytes(settings)
        return planned(root, recipe)

    names = st.sampled_from(["tokenizer.json", "vocab.json", "added_tokens.json", "generation_config.json"])
    return st.tuples(hostile_bytes(texts), names, hostile_bytes(indices)), door


def fuzz_texts(root: Path, _: dict[str, Any]) -> Target:
    """Records and plain text, read and cut into sequences."""
    tokenizer = word_tokenizer()
    said = [{"role": "user", "content": "what is fever"}, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]
    records = [
        hostile_json({"text": "some words", "meta": {"id": 1}}),
        hostile_json({"messages": said, "id": 1}),
        hostile_json({"source": "some words", "target": "andere"}),
        hostile_json({"translation": {"en": "words", "de": "Worte"}}),
        hostile_json({"instruction": "what is fever", "input": "", "output": "a thing"}),
        hostile_json({"conversations": [{"from": "human", "value": "what is fever"}, {"from": "gpt", "value": "a thing"}]}),
    ]
    lines = st.lists(st.one_of(*records, st.text(max_size=60)), min_size=1, max_size=4)
    text = lines.map("\n".join)

    def door(drawn: tuple[bytes, str]) -> object:
        path = root / "text" / f"law{drawn[1]}"
        path.write_bytes(drawn[0])
        documents = read_documents([f"./text/{path.name}"], root=root, where="law")
        return encode(tokenizer, documents, max_tokens=64, sequence_length=16)

    return st.tuples(hostile_bytes(text), st.sampled_from([".jsonl", ".txt", ".md", ".parquet"])), door


def fuzz_tables(root: Path, _: dict[str, Any]) -> Target:
    """Values that are separated."""
    cells = ["text", "prompt", "completion", "id", '"', '""', '"a, b"', ",", ";", "\t", "\n", "\r\n", "\r", "word", "", "é"]
    whole = st.lists(st.sampled_from(cells), max_size=40).map("".join)
    rows = st.lists(st.lists(st.sampled_from(cells), max_size=5).map(",".join), min_size=1, max_size=8).map("\n".join)
    text = st.one_of(whole, rows.map(lambda body: f"text,id\n{body}"), rows.map(lambda body: f"prompt,completion\n{body}"))

    def door(drawn: tuple[bytes, str]) -> object:
        path = root / "text" / f"law{drawn[1]}"
        path.write_bytes(drawn[0])
        return read_documents([f"./text/{path.name}"], root=root, where="law")

    return st.tuples(hostile_bytes(text), st.sampled_from([".csv", ".tsv"])), door


@pytest.fixture(scope="module", autouse=True)
def warm(bench: Workshop) -> Iterator[None]:
    """What is imported once is not counted as what an input costs."""
    planned(bench.root, bench.recipe)
    (bench.root / "warm").mkdir()
    parquet.write_table(pa.table({"text": ["a document " * 100_000]}), bench.root / "warm" / "law.parquet")
    read_documents(["warm"], root=bench.root, where="warm")
    yield
