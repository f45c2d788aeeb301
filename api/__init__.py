"""HTTP: translates between the contract and the core; decides nothing."""
