"""Data: images, sources of labelled images or features, and how they become features."""
