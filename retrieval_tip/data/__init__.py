"""Reading of images and of sources of labelled images or features, and their conversion to features."""
