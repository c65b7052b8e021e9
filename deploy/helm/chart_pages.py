"""Writes what follows from other files: the chart's ``values.schema.json`` and its README's table.

    python deploy/helm/chart_pages.py

The settings under ``config`` are those of ``sortserve serve``, with their types and ranges, so that
Helm refuses a wrong one before any pod is made. ``tests/deploy`` holds both files to this.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from sortserve.process.config import ServeSettings
from sortserve.process.sources import key_name

CHART = Path(__file__).parent / "sortserve"
Schema = dict[str, Any]

CHARTS_OWN = (
    "model",
    "host",
    "port",
    "uds",
    "ssl_certfile",
    "ssl_keyfile",
    "api_key",
    "api_key_file",
    "api_keys_file",
    "config",
    "replicas",
    "max_replicas",
)
"""Settings that the chart makes from other values; pods are replicas here."""

TEXT: Schema = {"type": "string"}
BOOLEAN: Schema = {"type": "boolean"}
NAME: Schema = {
    "type": "string",
    "maxLength": 253,
    "pattern": "^([a-z0-9]([-a-z0-9.]*[a-z0-9])?)?$",
}
QUANTITY: Schema = {
    "type": ["string", "number"],
    "pattern": "^[0-9]+(\\.[0-9]+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?$",
}
DURATION: Schema = {"type": "string", "pattern": "^([0-9]+(ms|s|m|h))+$"}
STRINGS: Schema = {"type": "object", "additionalProperties": TEXT}
OBJECT: Schema = {"type": "object"}
"""Of Kubernetes: its own schema tells what may be in there."""
SHARE_OR_COUNT: Schema = {
    "anyOf": [
        {"type": "integer", "minimum": 0},
        {"type": "string", "pattern": "^[0-9]{1,3}%$"},
        {"type": "null"},
    ]
}
RESOURCES: Schema = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "requests": {"type": "object", "additionalProperties": QUANTITY},
        "limits": {"type": "object", "additionalProperties": QUANTITY},
        "claims": {"type": "array", "items": OBJECT},
    },
}


def count(minimum: int = 0, maximum: int | None = None) -> Schema:
    """An integer."""
    return {"type": "integer", "minimum": minimum} | ({"maximum": maximum} if maximum else {})


def one_of(*values: str) -> Schema:
    """One of some words."""
    return {"enum": list(values)}


def items(schema: Schema = OBJECT) -> Schema:
    """A list."""
    return {"type": "array", "items": schema}


def closed(required: tuple[str, ...] = (), /, **properties: Schema) -> Schema:
    """An object with these keys and no others."""
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        **({"required": list(required)} if required else {}),
    }


def settings_schema() -> Schema:
    """Of ``config``: the settings of ``sortserve serve``, by flag name."""
    properties = {}
    for field, schema in ServeSettings.model_json_schema()["properties"].items():
        if field not in CHARTS_OWN:
            about = " ".join(schema.get("description", "").split())
            properties[key_name(field)] = {**_plain(schema), "description": about}
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _plain(schema: Schema) -> Schema:
    """Without what is no JSON Schema, and with the texts that the server takes for lists."""
    kept = {k: v for k, v in schema.items() if k not in {"default", "title", "ge", "le", "format"}}
    if "anyOf" in kept:
        kept["anyOf"] = [_plain(part) for part in kept["anyOf"]]
    if kept.get("type") == "array":
        kept.pop("minLength", None)
        return {"anyOf": [kept, {"type": "string"}]}
    return kept


def named_key_schema() -> Schema:
    """An entry of ``--api-keys-file``; the server has the last word."""
    digest = {"type": "string", "pattern": "^[0-9a-fA-F]{64}$"}
    limit = count(1)
    return closed(
        ("name", "sha256"),
        name={"type": "string", "pattern": "^[A-Za-z0-9._@/-]+$"},
        sha256={"anyOf": [digest, {"type": "array", "items": digest, "minItems": 1}]},
        requests_per_minute=limit,
        tokens_per_minute=limit,
        max_concurrency=limit,
        max_exit_layer=limit,
        default_priority={"type": "integer"},
        max_priority={"type": "integer"},
    )


def values_schema() -> Schema:
    """``values.schema.json``."""
    probe = closed(
        periodSeconds=count(1),
        timeoutSeconds=count(1),
        failureThreshold=count(1),
        initialDelaySeconds=count(0),
        successThreshold=count(1),
    )
    secret = closed(existingSecret=NAME, secretKey=TEXT)
    env = items(
        closed(("name",), name={"type": "string", "minLength": 1}, value=TEXT, valueFrom=OBJECT)
    )
    volume = closed(sizeLimit=QUANTITY)
    ingress_path = closed(
        ("path", "pathType"),
        path=TEXT,
        pathType=one_of("Prefix", "Exact", "ImplementationSpecific"),
    )
    values = closed(
        mode=one_of("deployment", "ray"),
        nameOverride=NAME,
        fullnameOverride=NAME,
        commonLabels=STRINGS,
        replicaCount={"type": ["integer", "null"], "minimum": 0},
        image=closed(
            repository={"type": "string", "minLength": 1},
            tag={"type": "string", "pattern": "^[A-Za-z0-9_.-]{0,128}$"},
            digest={"type": "string", "pattern": "^(sha256:[0-9a-f]{64})?$"},
            pullPolicy=one_of("Always", "IfNotPresent", "Never"),
        ),
        imagePullSecrets=items(closed(("name",), name=NAME)),
        model=closed(
            source=one_of("baked", "pvc", "pull"),
            name=TEXT,
            pvc=closed(
                claimName=NAME, path={"type": "string", "pattern": "^([^/.][^/]*(/[^/.][^/]*)*)?$"}
            ),
            pull=closed(
                repo=TEXT,
                revision=TEXT,
                tokenSecret=closed(name=NAME, key=TEXT),
                command=items(TEXT),
                image=TEXT,
                env=env,
                resources=RESOURCES,
                sizeLimit=QUANTITY,
            ),
        ),
        config={"$ref": "#/definitions/settings"},
        listenHost={"type": "string", "minLength": 1},
        auth=closed(
            keys=closed(existingSecret=NAME, secretKey=TEXT, inline=items(named_key_schema())),
            apiKey=secret,
        ),
        tls=closed(existingSecret=NAME),
        gpu=closed(enabled=BOOLEAN, count=count(1, 64), resourceName=TEXT),
        resources=RESOURCES,
        cache=closed(
            sizeLimit=QUANTITY,
            maxSize={"type": "string", "pattern": "^[0-9.]+ *[KMGT]i?B$"},
            existingClaim=NAME,
        ),
        tmp=volume,
        shm=volume,
        preStopSeconds=count(0),
        terminationGracePeriodSeconds={"type": ["integer", "null"], "minimum": 0},
        probes=closed(startup=probe, readiness=probe, liveness=probe),
        updateStrategy=closed(type=one_of("RollingUpdate", "Recreate"), rollingUpdate=OBJECT),
        revisionHistoryLimit=count(),
        minReadySeconds=count(),
        service=closed(
            type=one_of("ClusterIP", "NodePort", "LoadBalancer"),
            port=count(1, 65535),
            annotations=STRINGS,
        ),
        ingress=closed(
            enabled=BOOLEAN,
            className=TEXT,
            annotations=STRINGS,
            hosts=items(closed(("host",), host=TEXT, paths=items(ingress_path))),
            tls=items(closed(hosts=items(TEXT), secretName=NAME)),
        ),
        autoscaling=closed(
            enabled=BOOLEAN,
            minReplicas=count(1),
            maxReplicas=count(1),
            targetPressure={"type": "number", "minimum": 0, "maximum": 10},
            targetWaiting={"type": "number", "minimum": 0},
            metricType=one_of("Pods", "External"),
            extraMetrics=items(),
            behavior=OBJECT,
        ),
        podDisruptionBudget=closed(
            enabled=BOOLEAN, maxUnavailable=SHARE_OR_COUNT, minAvailable=SHARE_OR_COUNT
        ),
        serviceMonitor=closed(
            enabled=BOOLEAN,
            interval=DURATION,
            scrapeTimeout=DURATION,
            labels=STRINGS,
            metricRelabelings=items(),
        ),
        prometheusRule=closed(enabled=BOOLEAN, labels=STRINGS),
        networkPolicy=closed(
            enabled=BOOLEAN,
            monitoring=items(),
            egress=items(),
            restrictEgress=BOOLEAN,
            **{"from": items()},
        ),
        serviceAccount=closed(create=BOOLEAN, name=NAME, annotations=STRINGS),
        podSecurityContext=OBJECT,
        securityContext=OBJECT,
        podLabels=STRINGS,
        podAnnotations=STRINGS,
        nodeSelector=STRINGS,
        tolerations=items(),
        affinity=OBJECT,
        topologySpreadConstraints=items(),
        priorityClassName=TEXT,
        runtimeClassName=TEXT,
        schedulerName=TEXT,
        extraEnv=env,
        extraEnvFrom=items(),
        extraArgs=items(TEXT),
        extraVolumes=items(),
        extraVolumeMounts=items(),
        extraInitContainers=items(),
        extraContainers=items(),
        extraObjects=items(),
        ray=closed(
            version={"type": "string", "pattern": "^[0-9]+\\.[0-9]+\\.[0-9]+"},
            importPath={"type": "string", "pattern": "^[\\w.]+:\\w+$"},
            deployments=items(),
            head=closed(resources=RESOURCES),
            worker=closed(replicas=count(), minReplicas=count(), maxReplicas=count(1)),
            enableInTreeAutoscaling=BOOLEAN,
            clusterDeletionDelaySeconds=count(),
            operatorNamespace=NAME,
        ),
        tests=closed(enabled=BOOLEAN),
        # Of Helm, for charts that have this one as a part.
        **{"global": OBJECT},
    )
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",  # which older Helms know, too
        "title": "Values of the chart sortserve",
        **values,
        "definitions": {"settings": settings_schema()},
    }


def schema_text() -> str:
    """The file's text."""
    return json.dumps(values_schema(), indent=1, ensure_ascii=False) + "\n"


def values_table() -> str:
    """The README's table: each value with a comment or a plain default in ``values.yaml``."""
    rows = ["| value | default | |", "|---|---|---|"]
    comment: list[str] = []
    path: list[str] = []
    for line in (CHART / "values.yaml").read_text(encoding="utf-8").splitlines():
        if line.strip().startswith("#"):
            comment.append(line.strip().lstrip("#").strip())
        elif match := re.fullmatch(r"( *)([\w-]+):\s*(.*)", line):
            depth = len(match[1]) // 2
            path = [*path[:depth], match[2]]
            if match[3] or comment:
                default = f"`{match[3]}`" if match[3] else ""
                about = " ".join(comment).replace("|", "\\|")
                rows.append(f"| `{'.'.join(path)}` | {default} | {about} |")
            comment = []
        elif not line.strip():
            comment = []
    return "\n".join(rows) + "\n"


def readme_text(old: str) -> str:
    """The README with its table made anew."""
    head, _, _ = old.partition("## Values\n")
    about = "This table is generated from `values.yaml`: `make docs`.\n"
    return f"{head}## Values\n\n{about}\n{values_table()}"


if __name__ == "__main__":
    readme = CHART / "README.md"
    (CHART / "values.schema.json").write_text(schema_text(), encoding="utf-8")
    readme.write_text(readme_text(readme.read_text(encoding="utf-8")), encoding="utf-8")
