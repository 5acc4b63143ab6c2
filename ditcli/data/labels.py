"""Which picture is of which class: CelebA's attribute list and metadata.jsonl or metadata.csv."""

from __future__ import annotations

import csv
import json
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditcli.config import suggest
from ditcli.errors import DataError


@dataclass(frozen=True)
class Listing:
    """What a list says: picture name (with /) -> index into `class_names`, or None where the list has no labels."""

    labels: dict[str, int | None]
    class_names: tuple[str, ...]


def read_attributes(path: Path, attribute: str) -> tuple[str, Listing]:
    """CelebA's list_attr_celeba.txt or Kaggle's .csv: the attribute's own spelling, and its two classes.

    The attribute may be written in any case and with hyphens. Raises `DataError` for one that the list lacks.
    """
    with_commas = path.suffix == ".csv"
    lines = _read_lines(path)
    header_line = 0 if with_commas else 1
    attributes = _split(lines[header_line], with_commas) if len(lines) > header_line else []
    if with_commas:
        attributes = attributes[1:]  # image_id
    if not attributes:
        raise DataError(f"{path} is truncated: it has no line of attribute names; fetch it again.")
    spelling = {_hyphenated(name): name for name in attributes}
    known = spelling.get(_hyphenated(attribute))
    if known is None:
        hint = suggest(attribute, attributes) or f" Known: {', '.join(attributes)}."
        raise DataError(f"label-attr is {attribute!r}, which {path} does not list.{hint}")

    column = attributes.index(known) + 1
    labels: dict[str, int | None] = {}
    for number, line in enumerate(lines[header_line + 1 :], start=header_line + 2):
        row = _split(line, with_commas)
        if not row:
            continue
        if len(row) != len(attributes) + 1 or row[column] not in ("1", "-1", "0"):
            raise DataError(f"{path}, line {number}: expected a file name and {len(attributes)} values of 1 or -1.")
        _add(labels, row[0], int(row[column] == "1"), path, number)
    return known, Listing(labels, _attribute_classes(known))


def read_metadata(path: Path) -> Listing:
    """metadata.jsonl or metadata.csv: `file_name`, and `label` where there are classes.

    Classes are sorted by name, by value where all are whole numbers. Raises `DataError` naming the line.
    """
    rows = _csv_rows(path) if path.suffix == ".csv" else _jsonl_rows(path)
    found: dict[str, int | None] = {}
    classes: dict[str, int] = {}
    unlabelled: int | None = None
    for number, row in rows:
        if not isinstance(row.get("file_name"), str) or not row["file_name"].strip():
            raise DataError(f"{path}, line {number}: no file_name.")
        label = _class_name(row.get("label"), path, number)
        if label is None:
            unlabelled = unlabelled or number
        _add(found, row["file_name"], None if label is None else classes.setdefault(label, len(classes)), path, number)
    if not found:
        raise DataError(f"{path} lists no pictures.")
    if not classes:
        return Listing(found, ())
    if unlabelled:
        raise DataError(
            f"{path}, line {unlabelled}: no label, though other lines have one; give every line a label or none."
        )
    in_order = sorted(classes, key=int if all(name.isdecimal() for name in classes) else None)
    index = {classes[name]: i for i, name in enumerate(in_order)}
    return Listing({name: index[label] for name, label in found.items() if label is not None}, tuple(in_order))


def _attribute_classes(attribute: str) -> tuple[str, str]:
    if attribute == "Male":
        return "female", "male"
    name = _hyphenated(attribute)
    return (name.removeprefix("no-") if name.startswith("no-") else f"not-{name}"), name


def _hyphenated(attribute: str) -> str:
    return attribute.strip().lower().replace("_", "-")


def _split(line: str, with_commas: bool) -> list[str]:
    return [cell.strip() for cell in line.split(",")] if with_commas and line.strip() else line.split()


def _add(labels: dict[str, int | None], name: str, label: int | None, path: Path, number: int) -> None:
    """Refuses a picture outside the folder and one that is listed twice."""
    inside = posixpath.normpath(name.strip())
    if inside.startswith(("/", "../")) or inside in ("..", ".") or "\0" in inside:
        raise DataError(f"{path}, line {number}: {name!r} leads out of the folder; file names are relative to it.")
    if inside in labels:
        raise DataError(f"{path}, line {number}: {name!r} is listed a second time.")
    labels[inside] = label


def _class_name(label: Any, path: Path, number: int) -> str | None:
    if label is None or label == "":
        return None
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, str | int) and str(label).strip():
        return str(label).strip()
    raise DataError(f"{path}, line {number}: label is {label!r}, but must be a name or a whole number.")


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: not JSON ({error}).") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: expected an object with file_name and label.")
        yield number, row


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(_read_lines(path, keep_ends=True), strict=True)
    try:
        header = [cell.strip() for cell in next(reader, [])]
        if "file_name" not in header:
            columns = ", ".join(header) or "none"
            raise DataError(
                f"{path} has the columns {columns}, but needs file_name, and label where there are classes."
            )
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{path}, line {reader.line_num}: {len(cells)} columns, but the header has {len(header)}."
                )
            yield reader.line_num, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}.") from error


def _read_lines(path: Path, keep_ends: bool = False) -> list[str]:
    """Lines of a UTF-8 file, with or without BOM; only newlines end them."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text ({error}).") from error
    lines = text.split("\n")
    return [line + "\n" for line in lines] if keep_ends else lines
