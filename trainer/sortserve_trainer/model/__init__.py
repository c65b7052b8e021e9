"""The model that is trained: trunk, exits, losses."""
