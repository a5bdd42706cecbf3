"""Paths of two files that are one parallel text, said from another folder and for other people."""

from __future__ import annotations

from pathlib import Path

from modekit.recipes.paths import from_folder, sides_of, with_names


def test_each_side_is_moved_and_shortened(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for name in ("news.en", "news.fr", "c++.en", "c++.fr"):
        (tmp_path / "text" / name).write_text("a\n")
    recipe = {
        "base_model": "user/base",
        "experts": [{"name": "one", "model": "user/one", "text": "./text/news.en+./text/news.fr"}],
        "eval": {"other": ["text/c++.en+text/c++.fr", "user/data"]},
    }
    moved = from_folder(recipe, tmp_path, tmp_path / "out")
    assert moved["experts"][0]["text"] == "../text/news.en+../text/news.fr"
    assert moved["eval"]["other"] == ["../text/c++.en+../text/c++.fr", "user/data"]
    assert sides_of(moved["experts"][0]["text"], tmp_path / "text") == ("../text/news.en", "../text/news.fr")
    named = with_names(recipe, tmp_path)
    assert named["experts"][0]["text"] == "./news.en+./news.fr"
    assert named["eval"]["other"] == ["./c++.en+./c++.fr", "user/data"]
