"""The tuned table as YAML that people commit, ship, compare and edit: one measurement a line.

Written by own code, so that the same table is the same text and a change to it is a small one.
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from sglang_tokenweave.plan import Kind, Mode
from sglang_tokenweave.tuning.nodes import Node, TableError, compose
from sglang_tokenweave.tuning.table import Bucket, Candidate, Key, Measurement, Table

FORMAT = 2
MOST_BYTES = 256 * 1024  # ten times a usual table
_FIELDS = ("format", "measured_at", "key", "buckets")
_CANDIDATE = (("kind",), ("cut_offset", "ctas", "fuse_ctas"))


def read_file(path: Path) -> tuple[Table, str]:
    """Return the table of a file, and its text.

    Raises:
        TableError: the file cannot be read, or is no table; the error names the path.
    """
    try:
        with open(path, "rb") as stream:
            content = stream.read(MOST_BYTES + 1)
        text = content.decode()
    except (OSError, ValueError) as error:
        raise TableError(f"table {path}: cannot be read: {error}") from error
    try:
        return from_text(text), text
    except TableError as error:
        raise TableError(f"table {path}, {error}") from error


def from_text(text: str) -> Table:
    """Read a table that `to_text` or a person wrote.

    Raises:
        TableError: naming line and field.
    """
    if len(text.encode(errors="replace")) > MOST_BYTES:
        raise TableError(f"line 1: the text is longer than {MOST_BYTES} bytes")
    root = compose(text)
    parts = root.mapping(_FIELDS)
    version = parts["format"].integer()
    if version != FORMAT:
        raise parts["format"].error(f"got {version}; this release reads {FORMAT}: tune again")
    return root.build(
        Table,
        {
            "key": _read_key(parts["key"]),
            "measured_at": parts["measured_at"].word(),
            "buckets": tuple(_read_bucket(each) for each in parts["buckets"].sequence()),
        },
        parts,
    )


def to_text(table: Table) -> str:
    """Return the table as YAML, the same text for the same table."""
    lines = [
        "# Times in us. `chosen` may be edited: it must be one of `measured`.",
        f"format: {FORMAT}",
        f"measured_at: {json.dumps(table.measured_at)}",
        "key:",
        *(f"  {field.name}: {json.dumps(getattr(table.key, field.name))}" for field in fields(Key)),
        "buckets:" if table.buckets else "buckets: []",
    ]
    for bucket in table.buckets:
        lines += [
            f"- mode: {bucket.mode}",
            f"  tokens: {bucket.tokens}",
            f"  chosen: {{{_candidate(bucket.chosen)}}}",
            "  measured:",
            *(
                f"  - {{{_candidate(each.candidate)}, us: {each.us:.1f}, "
                f"spread_us: {each.spread_us:.1f}, rounds: {each.rounds}}}"
                for each in bucket.measured
            ),
        ]
    return "\n".join(lines) + "\n"


def _candidate(candidate: Candidate) -> str:
    """Return the fields that are not what they are by default, and a 0 that means something."""
    values = {field.name: getattr(candidate, field.name) for field in fields(Candidate)}
    default = {field.name: field.default for field in fields(Candidate)}
    told = {"ctas"} if candidate.needs_copy_engines else set()
    told |= {"fuse_ctas"} if candidate.is_one_shot else set()
    return ", ".join(
        f"{name}: {value}"
        for name, value in values.items()
        if value != default[name] or name in told
    )


def _read_key(node: Node) -> Key:
    parts = node.mapping([field.name for field in fields(Key)])
    values = {
        field.name: parts[field.name].word() if field.type is str else parts[field.name].integer()
        for field in fields(Key)
    }
    return node.build(Key, values, parts)


def _read_bucket(node: Node) -> Bucket:
    parts = node.mapping([field.name for field in fields(Bucket)])
    chosen = parts["chosen"]
    return node.build(
        Bucket,
        {
            "mode": parts["mode"].member(Mode),
            "tokens": parts["tokens"].integer(),
            "chosen": _read_candidate(chosen, chosen.mapping(*_CANDIDATE)),
            "measured": tuple(_read_measurement(each) for each in parts["measured"].sequence()),
        },
        parts,
    )


def _read_measurement(node: Node) -> Measurement:
    parts = node.mapping((*_CANDIDATE[0], "us", "spread_us", "rounds"), _CANDIDATE[1])
    values = {
        "candidate": _read_candidate(node, parts),
        "us": parts["us"].number(),
        "spread_us": parts["spread_us"].number(),
        "rounds": parts["rounds"].integer(),
    }
    return node.build(Measurement, values, parts)


def _read_candidate(node: Node, parts: Mapping[str, Node]) -> Candidate:
    values: dict[str, Any] = {"kind": parts["kind"].member(Kind)}
    for name in _CANDIDATE[1]:
        if name in parts:
            values[name] = parts[name].integer()
    return node.build(Candidate, values, parts)
