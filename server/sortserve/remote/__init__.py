"""Engines in other processes behind the interface of one in this: a client of them, and a host.

Nothing here knows what carries the messages; ``sortserve.ray`` does.
"""
