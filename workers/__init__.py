"""The working processes: Celery workers that form microbatches, and the replicas that draw."""
