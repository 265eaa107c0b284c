"""Data: images, and sources of labelled images or features, turned into features."""
