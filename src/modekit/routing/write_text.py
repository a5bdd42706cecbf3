"""`text: self`: experts without text write some, which the fit then reads like any other.

An expert begins at the beginning of a text and, where its tokenizer has a chat template, inside it: as a user, and then it
answers. It writes against the base (loaded/sampling.py), a third of its documents as it is; a base that is an expert writes all
as it is. Every expert then reads the same texts, which the base wrote: what it expects there more often than the others sets it
apart, without the luck of what was sampled. In memory are the base and one expert.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modekit.loaded.experts import load_expert
from modekit.loaded.load import load_model, load_tokenizer
from modekit.loaded.sampling import Script, Writer, read_texts, rows_at_once
from modekit.recipes.recipe import Recipe
from modekit.run import DETAIL, ProgressCount, Run
from modekit.sources.adapter import CONFIG_FILE, is_adapter, read_adapter_config
from modekit.sources.digests import known_blake3, settings_digest
from modekit.sources.source import ModelSource, read_config
from modekit.sources.tokenizer import has_tokenizer
from modekit.text.chat import ChatTemplate, chat_template_of
from modekit.text.document import Conversation, Document, message_of
from modekit.text.records import TextRecord
from modekit.text.written import (
    AGAINST,
    ANSWER_TOKENS,
    BEGUN,
    BEGUN_TOKENS,
    CHATS,
    DOCUMENT_TOKENS,
    QUESTION_TOKENS,
    WAY,
    Made,
    documents_of,
    keep_written,
    written_file,
    written_so_far,
)

_SEPARATOR = "<|endoftext|>"
"""Between the texts that a model was trained on, where its tokenizer puts nothing before one."""


def write_texts(recipe: Recipe, root: Path, sources: Sequence[ModelSource], run: Run, *, but: Collection[str] = ()) -> None:
    """Let each expert that is to have text of its own write it, where it is not there yet; `sources`: of base and experts.

    What a kill left is gone on with. `but`: experts that need none. Raises SourceError for models that cannot be loaded, or
    compute no finite numbers, and OutputError.
    """
    base, seed = sources[0], recipe.mixture.router.seed
    writing = [place for place, expert in enumerate(recipe.experts) if expert.writes_text and expert.name not in but]
    authors = [author for place in writing if (author := _author(recipe, place, root, sources, run)).left]
    if not authors:
        return
    run.begin("write text")
    common = documents_of(base.parameters)
    count = ProgressCount(run, common + sum(author.left for author in authors))
    model = load_model(base.folder, run=run)
    where = f"base_model ({base.spec})"
    texts = _CommonTexts.written_by(model, load_tokenizer(base.folder, run=run), common, seed, count, where)
    for author in authors:
        is_base = author.source is base
        expert = model if is_base else load_expert(base.folder, author.source.folder, run=run)
        author.write(expert, None if is_base else model, texts, count)


@dataclass(frozen=True)
class _CommonTexts:
    """Texts of the base, which every expert reads: ids (B, S) and the base's log p of those behind the first, (B, S - 1)."""

    ids_BS: torch.Tensor
    log_p_BS: torch.Tensor

    @classmethod
    def written_by(
        cls, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: int, seed: int, count: ProgressCount, where: str
    ) -> _CommonTexts:
        """So many, none of which ends."""
        begin, at_once = _beginning(tokenizer), rows_at_once(base, DOCUMENT_TOKENS)
        ends, vocabulary = set(tokenizer.all_special_ids), len(tokenizer)
        writer = Writer(base, None, 0.0, ends=ends, vocabulary=vocabulary, endless=True, where=where)
        texts, stage = list[list[int]](), f"write text{DETAIL}the base"
        count.advance(stage)
        while len(texts) < rows:
            more = min(at_once, rows - len(texts))
            parts = writer.write(Script(((begin,),), (DOCUMENT_TOKENS,)), more, seed + len(texts))
            texts += [[begin, *part] for (part,) in parts]
            count.advance(stage, more)
        ids_BS = torch.tensor(texts)
        return cls(ids_BS, read_texts(base, ids_BS, vocabulary)[1])

    def passages(self, log_p_BS: torch.Tensor) -> list[list[int]]:
        """Beginnings of texts from these, those first that an expert, whose log p is given, makes likeliest beside the base."""
        gains_BP = (log_p_BS - self.log_p_BS).unfold(1, BEGUN_TOKENS, BEGUN_TOKENS).sum(-1)
        passages = self.ids_BS[:, 1:].unfold(1, BEGUN_TOKENS, BEGUN_TOKENS).flatten(0, 1)
        best = passages[gains_BP.flatten().argsort(descending=True, stable=True)].tolist()
        return [[int(self.ids_BS[0, 0]), *passage] for passage in best]


@dataclass(frozen=True)
class _Author:
    """An expert that writes, and what decides what it does."""

    name: str
    where: str
    file: Path
    source: ModelSource
    made: Made
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate | None
    documents: int

    @property
    def left(self) -> int:
        """Documents that are yet to be written."""
        return max(0, self.documents - written_so_far(self.file, self.made)[1])

    def write(self, model: PreTrainedModel, base: PreTrainedModel | None, common: _CommonTexts, count: ProgressCount) -> None:
        """Read what all read, and write what is left, in batches that are kept one by one."""
        stage = f"write text{DETAIL}{self.name}"
        count.advance(stage)
        expected_V, log_p_BS = read_texts(model, common.ids_BS, len(self.tokenizer))
        passages, expected = common.passages(log_p_BS), expected_V.numpy().astype("<f4").tobytes()
        written, done = written_so_far(self.file, self.made)
        rows = min(rows_at_once(model, DOCUMENT_TOKENS), -(-self.documents // CHATS))  # so that there are all kinds
        special = set(self.tokenizer.all_special_ids)
        writers = [
            Writer(model, beside, self.made.against, ends=special, vocabulary=len(self.tokenizer), where=self.where)
            for beside in (base, None, base)
        ]
        while done < self.documents:
            at_once = min(rows, self.documents - done)
            writer = writers[done // rows % BEGUN]
            script, begun = self._script(chat=done // rows % CHATS == CHATS - 1), list[list[int]]()
            if base is not None and done // rows % BEGUN == BEGUN - 1 and len(script.free) == 1:
                begun = passages[done // rows // BEGUN * rows :][:at_once]
            texts = writer.write(script, at_once, self.made.seed + done, begun)
            documents = enumerate(map(self._document, texts), done)
            written += [TextRecord(document, str(place)) for place, document in documents if document is not None]
            done += at_once
            keep_written(self.file, self.made, written, done, expected)
            count.advance(stage, at_once)

    def _script(self, *, chat: bool) -> Script:
        around = self.template.around(None) if chat and self.template is not None else None
        if around is None or self.template is None:
            return Script(((_beginning(self.tokenizer),),), (DOCUMENT_TOKENS,))
        before, between = (tuple(self.template.ids(each)) for each in around)
        return Script((before, between), (QUESTION_TOKENS, ANSWER_TOKENS))

    def _document(self, parts: Sequence[Sequence[int]]) -> Document | None:
        """What was written, as text, or as a question with its answer; None where nothing was."""
        texts = [self.tokenizer.decode(part, skip_special_tokens=True).strip() for part in parts]
        if not all(texts):
            return None
        question, *answer = texts
        return Conversation([message_of("user", question), message_of("assistant", answer[0])]) if answer else question


def _author(recipe: Recipe, place: int, root: Path, sources: Sequence[ModelSource], run: Run) -> _Author:
    expert, base = recipe.experts[place], sources[0]
    source = base if expert.is_base else sources[1 + place]
    brings = source is not base and has_tokenizer(source.folder)
    tokenizer = load_tokenizer(source.folder if brings else base.folder, run=run)
    template = chat_template_of(tokenizer)
    if template is not None and template.around(None) is None:
        template = None
    models = dict(_files({"base": base, "expert": source} if source is not base else {"base": base}, run))
    made = Made(
        tokens=DOCUMENT_TOKENS,
        way=WAY,
        against=0.0 if source is base else AGAINST,
        seed=recipe.mixture.router.seed,
        models=models,
        template="" if template is None else hashlib.sha256(template.source.encode()).hexdigest(),
    )
    return _Author(
        name=expert.name,
        where=f"experts[{place}] '{expert.name}': text ({source.spec})",
        file=written_file(expert, root),
        source=source,
        made=made,
        tokenizer=tokenizer,
        template=template,
        documents=documents_of(base.parameters),
    )


def _files(models: Mapping[str, ModelSource], run: Run) -> Iterator[tuple[str, str]]:
    """The files of base and expert, and their hashes."""
    for role, source in models.items():
        adapter = is_adapter(source.folder)
        read, name = (read_adapter_config, CONFIG_FILE) if adapter else (read_config, "config.json")
        yield f"{role}/{name}", settings_digest(read(source.folder, where=source.label))
        for file in source.files:
            yield f"{role}/{file.name}", known_blake3(file, lambda done, total: run.progress("look at the models", done, total))


def _beginning(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token before the first of a text: the tokenizer's, else what separates texts, else a beginning that is no end."""
    begun: list[int] = tokenizer("", verbose=False)["input_ids"]
    if begun and begun[0] != tokenizer.eos_token_id:
        return begun[0]
    known, end, begin = tokenizer.get_vocab().get(_SEPARATOR), tokenizer.eos_token_id, tokenizer.bos_token_id
    asked = (None if known == end else known, None if begin == end else begin, end, 0)
    return next(int(each) for each in asked if each is not None)
