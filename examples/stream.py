"""Print an answer as it comes, and stop it at the first line break."""

from sortserve_client import Budget, Client, SortserveError

with Client() as client:
    try:
        # Leaving the block closes the connection, and the server stops working on the request.
        with client.stream("Once upon a time", max_tokens=200, budget=Budget(tpot_ms=20)) as stream:
            for event in stream:
                print(event.text, end="", flush=True)
                if "\n" in event.text:
                    break
        print(f"\n[{len(stream.snapshot().text)} characters]")
    except SortserveError as error:
        print(f"\nNo answer: {error}")
