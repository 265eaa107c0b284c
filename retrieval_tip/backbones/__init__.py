"""Backbones: what turns images and words into features, and the prompts that words are put into."""
