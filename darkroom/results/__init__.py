"""What a batch gives back: manifest and ZIP archive."""
