"""Store the keys and labels of indexes in LanceDB instead of in a folder."""
