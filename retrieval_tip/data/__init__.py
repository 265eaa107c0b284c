"""Read images, feature tables and other sources, and turn them into features."""
