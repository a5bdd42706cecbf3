"""Two processes under a launcher (gloo, on the processor) do what one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from command_line import modekit
from conftest import Workshop
from modekit.building.verify import is_proven, verify
from modekit.checkpoint.open import open_checkpoint
from refusal import refuse
from trained import tensors_of

pytestmark = pytest.mark.slow
TRAINING = {
    "what": ["routers", "attention", "experts"],
    "losses": {"lm": 1.0, "label": 0.1, "forward_kl": 0.5},
    "steps": 4,
    "batch_tokens": 400,
    "sequence_length": 64,
    "select_tokens": 400,
    "evaluate_every": 2,
    "learning_rate": 0.05,
    "backbone_learning_rate": 0.002,
}
CONTEXT = {"method": "routing", "top_k": 2, "router": {"fit": "random", "granularity": "context"}}


SHARDING = """
import sys
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
import modekit.loaded.engine as engine
from modekit.cli import main

def sharding(**asked):
    accelerator = Accelerator(**asked)  # which does not shard on processors by itself
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    return accelerator

engine.Accelerator = sharding
sys.exit(main())
"""


def launch(processes: int, *args: str) -> str:
    """Run a module under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run([*command, *args], capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.parametrize("sharded", [False, True])
def test_training_with_two_processes_is_training_with_one(workshop: Workshop, sharded: bool) -> None:
    one, two = workshop.build("ONE", mixture=CONTEXT), workshop.build("TWO", mixture=CONTEXT)
    settings = workshop.root / "training.yaml"
    settings.write_text(yaml.safe_dump({**TRAINING, "accumulate": 2}))
    modekit("train", one, "--settings", settings, "--tokens", "0")
    settings.write_text(yaml.safe_dump({**TRAINING, "accumulate": 1}))
    script = workshop.root / "sharding.py"
    script.write_text(SHARDING)
    command = [str(script)] if sharded else ["-m", "modekit"]
    launch(2, *command, "train", str(two), "--settings", str(settings), "--tokens", "0")
    before, after = tensors_of(one), tensors_of(two)
    for name in before:
        # A hundredth of the first step: where a gradient is all but zero, Adam makes a step of its rounding.
        assert torch.allclose(before[name], after[name], atol=2e-5), name
    assert is_proven(verify(open_checkpoint(two)))


def test_other_commands_refuse_a_launcher(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert "this command runs in one process" in refuse("plan", workshop.write())


SHARDED = """
import sys
import torch, torch.distributed
from pathlib import Path
from torch.distributed.fsdp import fully_shard
from modekit.checkpoint.open import open_checkpoint
from modekit.text.sequences import TokenSequence
from modekit.loaded.load import load_model
from modekit.training.batches import Batches, DomainSequences, plan_parts
from modekit.training.objective import Objective
from modekit.training.settings import TrainSettings, checked_settings

torch.distributed.init_process_group("gloo")
checkpoint = open_checkpoint(Path(sys.argv[1]))
settings = checked_settings({"losses": {"lm": 1.0, "label": 0.2, "z": 0.01}, "what": ["all"]}, TrainSettings, where="test")
draw = torch.Generator().manual_seed(3)
corpora = [
    DomainSequences(name, place, [TokenSequence(tuple(torch.randint(3, 96, (31,), generator=draw).tolist()), 31)] * 2)
    for place, name in enumerate("abc")
]
batches = Batches(corpora, plan_parts(corpora, settings, steps=1, experts=3, parts=2, pack=False))

def objective():
    mixture = load_model(checkpoint.folder)
    if checkpoint.shape.plain:
        mixture.set_experts_implementation("eager")
    return Objective(mixture, checkpoint, settings, teachers=[], train_top_k=None, packed=False)

whole = objective()
for number in range(2):
    whole(**batches[number]).backward()
sharded = objective()
for layer in sharded.model.model.layers:
    fully_shard(layer)
fully_shard(sharded)
(2.0 * sharded(**batches[torch.distributed.get_rank()])).backward()
for (name, one), two in zip(whole.named_parameters(), sharded.parameters()):
    if one.grad is not None and float(one.grad.abs().max()) > 0:
        assert torch.allclose(two.grad.full_tensor(), one.grad, atol=1e-6), name
print("the same gradients")
"""


@pytest.mark.parametrize("mixture", [None, CONTEXT], ids=["native", "context"])
def test_a_sharded_mixture_has_the_same_gradients(workshop: Workshop, mixture: dict[str, object] | None) -> None:
    """FSDP2 (fully_shard): parameters are whole only while their layer runs."""
    folder = workshop.build("OUT", **({"mixture": mixture} if mixture else {}))
    script = workshop.root / "sharded.py"
    script.write_text(SHARDED)
    assert "the same gradients" in launch(2, str(script), str(folder))
