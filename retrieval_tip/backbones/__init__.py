"""Image and text encoders, and the prompts for class names."""
