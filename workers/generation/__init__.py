"""One microbatch, from claim to settle."""
