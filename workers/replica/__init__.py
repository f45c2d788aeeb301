"""Inside a Ray Serve replica: the Triton server and what feeds it."""
