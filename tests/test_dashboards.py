"""The dashboard and the alert rules use metrics and labels that a woven server really has."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import workloads
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from prometheus_client.parser import text_string_to_metric_families
from server import Server

LAUNCH = Path(__file__).resolve().parents[1] / "launch"
DASHBOARD = json.loads((LAUNCH / "grafana" / "tokenweave.json").read_text())
RULES = yaml.safe_load((LAUNCH / "prometheus" / "alerts.yaml").read_text())
ALERTS = [rule for group in RULES["groups"] for rule in group["rules"]]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = {
    **{
        f"panel {panel['title']} {target['refId']}": target["expr"]
        for panel in PANELS
        for target in panel["targets"]
    },
    **{f"alert {rule['alert']}": rule["expr"] for rule in ALERTS},
}
# What Prometheus adds to each series when it scrapes, and the series it makes itself.
SCRAPED_LABELS = {"job", "instance"}
SCRAPED_METRICS = {"up": {"job", "instance"}}

FLAGS = (
    *("--tokenweave-min-tokens", "64", "--tokenweave-fuse-min-tokens", "8"),
    *("--tokenweave-decode-min-tokens", "4", "--enable-metrics"),
    # So that a batch falls back: SGLang takes input embeddings without a radix cache only, and in
    # bfloat16 only.
    *("--disable-radix-cache", "--dtype", "bfloat16"),
)


@pytest.fixture(scope="module")
def metrics(model: Callable[[str], Path]) -> dict[str, set[str]]:
    """Return what a woven server exposes: names of series to names of labels."""
    with Server(model("llama"), flags=FLAGS) as server:
        for work in ("long_prompt", "decode", "streamed"):
            workloads.run(server, work)
        embeddings = [[0.01] * 256] * 100  # of the tiny model's hidden size
        server.generate(input_embeds=embeddings, sampling_params={"max_new_tokens": 2})
        state = server.tokenweave()
        assert state is not None
        assert state["fallbacks"] == {"input embeddings": 1}
        text = server.request("/metrics").text
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.mark.server
@pytest.mark.parametrize("where", EXPRESSIONS)
def test_metrics_and_labels_exist(where: str, metrics: dict[str, set[str]]) -> None:
    for metric, labels in _used(promql_parser.parse(_without_variables(EXPRESSIONS[where]))):
        known = SCRAPED_METRICS.get(metric) or metrics.get(metric)
        assert known, f"{metric} is not among the server's metrics"
        assert labels - known - SCRAPED_LABELS == set(), f"{metric} has no such label"


@pytest.mark.server
def test_every_metric_of_ours_is_on_the_dashboard(metrics: dict[str, set[str]]) -> None:
    ours = {name for name in metrics if name.startswith("sglang:tokenweave_")}
    assert len(ours) == 4
    shown = " ".join(text for where, text in EXPRESSIONS.items() if where.startswith("panel"))
    assert [name for name in ours if name not in shown] == []


@pytest.mark.server
def test_variables_ask_for_labels_that_exist(metrics: dict[str, set[str]]) -> None:
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            metric, label = re.fullmatch(
                r"label_values\((\S+), (\w+)\)", variable["query"]
            ).groups()
            assert label in metrics[metric] | SCRAPED_LABELS


def test_a_wrong_label_would_be_seen() -> None:
    """The reader of expressions finds matchers, groupings and joins, at any depth."""
    text = 'sum by (a) (rate(x{b="1"}[5m])) / on (c) (y offset 1h) unless ignoring (d) max(z) > 1'
    used = _used(promql_parser.parse(text))
    assert {metric: labels & set("abcd") for metric, labels in used} == {
        "x": {"a", "b", "c", "d"},
        "y": {"c", "d"},
        "z": {"d"},
    }


def test_dashboard_is_one_that_grafana_knows() -> None:
    """Grafana's own model reads every field: nothing of ours is lost on the way through it."""
    register_default_plugins()
    back = json.loads(JSONEncoder(sort_keys=True).encode(Dashboard.from_json(DASHBOARD)))
    assert _lost(DASHBOARD, back) == []
    assert _lost({"a": [{"b": 1}]}, {"a": [{"c": 1}]}) == [".a[0].b"]


def test_panels_have_what_they_need() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    for panel in PANELS:
        assert panel["title"]
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references)
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"]
            used = set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval"}
            assert used <= variables


def test_panels_do_not_overlap() -> None:
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    for place in places:
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24
    for one, other in combinations(places, 2):
        apart = any(
            a[axis] + a[size] <= b[axis]
            for axis, size in (("x", "w"), ("y", "h"))
            for a, b in ((one, other), (other, one))
        )
        assert apart, (one, other)


def test_alerts_say_what_to_do() -> None:
    names = [rule["alert"] for rule in ALERTS]
    assert len(set(names)) == len(names)
    for rule in ALERTS:
        assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
        assert re.fullmatch(r"\d+[smh]", rule["for"])
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}
        # A label that the summary shows survives the rule's own grouping.
        for label in re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]):
            assert rf"by ({label}" in rule["expr"] or "by (" not in rule["expr"], rule["alert"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_alerts_fire_when_they_should() -> None:
    rules = LAUNCH / "prometheus" / "alerts_test.yaml"
    done = subprocess.run(
        ["promtool", "test", "rules", rules], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _without_variables(expression: str) -> str:
    return (
        expression.replace("$__rate_interval", "5m")
        .replace("$model", "x")
        .replace("$instance", "x")
    )


def _used(expression: Any, outer: frozenset[str] = frozenset()) -> list[tuple[str, set[str]]]:
    """Return every series that an expression reads and the labels that it wants of it."""
    if isinstance(expression, promql_parser.VectorSelector):
        matched = {matcher.name for matcher in expression.matchers.matchers}
        return [(expression.name, matched | outer)]
    inner = outer | _labels_of(expression)
    children = [
        getattr(expression, name, None) for name in ("expr", "lhs", "rhs", "vector_selector")
    ]
    children += getattr(expression, "args", None) or []
    return [used for child in children if child is not None for used in _used(child, inner)]


def _labels_of(expression: Any) -> set[str]:
    """Return the labels that a grouping or a join names."""
    modifier = getattr(expression, "modifier", None)
    matching = getattr(modifier, "matching", modifier)
    return set(getattr(matching, "labels", None) or ())


def _lost(ours: Any, theirs: Any, where: str = "") -> list[str]:
    """Return where `theirs` lacks or changes what `ours` holds."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        pairs = [(f"{where}.{key}", ours[key], theirs.get(key)) for key in ours]
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = [(f"{where}[{i}]", *pair) for i, pair in enumerate(zip(ours, theirs, strict=True))]
    else:
        return [] if ours == theirs else [where]
    return [lost for place, a, b in pairs for lost in _lost(a, b, place)]
