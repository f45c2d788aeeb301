"""HTTP API: translates between the public contract and the core; decides nothing."""
