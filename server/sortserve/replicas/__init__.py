"""Several engines behind one address: what each says of itself, and who gets a request."""
