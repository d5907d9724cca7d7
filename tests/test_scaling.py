"""The numbers of docs/scaling.md are those that its formulas give."""

import subprocess
import sys
from pathlib import Path

import pytest
import sizing

PAGE = Path(__file__).parent.parent / "docs/scaling.md"


@pytest.mark.parametrize("table", sizing.TABLES, ids=lambda table: table.__name__)
def test_the_page_has_the_table(table):
    assert table() in PAGE.read_text(), f"{PAGE.name} must have\n{table()}"


def test_the_text_has_the_constants():
    text = PAGE.read_text()
    buffer = 8192 * 8192 * sizing.BYTES
    for number in (
        f"{sizing.MEMORY_SHARE:.0%} of its memory",
        f"{buffer / 1e6:.0f} MB at 8192 tokens and a hidden size of 8192",
        f"batch of {sizing.BATCH} tokens",
        f"NVLink at {sizing.NVLINK / 1e9:.0f} GB/s",
        f"nominal {sizing.NIC / 1e9:.0f} GB/s",
    ):
        assert number in text


def test_parameters_are_the_published_ones():
    published = {  # billions, of the models' cards
        "Llama-3-8B": 8.0,
        "Llama-3.3-70B": 70.6,
        "Mixtral-8x22B": 141,
        "Qwen3-235B-A22B": 235,
    }
    found = {model.name: model.parameters / 1e9 for model in sizing.MODELS}
    assert found == pytest.approx(published, rel=0.005)


def test_tp_over_hosts_sends_as_many_times_more_as_there_are_layers():
    for model in sizing.MODELS:
        across = model.layers * model.all_reduce_bytes(2) / sizing.HOST
        assert across / model.boundary_bytes(sizing.HOST) == model.layers


def test_tables_are_printed():
    done = subprocess.run(
        [sys.executable, sizing.__file__], capture_output=True, text=True, timeout=60, check=True
    )
    assert all(table() in done.stdout for table in sizing.TABLES)
