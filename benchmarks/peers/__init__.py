"""Other servers under the same load, each in an environment of its own, measured in turns.

`catalogue` says who is compared and with which settings, `install` puts it on the machine, `run`
measures.
"""
