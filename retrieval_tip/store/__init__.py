"""Index folders: manifests, labels, reading, checking and writing."""
