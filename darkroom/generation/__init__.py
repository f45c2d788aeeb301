"""What an image is made of: parameters, models, pixels and metadata."""
