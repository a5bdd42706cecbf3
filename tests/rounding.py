"""What a test may ask of computed numbers.

Copied tensors are compared bit by bit. The last bits of a computed number depend on the processor's instructions, on the
number of threads and on the shapes and places in memory of what is multiplied. So only the same computation done twice in one
process is compared bit by bit, which shows that nothing is left to chance. Another way to the same number (another process, a
copy or a reload of the model, a refit in place of a build) is close to it, as said here.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from modekit.checkpoint.record import RECORD_FILE
from modekit.files.marker import MARKER, read_marker
from modekit.planning.plan import ROUTER_FILE

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}
"""Of the largest number: a hundred units in the last place of float32, and a few of the half precisions."""


def assert_close(found: torch.Tensor, wanted: torch.Tensor, of_largest: float | None = None) -> None:
    """The same numbers but for rounding, measured by the largest of them."""
    share = ROUNDING[wanted.dtype] if of_largest is None else of_largest
    torch.testing.assert_close(found, wanted, rtol=0, atol=share * float(wanted.abs().max()))


def assert_same_checkpoint(found: Path, wanted: Path, of_largest: float = 1e-3) -> None:
    """The same files bit by bit, but for gates, which are solved from sums of float32 products: those are close."""
    names = [{path.name for path in folder.iterdir() if path.is_file()} for folder in (found, wanted)]
    assert names[0] == names[1]
    markers = [read_marker(folder) for folder in (found, wanted)]
    assert markers[0] is not None and markers[1] is not None
    assert markers[0].files.keys() == markers[1].files.keys()  # their digests are those of the gates, too
    for name in names[0] - {ROUTER_FILE, RECORD_FILE, MARKER}:
        assert (found / name).read_bytes() == (wanted / name).read_bytes(), name
    gates, wanted_gates = (load_file(folder / ROUTER_FILE) for folder in (found, wanted))
    assert gates.keys() == wanted_gates.keys()
    for name, gate in wanted_gates.items():
        assert_close(gates[name].float(), gate.float(), of_largest)


def record_of(folder: Path) -> dict[str, object]:
    """modekit.json without the digest of the gates, whose last bits it would tell."""
    record: dict[str, dict[str, object]] = json.loads((folder / RECORD_FILE).read_text())
    del record["router"]["sha256"]
    return dict(record)
