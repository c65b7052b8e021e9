"""Whether a request gets in, and at which exit. No torch."""
