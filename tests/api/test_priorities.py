"""Priorities and service tiers as clients send them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from sortserve.api.settings import ApiSettings
from sortserve.core.api_keys import KeyPolicy, key_digest
from sortserve.core.request import RequestReport
from sortserve.core.weights import KeyWeights, WeightRules
from support.http_service import HttpService, make_service

PATHS = ("/generate", "/v1/completions", "/v1/chat/completions")
LINE: dict[str, Any] = {"prompt": "a", "max_tokens": 1}


@pytest.fixture(name="service")
def _service() -> Iterator[HttpService]:
    service = make_service(
        api_keys=("plain", "batch"),
        key_weights={"batch": KeyWeights(default=0.5, most=1.0)},
        weight_rules=WeightRules(priority_base=2.0),
    )
    yield service
    service.worker.stop()


async def weigh(
    service: HttpService, body: dict[str, Any], *, key: str = "plain", path: str = "/generate"
) -> tuple[RequestReport, dict[str, Any]]:
    """The report of one request, and the reply."""
    if path.endswith("chat/completions"):
        body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, **body}
    else:
        body = {**LINE, **body}
    num_before = len(service.ended.reports)
    reply = await service.post(path, body, authorization=f"Bearer {key}")
    assert reply.status_code == 200, reply.text
    return (await service.ended.wait_for(num_before + 1))[-1], reply.json()


@pytest.mark.parametrize("path", PATHS)
async def test_tier_and_priority_become_the_weight_on_every_route(
    service: HttpService, path: str
) -> None:
    body = {"service_tier": "priority", "priority": 1}

    report, reply = await weigh(service, body, path=path)

    assert report.weight == 2.0
    assert reply["service_tier"] == "priority"


async def test_who_asks_for_nothing_has_a_weight_of_1_and_hears_of_no_tier(
    service: HttpService,
) -> None:
    report, reply = await weigh(service, {})

    assert report.weight == 1.0
    assert "service_tier" not in reply


async def test_a_key_has_its_own_default_and_is_cut_to_its_greatest_weight(
    service: HttpService,
) -> None:
    default, _ = await weigh(service, {}, key="batch")
    most, reply = await weigh(service, {"service_tier": "priority", "priority": -9}, key="batch")

    assert default.weight == 0.5
    assert most.weight == 1.0
    assert reply["service_tier"] == "default"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("priority", [-101, 101, 1.5, "1", True])
async def test_a_priority_is_an_integer_within_bounds(
    service: HttpService, path: str, priority: object
) -> None:
    body: dict[str, Any] = {"priority": priority}
    body |= {"messages": [{"role": "user", "content": "a"}]} if "chat" in path else LINE

    reply = await service.post(path, body, authorization="Bearer plain")

    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "priority"


def test_the_settings_name_a_key_by_its_digest_alone() -> None:
    settings = ApiSettings(
        served_model_name="tiny", api_keys=("k",), key_weights={"k": KeyWeights(most=2.0)}
    )

    [policy] = settings.key_policies
    assert policy == KeyPolicy(digests=(key_digest("k"),), weights=KeyWeights(most=2.0))
