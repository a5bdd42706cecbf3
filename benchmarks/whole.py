"""What a plain checkpoint carries of whole experts: gap closed and what is lost, whole.md.

    python benchmarks/whole.py train FOLDER --kind adapters --seeds 0 1 2      base and four experts, as `modekit demo` has
    python benchmarks/whole.py mixtures FOLDER --kind adapters --seeds 0 1 2   mixtures of them, lexical router, report split
    python benchmarks/whole.py trained FOLDER --kind full --seeds 0 1 2        the mixture of rank 64, trained from there

Kinds: adapters (LoRA of rank 16 on all linear parts), ffn (FFNs alone), full (full fine-tunes), strangers (five experts of
SmolLM2-135M, made in five ways: strangers.py); adapters-styles, adapters-eight, adapters-sixteen (of parts of the domains,
for scoreboard.py). `train` keeps models that are there.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from modekit.building.build import build
from modekit.demo.kinds import SMALL, Experts, Kind
from modekit.demo.models import SEQUENCE_LENGTH, make_base
from modekit.demo.text import DOMAINS, UNSEEN, unpack_text
from modekit.evaluation.evaluate import evaluate
from modekit.evaluation.forced import force_experts
from modekit.evaluation.results import Results, Row
from modekit.experts.specialize import specialize
from modekit.files.change import is_there
from modekit.planning.make import make_plan
from modekit.recipes.read import parse_recipe
from modekit.run import QUIET
from modekit.training.settings import TrainSettings, checked_settings
from modekit.training.train import train as train_mixture
from peers.pool import texts_of_kind
from strangers import ATTENTION, BASE_TEXT, EXPERTS, train_strangers

EVAL_TOKENS = {"adapters": 8_192, "ffn": 8_192, "full": 8_192, "strangers": 1_024}
FORCED_TOKENS = {"adapters": 1_024, "ffn": 1_024, "full": 1_024, "strangers": 256}
MOVED: dict[str, Experts] = {"adapters": "lora", "ffn": "mlp", "full": "full"}
"""What training moves of a kind's experts."""
PART_STEPS = {"styles": 40, "eight": 40, "sixteen": 24}
PART_BATCH, PART_RATE = 1_536, 1e-2
"""Steps, their tokens and learning rate, of an expert of a part of a domain (peers/parts.py), which has less text."""
PART_KINDS = tuple(f"adapters-{how}" for how in PART_STEPS)
STEPS = 60
NATIVE = {"format": "plain"}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "adapters": {
        "modekit architecture": {"output": {"format": "modekit"}},
        "plain, FFN alone": {"output": {**NATIVE, "carry": "ffn"}},
        "plain, whole": {"output": NATIVE},
        "plain, whole, rank 192 (exact)": {"output": {**NATIVE, "rank": 192}},
        "plain, whole, rank 32": {"output": {**NATIVE, "rank": 32}},
        "plain, whole, top-2": {"output": NATIVE, "top_k": 2},
    },
    "ffn": {"modekit architecture": {"output": {"format": "modekit"}}, "plain": {"output": NATIVE}},
    "full": {
        "modekit architecture, all": {"output": {"format": "modekit"}, "modules": "all"},
        "plain, FFN alone, average": {"output": {**NATIVE, "carry": "ffn"}, "backbone": "average"},
        "plain, whole, base, rank 64": {"output": {**NATIVE, "carry": "all"}},
        "plain, whole, average, rank 32": {"output": {**NATIVE, "carry": "all", "rank": 32}, "backbone": "average"},
        "plain, whole, average, rank 64": {"output": {**NATIVE, "carry": "all"}, "backbone": "average"},
        "plain, whole, average, rank 128": {"output": {**NATIVE, "carry": "all", "rank": 128}, "backbone": "average"},
    },
    "strangers": {
        "modekit architecture, all": {"output": {"format": "modekit"}, "modules": "all"},
        "plain, FFN alone, base": {"output": {**NATIVE, "carry": "ffn"}},
        "plain, FFN alone, average": {"output": {**NATIVE, "carry": "ffn"}, "backbone": "average"},
        "plain, whole, base, rank 64": {"output": {**NATIVE, "carry": "all"}},
        "plain, whole, base, rank 64, fitted on documents alone": {
            "output": {**NATIVE, "carry": "all"},
            "router": {"fit": "lexical", "chat": False},
        },
        "plain, whole, base, rank 128": {"output": {**NATIVE, "carry": "all", "rank": 128}},
        "plain, whole, average, rank 64": {"output": {**NATIVE, "carry": "all"}, "backbone": "average"},
        "plain, whole, average, rank 128": {"output": {**NATIVE, "carry": "all", "rank": 128}, "backbone": "average"},
        "plain, whole, base, rank 256": {"output": {**NATIVE, "carry": "all", "rank": 256}},
    },
}
"""How the experts of a kind are mixed."""


def train(folder: Path, kind: str, seed: int) -> None:
    """Base and experts of one seed."""
    texts, home, read = unpack_text(folder / "text"), folder / f"seed{seed}", texts_of_kind(folder, kind)
    home.mkdir(parents=True, exist_ok=True)
    if not is_there(home / "base"):
        make_base(home / "base", texts, steps=SMALL.base_steps, seed=seed, run=QUIET)
    moved, _, how = kind.partition("-")
    training = Kind(MOVED[moved]).size.training
    if how:
        training = training.with_(
            steps=PART_STEPS[how], batch_tokens=PART_BATCH, learning_rate=PART_RATE, held_out_tokens=1_024
        )
    for place, (name, text) in enumerate(read.items()):
        out = home / f"{kind}-{name}"
        if not is_there(out):
            with_seed = training.with_(seed=1000 * seed + place)
            specialize(home / "base", out, [str(text)], root=home, train=MOVED[moved], training=with_seed, run=QUIET)


def experts_of(kind: str, *, ffn_alone: bool) -> list[dict[str, str]]:
    """What a recipe says of them, without strangers' adapters that have nothing for FFNs where nothing else is mixed."""
    if kind == "strangers":
        mixed = [each for each in EXPERTS if not (ffn_alone and each.adapter and each.adapter["target_modules"] == ATTENTION)]
        made = {each.domain: ("adapter" if each.adapter else "model", f"./{each.name}-{each.domain}") for each in mixed}
        made[BASE_TEXT] = ("model", "base")
    else:
        made = {name: ("adapter" if MOVED.get(kind) == "lora" else "model", f"./{kind}-{name}") for name in DOMAINS}
    return [{"name": name, source: where, "text": f"../text/{name}.jsonl"} for name, (source, where) in made.items()]


def recipe(kind: str, variant: dict[str, Any]) -> dict[str, Any]:
    """A lexical router over the experts."""
    experts = experts_of(kind, ffn_alone=variant["output"].get("carry") == "ffn")
    mixed = {key: value for key, value in variant.items() if key != "output"}
    mixture = {"method": "routing", "top_k": 1, "router": {"fit": "lexical"}, **mixed}
    base = "../base" if kind == "strangers" else "./base"
    said = {"base_model": base, "experts": experts, "mixture": mixture, "output": variant["output"]}
    return {**said, "eval": {UNSEEN: f"../text/{UNSEEN}.jsonl"}}


def trained(folder: Path, kind: str, seed: int) -> None:
    """What distillation from the experts' own models adds to a plain mixture, on all that the base has, too."""
    home, name = folder / f"seed{seed}", "plain, whole, average, rank 64" if kind == "full" else "plain, whole"
    checkpoint = build(
        make_plan(parse_recipe(recipe(kind, VARIANTS[kind][name]), where=name), home), home / f"{kind}-start", overwrite=True
    )
    asked = {
        **{"what": ["all"], "losses": {"forward_kl": 1.0}, "backbone_learning_rate": 1e-3, "sequence_length": SEQUENCE_LENGTH},
        **{"steps": STEPS, "batch_tokens": 8_192, "select_tokens": 2_048},
    }
    start = time.process_time()
    done = train_mixture(checkpoint, checked_settings(asked, TrainSettings, where=name), evaluate_tokens=None)
    took = time.process_time() - start
    said = evaluate(done.checkpoint, tokens_per_domain=EVAL_TOKENS[kind], sequence_length=SEQUENCE_LENGTH)
    mixed, forced = (said.row(row).mean_gap(DOMAINS) for row in ("mixture", "oracle"))
    unseen = said.row("mixture").scores[UNSEEN].loss / said.row("base").scores[UNSEEN].loss
    print(f"| {name}, trained | {mixed:.3f} | {forced:.3f} | {unseen:.3f} | {took:.0f} s |", flush=True)


def mixtures(folder: Path, kind: str, seed: int, only: str) -> None:
    """A row of the table per variant, below those of base, experts and weight average."""
    home, known = folder / f"seed{seed}", list[Results]()
    print(f"\n| seed {seed} | gap closed | forced | lost | unseen / base | active / base | build s |")
    print("|---|---|---|---|---|---|---|")
    for name, variant in VARIANTS[kind].items():
        if only and only not in name:
            continue
        start = time.process_time()
        plan = make_plan(parse_recipe(recipe(kind, variant), where=name), home)
        checkpoint = build(plan, home / f"{kind}-mixture", overwrite=True)
        took = time.process_time() - start
        said = evaluate(
            checkpoint,
            tokens_per_domain=EVAL_TOKENS[kind],
            sequence_length=SEQUENCE_LENGTH,
            known=known[0] if known else None,
        )
        if not known:
            for row in said.rows:
                if row.kind not in ("oracle", "mixture"):
                    print(f"| {row.name} | {_gaps(said, row)} | | | {_unseen(said, row)} | 1 | |")
        known.append(said)
        forced = force_experts(checkpoint, tokens_per_domain=FORCED_TOKENS[kind])
        lost = {row.expert: row.lost or 0.0 for row in forced.rows}
        mixed = said.row("mixture")
        print(
            f"| {name} | {_gaps(said, mixed)} | {_gaps(said, said.row('oracle'))} "
            f"| {', '.join(f'{expert} {share:.1e}' for expert, share in lost.items())} | {_unseen(said, mixed)} "
            f"| {checkpoint.parameters.active / checkpoint.record.dense_parameters:.2f} | {took:.0f} |",
            flush=True,
        )


def _gaps(said: Results, row: Row) -> str:
    """Mean gap closed, and of each domain that has one."""
    each = {name: row.scores[name].gap_closed for name in said.domains if name in row.scores}
    shown = ", ".join(f"{name} {gap:.2f}" for name, gap in each.items() if gap is not None)
    return f"{row.mean_gap(said.domains) or 0.0:.3f} ({shown})"


def _unseen(said: Results, row: Row) -> str:
    """Loss on unseen text over the base's."""
    return f"{row.scores[UNSEEN].loss / said.row('base').scores[UNSEEN].loss:.3f}"


def main() -> None:
    """One step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["train", "mixtures", "trained"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", choices=[*VARIANTS, *PART_KINDS], required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", default="")
    said = parser.parse_args()
    if said.step != "train" and said.kind not in VARIANTS:
        parser.error(f"{said.kind}: mixtures of it are rows of scoreboard.py")
    for seed in said.seeds:
        if said.step == "train" and said.kind == "strangers":
            train_strangers(said.folder.resolve(), seed)
        elif said.step == "train":
            train(said.folder.resolve(), said.kind, seed)
        elif said.step == "trained":
            trained(said.folder.resolve(), said.kind, seed)
        else:
            mixtures(said.folder.resolve(), said.kind, seed, said.only)


if __name__ == "__main__":
    main()
