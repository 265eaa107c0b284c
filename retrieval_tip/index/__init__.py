"""Build, change, tune and copy indexes in folders and in other stores."""
