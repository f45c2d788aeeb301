"""Queue positions, throughput and ETAs, computed from shared snapshots of the queue."""
