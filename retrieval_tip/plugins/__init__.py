"""Formats and stores of other programs. :data:`hooks.TABLE` names them, and they do not use each other."""
