"""Build, change, tune and copy indexes in folders and other stores."""
