"""Long-running processes: Celery workers, Ray Serve replicas, maintenance, webhook sender."""
