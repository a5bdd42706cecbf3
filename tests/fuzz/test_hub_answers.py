"""Whatever a hub answers where a weight file's header is read, it ends in tensors or in modekit's own error, soon and small."""

from __future__ import annotations

import json
import logging
import struct
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter_folders import write_adapter
from modekit.errors import ModekitError
from modekit.sources.adapter import WEIGHTS_FILE
from modekit.sources.hub import Snapshot
from mutations import hostile_bytes, hostile_json, inputs, limited
from stand_in_hub import StandIn, point_at, serving

QUICK, SLOW = 60, 1_500
_SIZES = ["*", "²", "9" * 5_000, "-7", str(2**62), "8", ""]
_LIES = ["", "gzip", *(f"bytes 0-1/{size}" for size in _SIZES)]


@pytest.mark.parametrize("most", [QUICK, pytest.param(SLOW, marks=pytest.mark.slow)])
def test_only_own_errors_come_out(most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = (write_adapter(tmp_path / "lora") / WEIGHTS_FILE).read_bytes()
    length = 8 + struct.unpack("<Q", content[:8])[0]
    header, numbers, done = json.loads(content[8:length]), count(), []
    texts = hostile_bytes(st.one_of(st.just(content[8:length].decode()), hostile_json(header, most=2)))
    truth = f"bytes 0-{len(content) - 1}/{len(content)}"
    span = st.one_of(st.just(truth), st.just(truth), st.sampled_from(_LIES))
    sizes = st.sampled_from([0, 0, 0, 0, -1, 1, 2**20, 2**63])
    monkeypatch.setattr("time.sleep", lambda _: None)  # between tries
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)

    def answer(status: int, span: str, text: bytes, more: int, longer: int) -> bytes:
        """What goes through the socket; what the header says of its length, and of all that comes, may be another."""
        body = struct.pack("<Q", (len(text) + more) % 2**64) + text + content[length:]
        lines = [f"HTTP/1.1 {status} OK", f"Content-Length: {len(body) + longer}", "ETag: x"]
        lines += [f"Content-Range: {span}"] * bool(span)
        return "\r\n".join([*lines, "", ""]).encode() + body

    statuses = st.sampled_from([206] * 8 + [200, 200, 204, 302, 404, 416, 503, 999])

    with serving(StandIn(repos={"acme/lora": tmp_path / "lora"})) as hub:
        point_at(hub.url, tmp_path / "cache", monkeypatch)

        @inputs(most)
        @given(st.builds(answer, statuses, span, texts, sizes, st.sampled_from([0, 0, 0, -9, 5])))
        def run(raw: Any) -> None:
            hub.raw = raw
            folder = tmp_path / f"{next(numbers):040}"
            with limited():
                try:
                    Snapshot("acme/lora", folder, "law").header(folder / WEIGHTS_FILE, where="law")
                    done.append(True)
                except ModekitError as error:
                    assert len(str(error)) < 20_000
                    done.append(False)

        run()
    assert len(done) >= 0.95 * most and {*done} == {True, False}
