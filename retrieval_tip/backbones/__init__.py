"""Backbones, which turn images and text into features, and the prompts for class names."""
