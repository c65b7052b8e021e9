"""What clients send: bounded, scanned, parsed, checked, and turned into what the engine takes."""
