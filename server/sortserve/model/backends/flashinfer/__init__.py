"""FlashInfer's attention, by name: written to its documentation, and not run yet on any device."""
