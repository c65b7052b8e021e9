"""One question, three budgets. Start a server first: ``sortserve serve``."""

from sortserve_client import Budget, Client

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]

with Client() as client:
    exits = client.exits()
    print("The server has the exits", [info.exit_layer for info in exits])

    budgets = {
        "no budget": None,
        "nine tenths of the compute": Budget(compute=0.9),
        "half a second": Budget(latency_ms=500, on_miss="truncate"),
    }
    for name, budget in budgets.items():
        answer = client.generate(messages=QUESTION, max_tokens=32, temperature=0, budget=budget)
        spent = answer.budget
        print(f"{name}: exit {spent.exit_layer}, {spent.actual_ms} ms\n  {answer.text!r}")
