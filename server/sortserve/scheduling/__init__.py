"""What the next step runs: queues, pages, policies. No torch."""
