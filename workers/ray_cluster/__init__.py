"""Connection to the Ray cluster, its key-value store, and routing to deployments."""
