"""Whatever a stranger's task file says, it loads or is refused by an error that we know, and nothing of it runs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.tasks import TaskManager

from damage import damaged_bytes, damaged_data
from modekit.errors import ModekitError
from modekit.evaluation.tasks.harness import build_requests, metrics_of, named_tasks, quiet
from mutations import inputs, limited

PLAIN: dict[str, Any] = {
    "task": "spell",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "spell.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{word}}",
    "doc_to_choice": ["a", "b"],
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
QUICK, SLOW = 100, 1_500
KEYS = [
    *PLAIN,
    "include",
    "group",
    "tag",
    "class",
    "process_docs",
    "process_results",
    "custom_dataset",
    "use_prompt",
    "description",
    "fewshot_config",
    "num_fewshot",
    "generation_kwargs",
    "repeats",
    "filter_list",
    "metadata",
    "unsafe_code",
    "doc_to_image",
    "fewshot_split",
    "gen_prefix",
    "target_delimiter",
    "dataset_name",
    "doc_to_decontamination_query",
]
LEAVES = st.one_of(
    st.sampled_from(
        [
            "!function evil.run",
            "got/evil",
            "evil.run",
            "../evil.yaml",
            "{{ word",
            "{{ answer }}",
            "{{ [1] * 3 }}",
            "{{ word.x }}",
            "json",
            "text",
            "csv",
            "test",
            "acc",
            "mean",
            "exact_match",
            "regex",
            "(a",
            "custom",
            "word",
            "spell",
            "generate_until",
            "loglikelihood",
            "loglikelihood_rolling",
            "all",
            "spell.jsonl",
            "/etc/passwd",
            "evil.yaml",
        ]
    ),
    st.none(),
    st.booleans(),
    st.integers(-2, 3),
    st.integers(),
    st.floats(),
    st.text(max_size=6),
    st.dates(),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from([*KEYS, "metric", "function", "filter", "name", "data_files", "samples"]), inner, max_size=3
        ),
    ),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("tasks")
    (root / "evil.py").write_text(f"open({str(root / 'ran')!r}, 'w').close()\nrun = str\n")
    (root / "got" / "evil").mkdir(parents=True)
    shutil.copy(root / "evil.py", root / "got" / "evil" / "evil.py")
    (root / "evil.yaml").write_text("doc_to_text: !function evil.run\n")
    (root / "spell.jsonl").write_text("\n".join(json.dumps({"word": f"w{n}", "answer": n % 2}) for n in range(3)))
    yield root


def asked(folder: Path) -> object:
    """A task as `eval-tasks` takes it up, as far as no model is needed."""
    with quiet(trusted=False):
        found = named_tasks(["spell"], [folder], trusted=False)
        for name, task in found.items():
            build_requests(name, task, 2)
            metrics_of(task, 2, every=False)
    return found


def is_taken(folder: Path, content: bytes) -> bool:
    """Whether a file is taken, and not refused by an error of our own. Nothing of it runs."""
    (folder / "spell.yaml").write_bytes(content)
    try:
        with limited():
            asked(folder)
        return True
    except ModekitError as error:
        assert len(str(error)) < 20_000 and "\x1b" not in str(error)
        return False
    finally:
        assert not (folder / "ran").exists()


def written(said: Any) -> bytes:
    """As YAML, with the tags that a value claims to have."""
    return re.sub(r"'(!function evil.run)'", r"\1", yaml.safe_dump(said, allow_unicode=True)).encode("utf-8", "replace")


CHANGED = st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=2).map(lambda more: {**PLAIN, **more})
FILES = st.one_of(
    damaged_data(PLAIN).map(written),
    CHANGED.map(written),
    damaged_bytes(written(PLAIN)),
)


@pytest.mark.parametrize("count", [QUICK, pytest.param(SLOW, marks=pytest.mark.slow)])
def test_only_own_errors_come_out(folder: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.chdir(folder)
    # The harness's own tasks, thousands of files, are not looked through for every input that lost its name.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: TaskManager(include_defaults=False))
    assert is_taken(folder, written(PLAIN))
    taken: list[bool] = []

    @inputs(count)
    @given(FILES)
    def run(content: bytes) -> None:
        taken.append(is_taken(folder, content))

    run()
    assert any(taken) and not all(taken)
