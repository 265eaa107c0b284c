"""Learn from the tags or albums of an Immich server, and suggest tags for its other photos."""
