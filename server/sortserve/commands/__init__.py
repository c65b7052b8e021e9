"""What a person types beside ``serve``: the commands that ask a server, and shell completion."""
