"""What clients get: whole answers, streams, log probabilities, large JSON."""
