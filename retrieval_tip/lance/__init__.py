"""Keys in LanceDB: an index at an address in place of a folder."""
