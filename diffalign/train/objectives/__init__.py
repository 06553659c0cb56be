"""One paper, one file: a frozen config, the pure loss, and what the loop asks of it."""
