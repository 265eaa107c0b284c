"""Few-shot image classification by retrieval, using Tip-Adapter with a FAISS index and a Parquet label store.

>>> from retrieval_tip import Classifier
>>> clf = Classifier.from_folder("photos")  # one folder per class
>>> clf.predict("photo.jpg").label
"""

import os
import sys

import lazy_loader

__version__ = "0.1.0"

# FAISS and torch each bring an OpenMP runtime, and on macOS the second one would abort the process.
if sys.platform == "darwin":
    os.environ.setdefault("KMP_DUPLICATE_LIB_OK", "TRUE")

# The public names are listed in __init__.pyi. Importing torch takes seconds, and ``--help`` does not need it.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
