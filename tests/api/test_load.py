"""``GET /load``: what a router is told."""

from __future__ import annotations

from sortserve.replicas.load import EngineLoad
from support.http_service import HttpService


async def test_it_is_the_report_that_the_worker_gives(service: HttpService) -> None:
    document = (await service.get("/load")).json()

    load = EngineLoad.from_document(document)
    assert load == service.worker.load()
    assert [own.exit_layer for own in load.exits] == [2, 4, 6]
    assert load.is_accepting


async def test_a_server_that_drains_says_that_it_takes_nothing(service: HttpService) -> None:
    await service.worker.drain(1.0)

    assert (await service.get("/load")).json()["is_accepting"] is False


async def test_a_finished_answer_leaves_its_prefix(service: HttpService) -> None:
    prompt = "abcdefgh" * service.engine.kv_cache.block_size
    await service.post("/generate", {"prompt": prompt, "max_tokens": 1})
    await service.ended.wait_for(1)

    assert (await service.get("/load")).json()["prefixes"]
