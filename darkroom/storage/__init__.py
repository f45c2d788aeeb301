"""Objects in S3: images and compiled models."""
