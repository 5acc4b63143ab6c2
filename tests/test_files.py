"""Files are there whole or not at all."""

from __future__ import annotations

import pytest

from ditcli.files import remove_partials, replacing, write_text


@pytest.mark.parametrize("lasting", [True, False])
def test_a_file_is_replaced_by_what_was_written_and_nothing_is_left_beside_it(tmp_path, lasting):
    path = tmp_path / "a.txt"
    for text in ("first", "second"):
        with replacing(path, lasting=lasting) as partial:
            partial.write_text(text)
            assert not path.exists() or path.read_text() == "first"
        assert path.read_text() == text
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_block_that_raises_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "first")

    def fail() -> None:
        with replacing(path) as partial:
            partial.write_text("half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.txt", "first")]


def test_what_killed_processes_left_is_cleared_and_nothing_else(tmp_path):
    names = [".a.txt.4194300.partial", "b.partial", ".c.txt"]
    for name in names:
        (tmp_path / name).write_text("x")
    (tmp_path / ".d.1.partial").mkdir()
    remove_partials(tmp_path)
    remove_partials(tmp_path / "is-not-there")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*names[1:], ".d.1.partial"])
