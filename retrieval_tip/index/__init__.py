"""Build, change and copy indexes in folders and in other stores."""
