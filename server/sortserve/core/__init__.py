"""The vocabulary of every layer: requests, budgets, errors, plans. No torch."""
