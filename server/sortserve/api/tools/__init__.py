"""Tools of chat completions: what a client offers, what the model may call, what it has called."""
