"""The checkpoint ``sorted-smollm2-135m``: files alone, which sortserve finds by an entry point."""
