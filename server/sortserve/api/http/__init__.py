"""The connection and what wraps every request: protocol, hosts, keys, ids, errors."""
