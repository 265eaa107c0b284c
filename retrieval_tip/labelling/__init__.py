"""Choose which photos to label next."""
