"""How long a build takes: counted from the plan, and measured by a clock of the test's own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest

from command_line import modekit
from conftest import SMALL, Workshop
from modekit.building.preview import NeededTime, fit_work, needed_time, preview
from modekit.cli.printing.mixtures import fit_said, time_said
from modekit.planning.make import make_plan
from modekit.planning.plan import Plan
from modekit.recipes.read import load_recipe
from refusal import borrow


def plan_of(workshop: Workshop, router: dict[str, object] | None = None, **mixture: object) -> Plan:
    settings = {"method": "routing", "top_k": 2, **({"router": router} if router else {}), **mixture}
    return make_plan(load_recipe(workshop.write(mixture=settings)), workshop.root)


def test_the_work_is_counted_from_the_plan(shared_workshop: Workshop, tmp_path: Path) -> None:
    """Per token and layer: attention and FFN of one expert."""
    plan = plan_of(borrow(shared_workshop, tmp_path), {"fit": "logistic", "tokens_per_domain": 1000})
    work = fit_work(plan)
    hidden, inner = SMALL["hidden_size"], SMALL["intermediate_size"]
    layer = hidden * hidden * 2 + hidden * hidden // 2 * 2 + 3 * hidden * inner + 2 * hidden  # k and v have half the heads
    assert work is not None and work.reads and work.tokens == 3000
    assert work.flops == 3000 * 3 * 2 * layer


def test_a_router_without_text_or_without_a_model_has_no_time(shared_workshop: Workshop, tmp_path: Path) -> None:
    workshop = borrow(shared_workshop, tmp_path)
    assert fit_work(plan_of(workshop, {"fit": "random"})) is None
    counted = plan_of(workshop, {"fit": "lexical", "orders": [1, 2], "buckets": 512})
    work = fit_work(counted)
    assert work is not None and not work.reads
    assert "no model is run" in fit_said(work) and "without text" in fit_said(None)


def test_what_a_plain_checkpoint_reads_is_counted(shared_workshop: Workshop, tmp_path: Path) -> None:
    """Its stream is measured on some text, and on more where whole experts are carried."""
    workshop = borrow(shared_workshop, tmp_path)
    mixture = {"method": "routing", "top_k": 1, "router": {"fit": "lexical"}}
    for carry, tokens in (("ffn", 1_024), ("all", 1_024 + 4_096)):
        output = {"format": "native", "carry": carry}
        plan = make_plan(load_recipe(workshop.write(mixture=mixture, output=output)), workshop.root)
        work = fit_work(plan)
        assert work is not None and work.reads and work.tokens == tokens and work.flops > 0
        assert any("runs the base over up to 4,096 tokens" in note for note in plan.notes) == (carry == "all")


def test_the_command_says_about_how_long(shared_workshop: Workshop, tmp_path: Path) -> None:
    recipe = borrow(shared_workshop, tmp_path).write(mixture={"method": "routing", "router": {"fit": "logistic"}})
    said = modekit("plan", recipe)
    assert "at most 49,152 tokens" in said and re.search(r"time +about \S+ to \S+ \S+ on this machine", said)
    data = json.loads(modekit("plan", recipe, "--json"))
    assert data["fit"]["tokens"] == 49_152
    assert preview(recipe).model_dump(mode="json")["fit"] == data["fit"]
    assert 0 < data["time"]["range"][0] < data["time"]["range"][1]


def test_a_plan_says_how_long_a_build_takes_without_torch(shared_workshop: Workshop, tmp_path: Path) -> None:
    recipe = borrow(shared_workshop, tmp_path).write(mixture={"method": "routing", "router": {"fit": "logistic"}})
    code = (
        "import sys; from pathlib import Path; from modekit.building.preview import preview; "
        f"assert preview(Path({str(recipe)!r})).time.fit > 0; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def needed(plan: Plan, *, seconds: float, worked: float) -> NeededTime:
    """By clocks that go on by so much at every look."""
    ticks, uses = count(0.0, seconds), count(0.0, worked)
    return needed_time(plan, clock=lambda: next(ticks), used=lambda: next(uses))


def test_the_time_of_a_fit_grows_with_its_tokens_and_with_how_busy_the_machine_is(
    shared_workshop: Workshop, tmp_path: Path
) -> None:
    workshop = borrow(shared_workshop, tmp_path)
    few, many = (plan_of(workshop, {"fit": "centroid", "tokens_per_domain": tokens}) for tokens in (10**6, 2 * 10**6))
    idle, busy = needed(many, seconds=0.2, worked=0.2), needed(many, seconds=2.0, worked=0.2)
    constant = needed(plan_of(workshop, {"fit": "lexical", "orders": [1, 2], "buckets": 512}), seconds=0.2, worked=0.2).fit
    assert idle.fit - constant == pytest.approx(2 * (needed(few, seconds=0.2, worked=0.2).fit - constant))
    assert busy.fit == pytest.approx(10 * idle.fit) and busy.write == pytest.approx(10 * idle.write)
    assert idle.range[0] < idle.write + idle.fit < idle.range[1]


def test_a_router_without_text_takes_the_time_of_the_copy(shared_workshop: Workshop, tmp_path: Path) -> None:
    found = needed(plan_of(borrow(shared_workshop, tmp_path), {"fit": "random"}), seconds=0.2, worked=0.2)
    assert found.fit == 0 < found.write and "fit" not in time_said(found)


def test_a_logistic_fit_counts_what_solving_it_costs(shared_workshop: Workshop, tmp_path: Path) -> None:
    workshop = borrow(shared_workshop, tmp_path)
    centroid, logistic = (
        fit_work(plan_of(workshop, {"fit": fit, "tokens_per_domain": 1000})) for fit in ("centroid", "logistic")
    )
    assert centroid is not None and logistic is not None
    assert centroid.solving == 0 < logistic.solving and centroid.flops == logistic.flops


def test_a_build_says_its_time_before_it_begins(shared_workshop: Workshop, tmp_path: Path) -> None:
    workshop = borrow(shared_workshop, tmp_path)
    recipe = workshop.write(mixture={"method": "routing", "router": {"fit": "random"}})
    command = [sys.executable, "-m", "modekit", "build", str(recipe), str(tmp_path / "OUT")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines()
    assert said[0].startswith("0:00  takes about ") and said[1].startswith("0:00  ")
