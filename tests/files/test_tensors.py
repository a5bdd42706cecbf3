"""The header of a safetensors file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modekit.files.write import safetensors_header


@pytest.mark.parametrize("length", range(1, 65, 7))
def test_data_begins_where_memory_of_its_own_would_and_the_library_reads_it(tmp_path: Path, length: int) -> None:
    header = safetensors_header([("a" * length, "F32", (2, 3), 24)])
    assert len(header) % 64 == 0
    (tmp_path / "one.safetensors").write_bytes(header + torch.arange(6.0).numpy().tobytes())
    (read,) = load_file(tmp_path / "one.safetensors").values()
    assert torch.equal(read, torch.arange(6.0).view(2, 3))
