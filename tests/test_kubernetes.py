"""The manifests: strict against Kubernetes' published schemas, and as careful as they claim."""

import copy
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from launch.docker import knobs

FOLDER = Path(__file__).resolve().parents[1] / "launch" / "kubernetes"
FILES = sorted(FOLDER.glob("*.yaml"))
# A release of two years ago, and the newest that there is a schema of.
VERSIONS = ("1.32", kubernetes_validate.latest_version())

# LeaderWorkerSet is no part of Kubernetes, and no package carries its schema: these are the fields
# of its API v1. The pods inside are checked against Kubernetes' own schema.
_INTEGER = {"type": "integer", "minimum": 0}
_SPEC = {
    "type": "object",
    "additionalProperties": False,
    "required": ["leaderWorkerTemplate"],
    "properties": {
        "replicas": _INTEGER,
        "startupPolicy": {"enum": ["LeaderCreated", "LeaderReady"]},
        "rolloutStrategy": {
            "type": "object",
            "additionalProperties": False,
            "required": ["type"],
            "properties": {
                "type": {"enum": ["RollingUpdate"]},
                "rollingUpdateConfiguration": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "partition": _INTEGER,
                        "maxUnavailable": {"type": ["integer", "string"]},
                        "maxSurge": {"type": ["integer", "string"]},
                    },
                },
            },
        },
        "networkConfig": {
            "type": "object",
            "additionalProperties": False,
            "required": ["subdomainPolicy"],
            "properties": {"subdomainPolicy": {"enum": ["Shared", "UniquePerReplica"]}},
        },
        "leaderWorkerTemplate": {
            "type": "object",
            "additionalProperties": False,
            "required": ["workerTemplate"],
            "properties": {
                "leaderTemplate": {"type": "object"},
                "workerTemplate": {"type": "object"},
                "size": {"type": "integer", "minimum": 1},
                "restartPolicy": {
                    "enum": ["RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"]
                },
                "volumeClaimTemplates": {"type": "array", "items": {"type": "object"}},
                "persistentVolumeClaimRetentionPolicy": {"type": "object"},
                "subGroupPolicy": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "subGroupPolicyType": {"enum": ["LeaderWorker", "LeaderExcluded"]},
                        "subGroupSize": {"type": "integer", "minimum": 1},
                    },
                },
            },
        },
    },
}


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def manifests() -> list[Any]:
    return [
        pytest.param(document, id=f"{path.stem}-{document['kind']}")
        for path in FILES
        for document in documents(path)
    ]


def check(document: dict[str, Any], version: str) -> None:
    """Validate; an unknown field is an error.

    Raises:
        jsonschema.ValidationError: naming the field.
    """
    if document["kind"] != "LeaderWorkerSet":
        kubernetes_validate.validate(document, version, strict=True)
        return
    assert document["apiVersion"] == "leaderworkerset.x-k8s.io/v1"
    assert set(document) == {"apiVersion", "kind", "metadata", "spec"}
    jsonschema.validate(document["spec"], _SPEC)
    template = document["spec"]["leaderWorkerTemplate"]
    for role in ("leaderTemplate", "workerTemplate"):
        if role in template:
            check({**_head("PodTemplate"), "template": template[role]}, version)
    for claim in template.get("volumeClaimTemplates", []):
        check({**_head("PersistentVolumeClaim"), **claim}, version)


def _head(kind: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": kind, "metadata": {"name": "inside"}}


def pod_template(path: Path) -> dict[str, Any]:
    """Return the one pod template of a file."""
    specs = [document["spec"] for document in documents(path)]
    (template,) = (
        spec.get("leaderWorkerTemplate", {}).get("workerTemplate") or spec["template"]
        for spec in specs
        if {"template", "leaderWorkerTemplate"} & set(spec)
    )
    return template


each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("document", manifests())
def test_manifest_is_valid(document, version):
    check(document, version)


@pytest.mark.parametrize("document", manifests())
def test_an_unknown_field_is_an_error(document):
    wrong = copy.deepcopy(document)
    template = wrong["spec"].get("leaderWorkerTemplate", {}).get("workerTemplate")
    (template or wrong)["spec"]["replica"] = 1
    with pytest.raises(jsonschema.ValidationError, match="replica"):
        check(wrong, VERSIONS[-1])


@each_file
def test_pods_are_confined(path):
    template = pod_template(path)
    pod = template["spec"]
    assert pod["enableServiceLinks"] is False
    assert pod["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostIPC", "hostPID"} & set(pod)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == 10001
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"/cache", "/dev/shm", "/tmp"}


@each_file
def test_pods_have_time_to_start_and_to_stop(path):
    template = pod_template(path)
    pod = template["spec"]
    (container,) = pod["containers"]
    probe = container["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 1800
    (stop_s,) = (int(knob.default) for knob in knobs.table() if knob.name == "STOP_SECONDS")
    assert pod["terminationGracePeriodSeconds"] > stop_s + 5 + 10


@each_file
def test_the_entrypoint_accepts_what_pods_set(path):
    template = pod_template(path)
    (container,) = template["spec"]["containers"]
    environment = {each["name"]: each.get("value", "") for each in container["env"]}
    # As Kubernetes does, with what a LeaderWorkerSet gives its second pod.
    given = {"LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "1", "LWS_LEADER_ADDRESS": "leader.set"}
    arguments = container.get("args", [])
    for name, value in given.items():
        arguments = [argument.replace(f"$({name})", value) for argument in arguments]
    settings = knobs.read({**environment, **given}, arguments)
    assert settings.port == container["ports"][0]["containerPort"]
    assert "$(" not in " ".join(knobs.server_command(settings, 8))


@each_file
def test_services_find_their_pods(path):
    (service,) = (each for each in documents(path) if each["kind"] == "Service")
    template = pod_template(path)
    ports = {port["name"] for port in template["spec"]["containers"][0]["ports"]}
    assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    labels = dict(template["metadata"]["labels"])
    # The set labels its pods itself, and makes a Service of its own name.
    for each in documents(path):
        if each["kind"] == "LeaderWorkerSet":
            labels["leaderworkerset.sigs.k8s.io/name"] = each["metadata"]["name"]
            labels["leaderworkerset.sigs.k8s.io/worker-index"] = "0"
            assert each["metadata"]["name"] != service["metadata"]["name"]
    assert service["spec"]["selector"].items() <= labels.items()


def test_the_pipeline_has_as_many_stages_as_nodes():
    (lws,) = (each for each in documents(FOLDER / "pipeline.yaml") if "replicas" in each["spec"])
    template = lws["spec"]["leaderWorkerTemplate"]
    (container,) = template["workerTemplate"]["spec"]["containers"]
    assert f"--pp-size={template['size']}" in container["args"]
    environment = {each["name"]: each.get("value") for each in container["env"]}
    assert environment["TP"] == str(container["resources"]["limits"]["nvidia.com/gpu"])
