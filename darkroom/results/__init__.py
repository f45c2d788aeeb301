"""Results: a batch's manifest and its ZIP archive of images."""
