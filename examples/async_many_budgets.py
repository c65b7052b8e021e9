"""Many requests at once, each with a depth of its own, batched together by the server."""

import asyncio

from sortserve_client import AsyncClient, Budget


async def main() -> None:
    async with AsyncClient() as client:
        depths = [info.exit_layer for info in await client.exits()]
        answers = await asyncio.gather(
            *(
                client.generate(
                    "The sea is", max_tokens=24, temperature=0, budget=Budget(exit_layer=depth)
                )
                for depth in depths
            )
        )
    for depth, answer in zip(depths, answers, strict=True):
        tpot_ms = answer.budget.tpot_ms
        print(f"exit {depth:>3}  {tpot_ms} ms/token  {answer.text!r}")


asyncio.run(main())
