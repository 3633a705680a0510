"""What linear probes read from tokens, against the class embedding."""
