"""Find the blocks and steps of any vision model by tracing a forward pass."""
