"""The ``Classifier``, which combines an index and its encoder. Its methods correspond to the commands."""
