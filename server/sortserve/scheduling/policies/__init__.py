"""The policies, a module each, and the table that alone knows them by name."""
