"""What a front is worth and costs: one expert for a whole text, chosen from its beginning, against a choice per token.

    modekit demo --out demo
    python benchmarks/front.py demo [--seeds 1] [--rate 50] [--rounds 5] [--against ../other/src]

Per router that reads tokens: accuracy of the choice after 16, 32, 64 tokens of held-out documents, and the gap that it closes
on tokens 33 to 256 when the choice after 32 holds for all of them; beside it the n-gram mixture, which chooses per token. Then
`modekit front` before a server that answers at once: how much longer a request takes through it, at a steady rate, and how long
`/health` takes while it gets requests as large as can be. Where others use the cores, too, `chrt --fifo 1` before it lets it go
first; `--seeds 0` leaves the first part out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from modekit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from modekit.evaluation.domains import held_out_texts
from modekit.loaded.load import load_model, load_tokenizer
from modekit.loaded.shapes import expert_view
from modekit.routing.text_router import TextRouter

BEGINNINGS = (16, 32, 64)
CHOSEN_AFTER, UNTIL = 32, 256
ROUTERS = ("ngram", "lexical")


def losses(model: Any, texts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Sum over tokens 33 to 256 of every text, in nats."""
    found = []
    with torch.inference_mode():
        for ids in texts:
            logits_SV = model(torch.tensor([ids])).logits[0, CHOSEN_AFTER - 1 : -1].float()
            found.append(torch.nn.functional.cross_entropy(logits_SV, torch.tensor(ids[CHOSEN_AFTER:]), reduction="sum"))
    return torch.stack(found).double()


def worth(folder: Path) -> dict[str, float]:
    """Of one seed of the demo."""
    checkpoints = {name: open_checkpoint(folder / name) for name in ROUTERS}
    native: Checkpoint = checkpoints["lexical"]
    tokenizer = load_tokenizer(native.folder)
    texts, own = [], []
    for held in held_out_texts(native):
        if held.expert is not None:
            ids = [tokenizer(document, verbose=False)["input_ids"][:UNTIL] for document in held.documents]
            ids = [each for each in ids if len(each) > max(BEGINNINGS)]
            texts += ids
            own += [held.expert] * len(ids)
    owner = torch.tensor(own)
    found: dict[str, float] = {"documents": len(texts)}
    view = expert_view(native)
    by_expert = []
    for expert in range(len(native.names)):
        view.use_expert(expert)
        by_expert.append(losses(view.model, texts))
    losses_EN = torch.stack(by_expert)
    base_N = losses(load_model(folder / "base"), texts)
    own_N = losses_EN.gather(0, owner[None])[0]

    def gap(these_N: torch.Tensor) -> float:
        """Mean over the domains."""
        gaps = []
        for expert in range(len(native.names)):
            mine = owner == expert
            gaps.append(float((base_N - these_N)[mine].sum() / (base_N - own_N)[mine].sum()))
        return statistics.fmean(gaps)

    for name, checkpoint in checkpoints.items():
        router = TextRouter(checkpoint)
        for count in BEGINNINGS:
            chosen = torch.tensor([_place(router, tokenizer.decode(ids[:count]), native) for ids in texts])
            found[f"{name}: accuracy after {count}"] = float((chosen == owner).double().mean())
            if count == CHOSEN_AFTER:
                taken = torch.where(chosen >= 0, losses_EN.gather(0, chosen.clamp_min(0)[None])[0], base_N)
                found[f"{name}: gap of one choice"] = gap(taken)
                found[f"{name}: base chosen"] = float((chosen < 0).double().mean())
    found["ngram: gap per token"] = gap(losses(load_model(checkpoints["ngram"].folder), texts))
    return found


def _place(router: TextRouter, text: str, checkpoint: Checkpoint) -> int:
    expert = router.decide(text).expert
    return checkpoint.names.index(expert) if expert in checkpoint.names else -1


@dataclass(frozen=True)
class Load:
    """Requests a second, seconds of a round, and rounds."""

    rate: float
    seconds: float
    rounds: int


class AtOnce(BaseHTTPRequestHandler):
    """A server that thinks of nothing."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else head and body, sent apart, wait for one another

    def do_GET(self) -> None:
        self._answer({"data": [{"id": name} for name in ("medicine", "law", "science", "code", "base")]})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self._answer({"choices": [{"text": "."}]})

    def _answer(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def cost(folder: Path, texts: Sequence[str], load: Load, sources: Mapping[str, Path | None]) -> Iterator[str]:
    """Milliseconds of a request straight to the server and through fronts, one of each modekit in `sources`; in turns.

    A row per way: the median and the 99th of 100 within a round, as the median over rounds with their range; and what a front
    adds to both, paired by rounds.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), AtOnce)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    direct = f"http://127.0.0.1:{server.server_port}"
    os.sched_setaffinity(0, os.sched_getaffinity(0) - {0} or {0})
    with ExitStack() as stack:
        stack.callback(server.shutdown)
        ways = {"direct": (direct, "law")}
        ways |= {name: (stack.enter_context(_front(folder, direct, source)), "auto") for name, source in sources.items()}
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for round_ in range(load.rounds + 1):
            for name in list(ways) if round_ % 2 else reversed(ways):
                taken = _round(*ways[name], texts, load)
                if round_:  # the first one warms up
                    found[name].append((1e3 * statistics.median(taken), 1e3 * sorted(taken)[int(0.99 * len(taken))]))
    for name, rounds in found.items():
        yield f"{name}: {_said(rounds)}"
        if name != "direct":
            added = [(own[0] - bare[0], own[1] - bare[1]) for own, bare in zip(rounds, found["direct"], strict=True)]
            yield f"{name} adds: {_said(added)}"


def _said(rounds: Sequence[tuple[float, float]]) -> str:
    medians, tails = zip(*rounds, strict=True)
    return "; ".join(
        f"{what} {statistics.median(values):.2f} ms ({min(values):.2f} to {max(values):.2f})"
        for what, values in (("median", medians), ("99 of 100", tails))
    )


def _round(address: str, model: str, texts: Sequence[str], load: Load) -> list[float]:
    taken, began = [], time.perf_counter()
    for number in range(int(load.rate * load.seconds)):
        time.sleep(max(0.0, began + number / load.rate - time.perf_counter()))
        taken.append(_asked(address, model, texts[number % len(texts)]))
    return taken


def health(folder: Path) -> Iterator[str]:
    """Milliseconds of the longest health check while one request of a kind, or eight of them at once, are answered."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), AtOnce)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with ExitStack() as stack:
        stack.callback(server.shutdown)
        address = stack.enter_context(_front(folder, f"http://127.0.0.1:{server.server_port}", None))
        pool = stack.enter_context(ThreadPoolExecutor(8))
        for name, body in LARGE.items():
            for count in (0, 1, 8):
                asked, taken = [pool.submit(_status, f"{address}/v1/chat/completions", body) for _ in range(count)], []
                while not all(each.done() for each in asked) or len(taken) < 20:
                    began = time.perf_counter()
                    _status(f"{address}/health")
                    taken.append(1e3 * (time.perf_counter() - began))
                statuses = sorted({each.result() for each in asked})
                yield f"{name}, {count} at once (status {statuses}): /health {max(taken):.0f} ms at most of {len(taken)}"


LARGE: Mapping[str, bytes] = {
    "200,000 turns": json.dumps({"model": "law", "messages": [{"role": "user", "content": "hi"}] * 200_000}).encode(),
    "2,700,000 lists": b'{"messages": [' + b"[]," * 2_700_000 + b"1]}",
    "262,000 values": json.dumps({"model": "law", "prompt": [{"a": 1}] * 87_000}).encode(),
    "8 MB of text": json.dumps(
        {"model": "auto", "messages": [{"role": "user", "content": "the fever " * 190}] * 4_096}
    ).encode(),
}


def _status(address: str, body: bytes | None = None) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, body), timeout=120) as answer:
            answer.read()
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@contextmanager
def _front(folder: Path, worker: str, source: Path | None) -> Iterator[str]:
    """The address of one, alone on the first core; `source`: where modekit is imported from, None: the installed one."""
    command = [sys.executable, "-m", "modekit", "front", str(folder / "ngram"), "--port", "0", "--worker", worker]
    environment = {**os.environ, **({} if source is None else {"PYTHONPATH": str(source)})}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    try:
        os.sched_setaffinity(process.pid, {0})
        yield process.stdout.readline().split("/v1")[0]
    finally:
        process.terminate()
        process.wait()


def _asked(address: str, model: str, prompt: str) -> float:
    body = json.dumps({"model": model, "prompt": prompt, "max_tokens": 1}).encode()
    request = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
    began = time.perf_counter()
    with urllib.request.urlopen(request, timeout=60) as answer:
        answer.read()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rate", type=float, default=50.0, help="requests a second")
    parser.add_argument("--seconds", type=float, default=4.0, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", type=Path, help="the src folder of another version, measured in turns with this one")
    arguments = parser.parse_args()
    rows = [worth(arguments.demo / f"seed{seed}") for seed in range(arguments.seeds)]
    for name in rows[0] if rows else ():
        values = [row[name] for row in rows]
        print(f"{name:32} {statistics.fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
    folder = arguments.demo / "seed0"
    held = held_out_texts(open_checkpoint(folder / "ngram"))
    texts = [document[:2_000] for each in held for document in each.documents[:20]]
    load = Load(arguments.rate, arguments.seconds, arguments.rounds)
    sources = {"front": None, **({} if arguments.against is None else {"other front": arguments.against.resolve()})}
    for line in (*cost(folder, texts, load, sources), *health(folder)):
        print(line)


if __name__ == "__main__":
    main()
