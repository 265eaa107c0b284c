"""The verbs of ``retrieval-tip index``: build, change, tune, copy; and the places where an index may lie."""
