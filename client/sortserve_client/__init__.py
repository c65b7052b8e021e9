"""Typed client of a sortserve server."""
