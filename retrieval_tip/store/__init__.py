"""Read, check and write index folders, with their manifests and label stores."""
