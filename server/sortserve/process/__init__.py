"""The server as a process: settings, start, signals, end."""
