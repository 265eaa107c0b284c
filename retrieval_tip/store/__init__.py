"""An index folder's bytes: manifest, labels, reading, checking and writing."""
