"""How settings, keys and values are found from the shots."""
