"""From what the user named to weights, exits and a tokenizer."""
